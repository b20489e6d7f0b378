// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"skep.io/skep/node/static"
)

// staticPod is a pod that this node runs because of a file on it, and the pod that shows it in the API: its mirror. The
// mirror has a uid of its own. It says what the static pod does and has no say in it.
type staticPod struct {
	want    *corev1.Pod // what the file says; nil: there is none any more
	worker  *worker     // runs what the file says, or what it said before; nil: nothing runs
	leaving bool        // the worker was told to end its pod
	mirror  *corev1.Pod // as the API has it; nil: it has none
	at      time.Time   // not before then is the API asked again
	delay   time.Duration
}

func isMirror(pod *corev1.Pod) bool {
	_, ok := pod.Annotations[corev1.MirrorPodAnnotationKey]
	return ok
}

// IsStatic reports whether the pod comes from a file on this host.
func IsStatic(pod *corev1.Pod) bool {
	return pod.Annotations[static.HashAnnotation] == string(pod.UID) && !isMirror(pod)
}

func nameOf(pod *corev1.Pod) types.NamespacedName {
	return types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name}
}

// SetStatic tells which static pods there are to be: those that are new start, those that are not named end, and what
// has changed ends and starts anew.
func (s *Set) SetStatic(list []*corev1.Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range s.statics {
		st.want = nil
	}
	for _, p := range list {
		s.staticOf(nameOf(p)).want = p
	}
	for _, st := range s.statics {
		s.settleStatic(st)
	}
	s.wakeMirrors()
}

// staticOf is the entry of that name, made if need be. s.mu is held.
func (s *Set) staticOf(name types.NamespacedName) *staticPod {
	st := s.statics[name]
	if st == nil {
		st = &staticPod{}
		s.statics[name] = st
	}
	return st
}

// settleStatic starts or ends the worker of a static pod. s.mu is held.
func (s *Set) settleStatic(st *staticPod) {
	switch w := st.worker; {
	case w != nil && !st.leaving && (st.want == nil || st.want.UID != w.pod.UID):
		st.leaving = true
		w.post(func() { w.gone = true })
	case w == nil && st.want != nil && s.ctx.Err() == nil:
		st.leaving = false
		st.worker = s.begin(st.want, s.cfg.Node(), st)
	}
}

// staticEnded tells that nothing is left of what a static pod's worker ran. s.mu is held.
func (s *Set) staticEnded(st *staticPod) {
	st.worker, st.leaving = nil, false
	s.settleStatic(st)
	s.wakeMirrors()
}

// mirrored takes in a mirror as the API has it, or with gone that it has it no longer.
func (s *Set) mirrored(pod *corev1.Pod, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if gone {
		st := s.statics[nameOf(pod)]
		if st == nil || st.mirror == nil || st.mirror.UID != pod.UID {
			return
		}
		st.mirror = nil
		s.tellMirror(st)
		return
	}
	st := s.staticOf(nameOf(pod))
	if st.mirror != nil && older(pod, st.mirror) {
		return
	}
	st.mirror = pod
	s.tellMirror(st)
}

// tellMirror tells all who want to know that the mirror is another. s.mu is held.
func (s *Set) tellMirror(st *staticPod) {
	st.at, st.delay = time.Time{}, 0
	s.showMirror(st)
	s.wakeMirrors()
}

// showMirror tells the worker which pod of the API shows what it runs. s.mu is held.
func (s *Set) showMirror(st *staticPod) {
	w, m := st.worker, st.mirror
	if w == nil {
		return
	}
	if m != nil && (m.DeletionTimestamp != nil || m.Annotations[corev1.MirrorPodAnnotationKey] != string(w.static)) {
		m = nil
	}
	w.post(func() { w.mirrored(m) })
}

func (s *Set) wakeMirrors() {
	select {
	case s.mirrorsDue <- struct{}{}:
	default:
	}
}

// mirrorStep is what is to be done about a mirror.
type mirrorStep int

const (
	leaveMirror mirrorStep = iota
	createMirror
	deleteMirror
)

// planMirror says what is to be done about the mirror of a static pod. The mirror of a pod that is ending stays until it
// has ended, but is not made anew. over: the pod has succeeded or failed; a mirror that says so of one that has not is
// from before the machine was started.
func planMirror(want, running *corev1.Pod, leaving, over bool, mirror *corev1.Pod) mirrorStep {
	shown := want
	if running != nil {
		shown = running
	}
	if mirror == nil {
		if shown == nil || leaving {
			return leaveMirror
		}
		return createMirror
	}
	if shown == nil || mirror.DeletionTimestamp != nil || mirror.Annotations[corev1.MirrorPodAnnotationKey] != string(shown.UID) ||
		podutil.IsPodPhaseTerminal(mirror.Status.Phase) && !over {
		return deleteMirror
	}
	return leaveMirror
}

// RunMirrors has a mirror in the API for each static pod, and none without, until ctx ends. The Node must be known.
func (s *Set) RunMirrors(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		timer.Reset(s.syncMirrors(ctx))
		select {
		case <-s.mirrorsDue:
		case <-timer.C:
		case <-ctx.Done():
			return
		}
	}
}

// mirrorJob is one step for one static pod.
type mirrorJob struct {
	entry *staticPod
	step  mirrorStep
	pod   *corev1.Pod // to show, or to delete
}

