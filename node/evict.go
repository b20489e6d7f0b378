// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"skep.io/skep/node/eviction"
	"skep.io/skep/node/pods"
	"skep.io/skep/node/sandbox/cgroup"
)

// Eviction says when pods are ended because the node runs short of something. The zero value is kubelet's defaults.
type Eviction struct {
	// Hard thresholds; nil: eviction.Defaults.
	Hard map[eviction.Signal]eviction.Threshold
	// Soft thresholds, and how long each may be passed; nil: none.
	Soft      map[eviction.Signal]eviction.Threshold
	SoftGrace map[eviction.Signal]time.Duration
	// MaxPodGrace is the most that a pod gets to end which is evicted for a soft threshold; 0: none.
	MaxPodGrace time.Duration
	// Transition is how long the node goes on saying that it is short after it was; 0: 5 min, negative: no longer.
	Transition time.Duration
}

func (e Eviction) policy() eviction.Policy {
	return eviction.Policy{Hard: e.Hard, Soft: e.Soft, Grace: e.SoftGrace, Transition: e.Transition}
}

func (e Eviction) complete() (Eviction, error) {
	if e.Transition == 0 {
		e.Transition = 5 * time.Minute
	}
	if e.Hard != nil {
		return e, nil
	}
	var err error
	e.Hard, err = eviction.Parse(eviction.Defaults)
	return e, err
}

// evictor looks every checkPressure at what the node has left, and ends pods if that is too little, one at a time, and
// pods that have more on disk than they may. Nothing tells of either: it must be looked at.
type evictor struct {
	a      *Agent
	set    *pods.Set
	policy Eviction
	state  *eviction.State
	ending types.UID // the pod that was evicted last: the next has time until it has ended
}

