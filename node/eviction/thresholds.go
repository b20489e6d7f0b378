// SPDX-License-Identifier: Apache-2.0

// Package eviction decides which pods a node ends because it runs short of something, or because they
// use more of its disk than they may. It only decides. Order, words and defaults are kubelet's
// (pkg/kubelet/eviction; https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/).
package eviction

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// Signal is what a node may run short of.
type Signal string

// Signals. Images and pods share one file system here, so imagefs signals are the same as nodefs'.
const (
	Memory Signal = "memory.available"
	Disk   Signal = "nodefs.available"
	Inodes Signal = "nodefs.inodesFree"
	Pids   Signal = "pid.available"

	imageDisk   Signal = "imagefs.available"
	imageInodes Signal = "imagefs.inodesFree"
)

// signals in the order in which a shortage of them is relieved: memory first (kubelet: byEvictionPriority).
var signals = []Signal{Memory, Disk, Inodes, Pids}

// about says what a signal is to others: the condition of the node, and the resource that messages name.
var about = map[Signal]struct {
	condition corev1.NodeConditionType
	resource  corev1.ResourceName
}{
	Memory: {corev1.NodeMemoryPressure, corev1.ResourceMemory},
	Disk:   {corev1.NodeDiskPressure, corev1.ResourceEphemeralStorage},
	Inodes: {corev1.NodeDiskPressure, "inodes"},
	Pids:   {corev1.NodePIDPressure, "pids"},
}

// Threshold is the least that must be available: a quantity, or a part of the whole.
type Threshold struct {
	Quantity *resource.Quantity
	Percent  float64 // where Quantity is nil
}

// Of is the threshold as a number, where capacity is the whole.
func (t Threshold) Of(capacity int64) int64 {
	if t.Quantity != nil {
		return t.Quantity.Value()
	}
	return int64(float64(capacity) * t.Percent / 100)
}

// Defaults are kubelet's hard thresholds on Linux.
const Defaults = "memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%,imagefs.available<15%,imagefs.inodesFree<5%"

// Pair is one part of a flag's value.
type Pair struct{ Name, Value string }

// Pairs reads names with values, separated by commas, each name once: as kubelet's flags of this kind are written.
// form is what to write, for the error.
func Pairs(text, separator, form string) (pairs []Pair, err error) {
	for part := range strings.SplitSeq(text, ",") {
		part = strings.TrimSpace(part)
		if part == "" {
			continue
		}
		name, value, ok := strings.Cut(part, separator)
		if !ok {
			return nil, fmt.Errorf("%q: write %s", part, form)
		}
		if slices.ContainsFunc(pairs, func(p Pair) bool { return p.Name == name }) {
			return nil, fmt.Errorf("%s is given twice", name)
		}
		pairs = append(pairs, Pair{name, value})
	}
	return pairs, nil
}

// signalOf is the signal with this name; images are on the node's file system here.
func signalOf(name string) Signal {
	switch s := Signal(name); s {
	case imageDisk:
		return Disk
	case imageInodes:
		return Inodes
	default:
		return s
	}
}

// Parse reads thresholds as kubelet's --eviction-hard has them: signal<quantity or signal<percentage, separated by
// commas. Of two that mean the same file system the larger counts. Nothing, or 0, sets none.
func Parse(text string) (map[Signal]Threshold, error) {
	out := map[Signal]Threshold{}
	pairs, err := Pairs(text, "<", "SIGNAL<QUANTITY or SIGNAL<PERCENT%")
	if err != nil {
		return nil, err
	}
	for _, p := range pairs {
		name, value, signal := p.Name, p.Value, signalOf(p.Name)
		if !slices.Contains(signals, signal) {
			return nil, fmt.Errorf("%q is not a signal: use memory.available, nodefs.available, nodefs.inodesFree, imagefs.available, imagefs.inodesFree or pid.available", name)
		}
		t, err := parseThreshold(value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		have, both := out[signal]
		switch {
		case t.Quantity == nil && t.Percent == 0 || t.Quantity != nil && t.Quantity.IsZero():
		case both && (have.Quantity == nil) != (t.Quantity == nil):
			return nil, fmt.Errorf("%s: nodefs and imagefs are one file system here: give both as quantities or both as percentages", name)
		case both && (t.Quantity == nil && have.Percent >= t.Percent || t.Quantity != nil && have.Quantity.Cmp(*t.Quantity) >= 0):
		default:
			out[signal] = t
		}
	}
	return out, nil
}

// ParseGrace reads how long soft thresholds may be passed, as kubelet's --eviction-soft-grace-period has it:
// signal=duration, separated by commas. Each of the soft thresholds must have one, and nothing else.
func ParseGrace(text string, soft map[Signal]Threshold) (map[Signal]time.Duration, error) {
	out := map[Signal]time.Duration{}
	pairs, err := Pairs(text, "=", "SIGNAL=DURATION")
	if err != nil {
		return nil, err
	}
	for _, p := range pairs {
		name, value, signal := p.Name, p.Value, signalOf(p.Name)
		if _, ok := soft[signal]; !ok {
			return nil, fmt.Errorf("%s has no soft threshold", name)
		}
		d, err := time.ParseDuration(value)
		if err != nil || d < 0 {
			return nil, fmt.Errorf("%s: %q is not a duration", name, value)
		}
		if have, both := out[signal]; !both || d < have {
			out[signal] = d
		}
	}
	for _, s := range signals {
		if _, ok := soft[s]; !ok {
			continue
		}
		if _, ok := out[s]; !ok {
			return nil, fmt.Errorf("the soft threshold of %s needs one", s)
		}
	}
	return out, nil
}

func parseThreshold(value string) (Threshold, error) {
	if number, ok := strings.CutSuffix(value, "%"); ok {
		p, err := strconv.ParseFloat(number, 64)
		if err != nil || p < 0 || p > 100 {
			return Threshold{}, fmt.Errorf("%q is not a percentage between 0%% and 100%%", value)
		}
		return Threshold{Percent: p}, nil
	}
	q, err := resource.ParseQuantity(value)
	if err != nil || q.Sign() < 0 {
		return Threshold{}, fmt.Errorf("%q is neither a quantity nor a percentage", value)
	}
	return Threshold{Quantity: &q}, nil
}
