// SPDX-License-Identifier: Apache-2.0

// Package steps tells of each step in the making and unmaking of a pod: between two of them the host is in a state that
// an agent which dies there leaves to the next. Whoever wants to know where time goes, or what follows from an end at a
// step, puts an Observer into the context, as net/http/httptrace does.
package steps

import "context"

// Observer is told of a step that a pod has just passed; it must not block for long. pod is namespace/name.
type Observer func(pod, step string)

type observersKey struct{}

type podKey struct{}

// With adds an observer to those in ctx.
func With(ctx context.Context, o Observer) context.Context {
	before, _ := ctx.Value(observersKey{}).([]Observer)
	return context.WithValue(ctx, observersKey{}, append(before[:len(before):len(before)], o))
}

// Of says which pod the steps under ctx are of.
func Of(ctx context.Context, pod string) context.Context {
	if ctx.Value(observersKey{}) == nil {
		return ctx
	}
	return context.WithValue(ctx, podKey{}, pod)
}

// Passed tells that a step is done. Without an observer it costs one look into ctx.
func Passed(ctx context.Context, step string) {
	observers, _ := ctx.Value(observersKey{}).([]Observer)
	if len(observers) == 0 {
		return
	}
	pod, _ := ctx.Value(podKey{}).(string)
	for _, o := range observers {
		o(pod, step)
	}
}