func (e *evictor) run(ctx context.Context) {
	tick := time.NewTicker(checkPressure)
	defer tick.Stop()
	for {
		e.look(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (e *evictor) look(ctx context.Context) {
	l := e.a.status
	levels := e.levels()
	short, conditions := eviction.Look(eviction.Observed{Now: time.Now(), Levels: levels}, e.policy.policy(), e.state)
	l.setPressure(pressure{
		memory: conditions[corev1.NodeMemoryPressure], disk: conditions[corev1.NodeDiskPressure], pids: conditions[corev1.NodePIDPressure],
	})
	if d, ok := levels[eviction.Disk]; ok {
		if err := l.collectImages(ctx, d.Capacity, d.Available, wantsDisk(short)); err != nil && ctx.Err() == nil {
			e.a.log.Error("collect images that nobody uses", "error", err)
		}
	}
	e.endOversized(ctx)
	if len(short) == 0 || e.busy() {
		return
	}
	// What images gave back may be enough.
	short, _ = eviction.Look(eviction.Observed{Now: time.Now(), Levels: e.levels()}, e.policy.policy(), e.state)
	if len(short) == 0 {
		return
	}
	e.endOne(ctx, short)
}

func wantsDisk(short []eviction.Shortage) bool {
	for _, s := range short {
		if s.Signal == eviction.Disk || s.Signal == eviction.Inodes {
			return true
		}
	}
	return false
}

// busy reports whether the last eviction is still under way.
func (e *evictor) busy() bool {
	for _, p := range e.set.Pods() {
		if p.UID == e.ending && !podutil.IsPodPhaseTerminal(p.Status.Phase) {
			return true
		}
	}
	return false
}

// endOne evicts one pod for the most urgent shortage for which there is one.
func (e *evictor) endOne(ctx context.Context, short []eviction.Shortage) {
	candidates := e.candidates(ctx, func(*corev1.Pod) bool { return true })
	for _, s := range short {
		e.a.log.Warn("the node runs short", "of", s.Signal, "available", s.Available, "threshold", s.Threshold)
		e.a.status.recorder.Eventf(e.a.status.ref(), corev1.EventTypeWarning, "EvictionThresholdMet", "Attempting to reclaim %s", s.Resource())
		if victim := eviction.Choose(s, candidates); victim != nil {
			e.ending = victim.Pod
			if s.Soft {
				e.set.EvictWithin(victim.Pod, victim.Message, e.policy.MaxPodGrace)
			} else {
				e.set.Evict(victim.Pod, victim.Message)
			}
			return
		}
		e.a.log.Warn("no pod may be evicted", "for", s.Signal)
	}
}

// endOversized evicts all pods that have more on disk than they may.
func (e *evictor) endOversized(ctx context.Context) {
	for _, p := range e.candidates(ctx, eviction.Limited) {
		if why := eviction.OverLimit(p); why != "" {
			e.set.Evict(p.UID, why)
		}
	}
}

// candidates are the pods that want says, with what they use.
func (e *evictor) candidates(ctx context.Context, want func(*corev1.Pod) bool) []*eviction.Pod {
	var out []*eviction.Pod
	for _, p := range e.set.Pods() {
		if podutil.IsPodPhaseTerminal(p.Status.Phase) || p.DeletionTimestamp != nil || !want(p) {
			continue
		}
		u, err := e.usage(ctx, p)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			e.a.log.Warn("what a pod uses is not known in full", "pod", p.Namespace+"/"+p.Name, "error", err)
		}
		out = append(out, &eviction.Pod{Pod: p, Static: pods.IsStatic(p), Usage: u})
	}
	return out
}

// usage measures one pod. With an error it holds what could be read.
func (e *evictor) usage(ctx context.Context, p *corev1.Pod) (eviction.Usage, error) {
	u := eviction.Usage{Containers: map[string]eviction.ContainerUsage{}, EmptyDirs: map[string]int64{}}
	disk, err := e.a.PodDisk(ctx, p)
	errs := []error{err}
	for name, d := range disk.Containers {
		u.Containers[name] = eviction.ContainerUsage{Disk: d.Writable.Bytes + d.Logs.Bytes}
	}
	for i := range p.Spec.Volumes {
		v := &p.Spec.Volumes[i]
		switch d, measured := disk.Volumes[v.Name]; {
		case !measured:
		case v.EmptyDir == nil || v.EmptyDir.Medium == corev1.StorageMediumMemory:
			delete(disk.Volumes, v.Name) // what the node wrote itself, or what counts as memory
		default:
			u.EmptyDirs[v.Name] = d.Bytes
		}
	}
	sum := disk.Sum()
	u.Disk, u.Inodes = sum.Bytes, sum.Inodes
	containers, err := e.a.runtime.ListPod(ctx, p.UID)
	errs = append(errs, err)
	for _, c := range containers {
		if used, err := cgroup.Read(c.Cgroup); err == nil && c.Cgroup != "" {
			one := u.Containers[c.Name]
			one.Memory += int64(used.WorkingSet)
			u.Containers[c.Name] = one
			u.Memory += int64(used.WorkingSet)
			u.Pids += int64(used.Pids)
		}
	}
	return u, errors.Join(errs...)
}

// levels reads what the node has left.
func (e *evictor) levels() map[eviction.Signal]eviction.Level {
	out := map[eviction.Signal]eviction.Level{}
	if mem, err := memInfo(); err == nil {
		out[eviction.Memory] = eviction.Level{Available: mem["MemAvailable"], Capacity: mem["MemTotal"]}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(e.a.cfg.DataDir, &st); err == nil {
		out[eviction.Disk] = eviction.Level{Available: int64(st.Bavail) * st.Bsize, Capacity: int64(st.Blocks) * st.Bsize}
		if st.Files > 0 { // some file systems make them as they go
			out[eviction.Inodes] = eviction.Level{Available: int64(st.Ffree), Capacity: int64(st.Files)}
		}
	} else {
		e.a.log.Error("free space of the data directory", "error", fmt.Errorf("%s: %w", e.a.cfg.DataDir, err))
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		if limit := mostPids(); limit > 0 {
			out[eviction.Pids] = eviction.Level{Available: limit - int64(info.Procs), Capacity: limit}
		}
	}
	return out
}
