// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/workqueue"
)

// reportWorkers bounds the API calls that tell why pods wait, so that they cannot crowd out
// bindings.
const reportWorkers = 4

// noteLimit is how long an event's message may be.
const noteLimit = 1024

// report says why a pod has no node.
type report struct {
	pod       *v1.Pod
	reason    string
	message   string
	nominated string
}

// reporter writes reports to the API: a condition and an event. Of several reports about one pod
// that wait, only the last is written.
type reporter struct {
	client   kubernetes.Interface
	recorder recorders
	log      *slog.Logger
	queue    workqueue.TypedInterface[types.UID]

	mu     sync.Mutex
	latest map[types.UID]report
}

func newReporter(client kubernetes.Interface, recorder recorders, log *slog.Logger) *reporter {
	return &reporter{
		client: client, recorder: recorder, log: log,
		queue:  workqueue.NewTyped[types.UID](),
		latest: map[types.UID]report{},
	}
}

func (r *reporter) tell(what report) {
	r.mu.Lock()
	r.latest[what.pod.UID] = what
	r.mu.Unlock()
	r.queue.Add(what.pod.UID)
}

func (r *reporter) run(ctx context.Context) {
	var workers sync.WaitGroup
	for range reportWorkers {
		workers.Go(func() {
			for {
				uid, shutdown := r.queue.Get()
				if shutdown {
					return
				}
				r.write(ctx, uid)
				r.queue.Done(uid)
			}
		})
	}
	<-ctx.Done()
	r.queue.ShutDown()
	workers.Wait()
}

func (r *reporter) write(ctx context.Context, uid types.UID) {
	r.mu.Lock()
	what, ok := r.latest[uid]
	delete(r.latest, uid)
	r.mu.Unlock()
	if !ok || ctx.Err() != nil {
		return
	}
	message := what.message
	if len(message) > noteLimit {
		message = message[:noteLimit-len(" ...")] + " ..."
	}
	r.recorder.of(what.pod).Event(what.pod, v1.EventTypeWarning, "FailedScheduling", message)
	condition := v1.PodCondition{Type: v1.PodScheduled, Status: v1.ConditionFalse, Reason: what.reason, Message: what.message}
	if err := patchCondition(ctx, r.client, what.pod, condition, &what.nominated); err != nil && !apierrors.IsNotFound(err) && ctx.Err() == nil {
		r.log.Warn("telling why a pod is not scheduled failed; it is told again at the next attempt",
			"pod", what.pod.Namespace+"/"+what.pod.Name, "err", err)
	}
}

// patchCondition sets one condition of a pod's status, and its nominated node unless nil, if they
// are not so already.
func patchCondition(ctx context.Context, client kubernetes.Interface, object *v1.Pod, condition v1.PodCondition, nominated *string) error {
	condition.ObservedGeneration = object.Generation
	condition.LastTransitionTime = metav1.Now()
	same := false
	for i := range object.Status.Conditions {
		if c := &object.Status.Conditions[i]; c.Type == condition.Type {
			if c.Status == condition.Status {
				condition.LastTransitionTime = c.LastTransitionTime
			}
			condition.LastProbeTime = c.LastProbeTime
			same = *c == condition
		}
	}
	if same && (nominated == nil || *nominated == object.Status.NominatedNodeName) {
		return nil
	}
	status := map[string]any{"conditions": []v1.PodCondition{condition}}
	if nominated != nil && *nominated != object.Status.NominatedNodeName {
		status["nominatedNodeName"] = nil
		if *nominated != "" {
			status["nominatedNodeName"] = *nominated
		}
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": object.UID}, "status": status})
	if err != nil {
		return err
	}
	_, err = client.CoreV1().Pods(object.Namespace).Patch(ctx, object.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	return err
}
