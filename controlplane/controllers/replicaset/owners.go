// SPDX-License-Identifier: Apache-2.0

package replicaset

import (
	"context"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/tools/cache"
	"k8s.io/kubernetes/pkg/features"

	"skep.io/skep/controlplane/controllers/runner"
)

// owners are how objects of one kind are read and written. Those of another kind than ReplicaSet are seen as
// ReplicaSets, so that one controller serves them all.
type owners struct {
	kind schema.GroupVersionKind
	// queue is the controller's name in metrics, recorder in events.
	queue, recorder string
	informer        cache.SharedIndexInformer
	// object is what a ReplicaSet stands for: events are about it.
	object   func(*appsv1.ReplicaSet) runtime.Object
	cached   func(namespace, name string) (*appsv1.ReplicaSet, error)
	matching func(pod *corev1.Pod) ([]*appsv1.ReplicaSet, error)
	client   func(namespace string) runner.StatusClient[*appsv1.ReplicaSet]
	watch    func(runner.Handlers[*appsv1.ReplicaSet]) (cache.InformerSynced, error)
	// terminating says that the API server stores status.terminatingReplicas.
	terminating bool
}

func replicaSets(deps runner.Deps) owners {
	informer := deps.Informers.Apps().V1().ReplicaSets()
	return owners{
		kind: Kind, queue: "replicaset", recorder: "replicaset-controller",
		informer: informer.Informer(),
		object:   func(rs *appsv1.ReplicaSet) runtime.Object { return rs },
		cached: func(namespace, name string) (*appsv1.ReplicaSet, error) {
			return informer.Lister().ReplicaSets(namespace).Get(name)
		},
		matching: informer.Lister().GetPodReplicaSets,
		client: func(namespace string) runner.StatusClient[*appsv1.ReplicaSet] {
			return deps.Client.AppsV1().ReplicaSets(namespace)
		},
		watch: func(h runner.Handlers[*appsv1.ReplicaSet]) (cache.InformerSynced, error) {
			return runner.Watch(informer.Informer(), h)
		},
		terminating: utilfeature.DefaultFeatureGate.Enabled(features.DeploymentReplicaSetTerminatingReplicas),
	}
}

// ControllerKind is how pods of a ReplicationController name their owner.
var ControllerKind = corev1.SchemeGroupVersion.WithKind("ReplicationController")

func replicationControllers(deps runner.Deps) owners {
	informer := deps.Informers.Core().V1().ReplicationControllers()
	return owners{
		kind: ControllerKind, queue: "replicationcontroller", recorder: "replication-controller",
		informer: informer.Informer(),
		object:   func(rs *appsv1.ReplicaSet) runtime.Object { return toController(rs) },
		cached: func(namespace, name string) (*appsv1.ReplicaSet, error) {
			rc, err := informer.Lister().ReplicationControllers(namespace).Get(name)
			if err != nil {
				return nil, err
			}
			return fromController(rc), nil
		},
		matching: func(pod *corev1.Pod) ([]*appsv1.ReplicaSet, error) {
			found, err := informer.Lister().GetPodControllers(pod)
			if err != nil {
				return nil, err
			}
			var all []*appsv1.ReplicaSet
			for _, rc := range found {
				all = append(all, fromController(rc))
			}
			return all, nil
		},
		client: func(namespace string) runner.StatusClient[*appsv1.ReplicaSet] {
			return controllerClient{deps, namespace}
		},
		watch: func(h runner.Handlers[*appsv1.ReplicaSet]) (cache.InformerSynced, error) {
			return runner.Watch(informer.Informer(), asControllers(h))
		},
	}
}

// asControllers are handlers of ReplicationControllers that do what h does with ReplicaSets.
func asControllers(h runner.Handlers[*appsv1.ReplicaSet]) runner.Handlers[*corev1.ReplicationController] {
	return runner.Handlers[*corev1.ReplicationController]{
		Add:    func(rc *corev1.ReplicationController) { h.Add(fromController(rc)) },
		Update: func(old, cur *corev1.ReplicationController) { h.Update(fromController(old), fromController(cur)) },
		Delete: func(rc *corev1.ReplicationController) { h.Delete(fromController(rc)) },
	}
}

// controllerClient reads ReplicationControllers as ReplicaSets, and writes their status.
type controllerClient struct {
	deps      runner.Deps
	namespace string
}

func (c controllerClient) Get(ctx context.Context, name string, opts metav1.GetOptions) (*appsv1.ReplicaSet, error) {
	rc, err := c.deps.Client.CoreV1().ReplicationControllers(c.namespace).Get(ctx, name, opts)
	if err != nil {
		return nil, err
	}
	return fromController(rc), nil
}

func (c controllerClient) UpdateStatus(ctx context.Context, rs *appsv1.ReplicaSet, opts metav1.UpdateOptions) (*appsv1.ReplicaSet, error) {
	rc, err := c.deps.Client.CoreV1().ReplicationControllers(c.namespace).UpdateStatus(ctx, toController(rs), opts)
	if err != nil {
		return nil, err
	}
	return fromController(rc), nil
}

// fromController is a ReplicationController as a ReplicaSet. What it points to is shared.
func fromController(rc *corev1.ReplicationController) *appsv1.ReplicaSet {
	rs := &appsv1.ReplicaSet{
		ObjectMeta: rc.ObjectMeta,
		Spec: appsv1.ReplicaSetSpec{
			Replicas: rc.Spec.Replicas, MinReadySeconds: rc.Spec.MinReadySeconds,
			Selector: &metav1.LabelSelector{MatchLabels: rc.Spec.Selector},
		},
		Status: appsv1.ReplicaSetStatus{
			Replicas: rc.Status.Replicas, FullyLabeledReplicas: rc.Status.FullyLabeledReplicas,
			ReadyReplicas: rc.Status.ReadyReplicas, AvailableReplicas: rc.Status.AvailableReplicas,
			ObservedGeneration: rc.Status.ObservedGeneration,
		},
	}
	if rc.Spec.Template != nil {
		rs.Spec.Template = *rc.Spec.Template
	}
	for _, c := range rc.Status.Conditions {
		rs.Status.Conditions = append(rs.Status.Conditions, appsv1.ReplicaSetCondition{
			Type: appsv1.ReplicaSetConditionType(c.Type), Status: c.Status,
			LastTransitionTime: c.LastTransitionTime, Reason: c.Reason, Message: c.Message,
		})
	}
	return rs
}

// toController undoes fromController.
func toController(rs *appsv1.ReplicaSet) *corev1.ReplicationController {
	rc := &corev1.ReplicationController{
		ObjectMeta: rs.ObjectMeta,
		Spec: corev1.ReplicationControllerSpec{
			Replicas: rs.Spec.Replicas, MinReadySeconds: rs.Spec.MinReadySeconds,
			Selector: rs.Spec.Selector.MatchLabels, Template: &rs.Spec.Template,
		},
		Status: corev1.ReplicationControllerStatus{
			Replicas: rs.Status.Replicas, FullyLabeledReplicas: rs.Status.FullyLabeledReplicas,
			ReadyReplicas: rs.Status.ReadyReplicas, AvailableReplicas: rs.Status.AvailableReplicas,
			ObservedGeneration: rs.Status.ObservedGeneration,
		},
	}
	for _, c := range rs.Status.Conditions {
		rc.Status.Conditions = append(rc.Status.Conditions, corev1.ReplicationControllerCondition{
			Type: corev1.ReplicationControllerConditionType(c.Type), Status: c.Status,
			LastTransitionTime: c.LastTransitionTime, Reason: c.Reason, Message: c.Message,
		})
	}
	return rc
}
