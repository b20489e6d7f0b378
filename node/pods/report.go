// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/client-go/kubernetes"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"skep.io/skep/node/probes"
	"skep.io/skep/node/sandbox"
	"skep.io/skep/node/steps"
)

// statusKey is the key of the status write on its way: one at a time, so writes of one pod never overtake one another,
// and what changes meanwhile goes into one next write.
const statusKey = "status"

// report writes the pod's status if it differs from what the API has.
func (w *worker) report(o *Observed, p *Plan) {
	if w.gone || w.ops[statusKey] != nil || !w.retries.due(statusKey, o.Now) {
		return
	}
	// A pod that goes before anything of it was made needs no last words.
	desired := status(w.granted(), o)
	if podutil.IsPodPhaseTerminal(desired.Phase) {
		w.leave(w.pod.UID) // before anybody can know it, and bind another pod in its stead
	}
	if w.static != "" {
		own := *w.pod
		own.Status = desired
		w.pod = &own
		w.shown.Store(w.pod)
	}
	pod := w.api()
	if pod == nil {
		w.tellOver(desired.Phase) // a static pod that nothing shows
		return
	}
	if w.reported != nil && equality.Semantic.DeepEqual(*w.reported, desired) && equality.Semantic.DeepEqual(pod.Status, desired) {
		w.tellOver(desired.Phase)
		return
	}
	patch, err := statusPatch(pod, desired)
	if err != nil {
		w.set.cfg.Log.Error("make status patch", "pod", pod.Namespace+"/"+pod.Name, "error", err)
		return
	}
	if patch == nil {
		w.tellOver(desired.Phase)
		return
	}
	ctx, cancel := context.WithCancel(steps.Of(w.set.ctx, pod.Namespace+"/"+pod.Name))
	w.ops[statusKey] = &op{cancel: cancel}
	go func() {
		written, err := writeStatus(ctx, w.set.cfg.Client, pod, patch)
		steps.Passed(ctx, "status: "+string(desired.Phase))
		w.post(func() {
			delete(w.ops, statusKey)
			cancel()
			w.wrote(pod, written, desired, err)
		})
	}()
}

// wrote takes in what came of writing the status desired into pod, which is written now.
func (w *worker) wrote(pod, written *corev1.Pod, desired corev1.PodStatus, err error) {
	switch now := w.api(); {
	case now == nil || now.UID != pod.UID:
		// Another mirror shows the static pod by now: it was told nothing, and waits for nothing.
	case err == nil:
		w.retries.forget(statusKey)
		w.reported = &desired
		w.tellOver(desired.Phase)
		if !w.born.IsZero() && desired.Phase == corev1.PodRunning {
			w.set.stats.started.Observe(time.Since(w.born).Seconds())
			w.born = time.Time{}
		}
		if w.static != "" {
			w.mirrored(written)
		} else {
			w.seen(written)
		}
	case apierrors.IsNotFound(err):
		w.retries.failed(statusKey, retryLimit, retryLimit) // the watch will say so too
	case w.set.ctx.Err() == nil:
		w.retries.failed(statusKey, firstRetry/5, retryLimit)
		w.set.cfg.Log.Error("write pod status", "pod", w.pod.Namespace+"/"+w.pod.Name, "error", err)
	}
}

// tellOver tells who waits for the end of the pod.
func (w *worker) tellOver(phase corev1.PodPhase) {
	if podutil.IsPodPhaseTerminal(phase) {
		w.finish()
	}
}

// statusPatch is what turns pod's status into desired, with the uid as precondition; nil if nothing does.
func statusPatch(pod *corev1.Pod, desired corev1.PodStatus) ([]byte, error) {
	before, err := json.Marshal(corev1.Pod{Status: pod.Status})
	if err != nil {
		return nil, err
	}
	after, err := json.Marshal(corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: pod.UID}, Status: desired})
	if err != nil {
		return nil, err
	}
	patch, err := strategicpatch.CreateTwoWayMergePatch(before, after, corev1.Pod{})
	if err != nil {
		return nil, err
	}
	if string(patch) == fmt.Sprintf(`{"metadata":{"uid":%q}}`, pod.UID) {
		return nil, nil
	}
	return patch, nil
}

func writeStatus(ctx context.Context, client kubernetes.Interface, pod *corev1.Pod, patch []byte) (*corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
}

// event records what happened to the pod, or to one of its containers, as kubelet would.
func (s *Set) event(pod *corev1.Pod, container, kind, reason, format string, args ...any) {
	ref := &corev1.ObjectReference{
		Kind: "Pod", APIVersion: "v1", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, ResourceVersion: pod.ResourceVersion,
	}
	if container != "" {
		ref.FieldPath = fieldPath(pod, container)
	}
	s.cfg.Recorder.Eventf(ref, kind, reason, format, args...)
}

func fieldPath(pod *corev1.Pod, container string) string {
	list := "containers"
	if c := specOf(pod, container); c != nil && isInit(pod, c) {
		list = "initContainers"
	} else if ephemeral(pod, container) != nil {
		list = "ephemeralContainers"
	}
	return "spec." + list + "{" + container + "}"
}

// ProbeFailed tells of a probe that failed.
func (s *Set) ProbeFailed(f probes.Failure) {
	s.withWorker(f.PodUID, func(w *worker) {
		switch {
		case f.Errored:
			s.event(w.pod, f.Container, corev1.EventTypeWarning, "Unhealthy", "%s probe errored and resulted in failure state: %s", f.Kind, f.Message)
		case f.Warning:
			s.event(w.pod, f.Container, corev1.EventTypeWarning, "ProbeWarning", "%s probe warning: %s", f.Kind, f.Message)
		default:
			s.event(w.pod, f.Container, corev1.EventTypeWarning, "Unhealthy", "%s probe failed: %s", f.Kind, f.Message)
		}
	})
}

// writeEtc writes the files that all containers of the pod share, once its addresses are known.
func (s *Set) writeEtc(pod *corev1.Pod, box *sandbox.Sandbox) error {
	ips := addressesOf(box.Addrs)
	name, domain, err := s.names(pod)
	if err != nil {
		return err
	}
	resolv, err := s.cfg.ResolvConf(pod)
	if err != nil {
		return fmt.Errorf("resolv.conf of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return s.files.writeEtc(pod, ips, name, domain, resolv)
}