// syncMirrors does what is due, and says how long nothing will be.
func (s *Set) syncMirrors(ctx context.Context) time.Duration {
	var jobs []mirrorJob
	wait, now := time.Hour, time.Now()
	s.mu.Lock()
	for name, st := range s.statics {
		var running *corev1.Pod
		over := false
		if st.worker != nil {
			running, over = st.worker.shown.Load(), st.worker.out.Load()
		}
		step := planMirror(st.want, running, st.leaving, over, st.mirror)
		switch {
		case step == leaveMirror:
			if st.want == nil && st.worker == nil && st.mirror == nil {
				delete(s.statics, name)
			}
		case now.Before(st.at):
			wait = min(wait, st.at.Sub(now))
		case step == deleteMirror:
			jobs = append(jobs, mirrorJob{st, step, st.mirror})
		case running != nil:
			jobs = append(jobs, mirrorJob{st, step, running})
		}
	}
	s.mu.Unlock()
	slices.SortFunc(jobs, func(a, b mirrorJob) int { return slices.Compare([]byte(a.pod.UID), []byte(b.pod.UID)) })
	for _, j := range jobs {
		made, err := s.doMirror(ctx, j)
		if ctx.Err() != nil {
			return wait
		}
		s.mu.Lock()
		if err != nil {
			j.entry.delay = min(max(2*j.entry.delay, firstRetry), retryLimit)
			j.entry.at = time.Now().Add(j.entry.delay)
			wait = min(wait, j.entry.delay)
			s.cfg.Log.Error("mirror of a static pod", "pod", j.pod.Namespace+"/"+j.pod.Name, "retry", j.entry.delay, "error", err)
		} else {
			wait = 0 // the next step may be due
			j.entry.at, j.entry.delay = time.Time{}, 0
			switch {
			case made != nil && (j.entry.mirror == nil || older(j.entry.mirror, made)):
				j.entry.mirror = made
				s.showMirror(j.entry)
			case made == nil && j.entry.mirror != nil && j.entry.mirror.UID == j.pod.UID:
				j.entry.mirror = nil
				s.showMirror(j.entry)
			}
		}
		s.mu.Unlock()
	}
	return wait
}

// doMirror makes a mirror, which it returns, or deletes one.
func (s *Set) doMirror(ctx context.Context, j mirrorJob) (*corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	client := s.cfg.Client.CoreV1().Pods(j.pod.Namespace)
	if j.step == deleteMirror {
		now := int64(0)
		err := client.Delete(ctx, j.pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now, Preconditions: metav1.NewUIDPreconditions(string(j.pod.UID))})
		if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
			err = nil // it is gone, or another has its name
		}
		return nil, err
	}
	node := s.cfg.Node()
	if node == nil || node.UID == "" {
		return nil, fmt.Errorf("node %s is not registered yet", s.cfg.NodeName)
	}
	made, err := client.Create(ctx, mirrorOf(j.pod, node), metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		// The watch may not have shown it yet. What is not a mirror stands in the way until somebody removes it.
		have, getErr := client.Get(ctx, j.pod.Name, metav1.GetOptions{})
		if getErr == nil && isMirror(have) && have.Spec.NodeName == s.cfg.NodeName {
			return have, nil
		}
	}
	return made, err
}

// mirrorOf is the pod that shows a static pod in the API. It belongs to the Node, by which the API server knows that the
// node may make it (KEP-1314).
func mirrorOf(pod *corev1.Pod, node *corev1.Node) *corev1.Pod {
	m := pod.DeepCopy()
	yes := true
	m.UID, m.ResourceVersion, m.Status = "", "", corev1.PodStatus{}
	m.Annotations[corev1.MirrorPodAnnotationKey] = m.Annotations[static.HashAnnotation]
	m.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID, Controller: &yes}}
	return m
}

// mirrored takes in the pod that shows this static one; nil if there is none. What others have said of it, such as
// conditions that readiness gates name, counts; what this node wrote into it does not: the node knows better.
func (w *worker) mirrored(m *corev1.Pod) {
	first := w.mirror == nil || m != nil && m.UID != w.mirror.UID
	if m == nil {
		w.mirror = nil
		return
	}
	if !first && older(m, w.mirror) {
		return
	}
	w.mirror = m
	pod := *w.pod
	pod.Generation = m.Generation
	pod.Status.Conditions = slices.Clone(w.pod.Status.Conditions)
	for _, c := range m.Status.Conditions {
		if nodeConditions[c.Type] {
			continue
		}
		i := slices.IndexFunc(pod.Status.Conditions, func(o corev1.PodCondition) bool { return o.Type == c.Type })
		if i < 0 {
			pod.Status.Conditions = append(pod.Status.Conditions, c)
		} else {
			pod.Status.Conditions[i] = c
		}
	}
	w.pod = &pod
	w.shown.Store(w.pod)
	if !first {
		return
	}
	w.retries.forget(statusKey)
	if w.reported == nil && len(w.containers) > 0 {
		// An agent that was restarted: what serves goes on serving while the probes come round again.
		if t := m.Status.StartTime; t != nil && t.Time.Before(w.startTime) {
			w.startTime = t.Time
		}
		w.believe(m.Status)
		w.set.cfg.Prober.Set(w.pod.UID, nil)
		w.targets = nil
	}
}

// api is the pod as the API has it, to which status is written; nil while there is none.
func (w *worker) api() *corev1.Pod {
	if w.static != "" {
		return w.mirror
	}
	return w.pod
}
