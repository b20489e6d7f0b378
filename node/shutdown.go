// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/apis/scheduling"

	"skep.io/skep/node/pods"
)

// Shutdown is how long pods have to end before their machine does (https://kubernetes.io/docs/concepts/cluster-administration/node-shutdown/).
type Shutdown struct {
	// Grace is what all pods have together, Critical the part at its end that only critical ones have.
	Grace, Critical time.Duration
}

// killing is how much longer than their grace the pods of a group are waited for: until the kernel has ended their
// processes and the API knows.
const killing = 5 * time.Second

// group of pods that end together.
type shutdownGroup struct {
	name  string
	uids  []types.UID
	grace time.Duration
}

// groups orders pods by when they end: those that others build on come last.
func (s Shutdown) groups(list []*corev1.Pod) []shutdownGroup {
	regular := shutdownGroup{name: "regular", grace: s.Grace - s.Critical}
	critical := shutdownGroup{name: "critical", grace: s.Critical}
	for _, p := range list {
		switch {
		case podutil.IsPodPhaseTerminal(p.Status.Phase):
		case pods.IsStatic(p) || p.Spec.Priority != nil && *p.Spec.Priority >= scheduling.SystemCriticalPriority:
			critical.uids = append(critical.uids, p.UID)
		default:
			regular.uids = append(regular.uids, p.UID)
		}
	}
	return []shutdownGroup{regular, critical}
}

// ErrNoPods means that the agent has not read yet what an earlier one left.
var ErrNoPods = errors.New("the agent has just started: try again")

// EndPods ends all pods of the node in order, and takes no new ones, until Resume or the end of the process. The node says
// that it is not ready meanwhile. It returns once the API knows that the pods are over, or their time is.
func (a *Agent) EndPods(ctx context.Context) error {
	set := a.set.Load()
	if set == nil {
		return ErrNoPods
	}
	set.Close(true)
	a.status.shutdown(true)
	a.log.Warn("the node is about to be shut down: its pods end", "grace", a.cfg.Shutdown.Grace, "critical", a.cfg.Shutdown.Critical)
	var errs []error
	for _, g := range a.cfg.Shutdown.groups(set.Pods()) {
		for _, uid := range g.uids {
			set.Terminate(uid, g.grace)
		}
		limit, cancel := context.WithTimeout(ctx, g.grace+killing)
		if err := set.Await(limit, g.uids); err != nil {
			errs = append(errs, fmt.Errorf("not all %s pods have ended in %s: %w", g.name, g.grace+killing, err))
		}
		cancel()
	}
	return errors.Join(errs...)
}

// Resume takes pods again: the machine is not shut down after all.
func (a *Agent) Resume() error {
	set := a.set.Load()
	if set == nil {
		return ErrNoPods
	}
	set.Close(false)
	a.status.shutdown(false)
	a.log.Info("the node is not shut down after all")
	return nil
}
