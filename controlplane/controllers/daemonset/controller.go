// SPDX-License-Identifier: Apache-2.0

package daemonset

import (
	"context"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/sets"
	appslisters "k8s.io/client-go/listers/apps/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/kubernetes/pkg/controller"
	"k8s.io/kubernetes/pkg/controller/daemon/util"
	labelsutil "k8s.io/kubernetes/pkg/util/labels"

	"skep.io/skep/controlplane/controllers/history"
	"skep.io/skep/controlplane/controllers/runner"
)

const workers = 2

// Controller keeps DaemonSets' pods on their nodes.
type Controller struct {
	runner.Deps
	queue      *runner.Queue
	pods       runner.Pods[*appsv1.DaemonSet]
	revisions  *history.Revisions[*appsv1.DaemonSet]
	recorder   record.EventRecorder
	daemonSets appslisters.DaemonSetLister
	nodes      corelisters.NodeLister
	backOff    *backOff
	synced     []cache.InformerSynced
}

// New registers the controller with the shared informers.
func New(deps runner.Deps) (*Controller, error) {
	daemonSets, core := deps.Informers.Apps().V1().DaemonSets(), deps.Informers.Core().V1()
	c := &Controller{
		Deps:       deps,
		recorder:   deps.Recorder("daemonset-controller"),
		daemonSets: daemonSets.Lister(),
		nodes:      core.Nodes().Lister(),
		backOff:    newBackOff(),
	}
	c.queue = runner.New("daemonset", workers, deps, c.sync)
	var err error
	if c.pods, err = runner.NewPods[*appsv1.DaemonSet](deps, Kind, c.queue, c.recorder); err != nil {
		return nil, err
	}
	c.pods.Cached = func(namespace, name string) (*appsv1.DaemonSet, error) {
		return c.daemonSets.DaemonSets(namespace).Get(name)
	}
	c.pods.Fresh = func(ctx context.Context, namespace, name string, opts metav1.GetOptions) (*appsv1.DaemonSet, error) {
		return deps.Client.AppsV1().DaemonSets(namespace).Get(ctx, name, opts)
	}
	c.pods.Matching = c.daemonSets.GetPodDaemonSets

	daemonSetsSynced, err := runner.Watch(daemonSets.Informer(), c.pods.Owners(c.forget))
	if err != nil {
		return nil, err
	}
	podsSynced, err := runner.Watch(core.Pods().Informer(), c.pods.Handlers())
	if err != nil {
		return nil, err
	}
	nodesSynced, err := runner.Watch(core.Nodes().Informer(), runner.Handlers[*corev1.Node]{
		Add: func(node *corev1.Node) { c.nodeChanged(nil, node) },
		Update: func(old, cur *corev1.Node) {
			// Heartbeats change neither.
			if !apiequality.Semantic.DeepEqual(old.Labels, cur.Labels) || !apiequality.Semantic.DeepEqual(old.Spec.Taints, cur.Spec.Taints) {
				c.nodeChanged(old, cur)
			}
		},
		Delete: func(node *corev1.Node) { c.nodeChanged(node, nil) },
	})
	if err != nil {
		return nil, err
	}
	revisions, revisionsSynced, err := history.Watch(deps, c.pods)
	if err != nil {
		return nil, err
	}
	c.revisions = revisions
	c.synced = []cache.InformerSynced{daemonSetsSynced, podsSynced, nodesSynced, revisionsSynced}
	return c, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error { return c.queue.Run(ctx, c.synced...) }

func (c *Controller) forget(ds *appsv1.DaemonSet) {
	c.pods.Forget(runner.Key(ds))
	c.backOff.forget(ds.UID)
	c.queue.Add(runner.Key(ds))
}

// nodeChanged wakes the DaemonSets for which a change of a node makes a difference. There is no node before it is
// added and after it is deleted.
func (c *Controller) nodeChanged(old, cur *corev1.Node) {
	all, err := c.daemonSets.List(labels.Everything())
	if err != nil {
		return // a lister that reads memory has no other error
	}
	for _, ds := range all {
		fit := newFit(ds)
		var before, after [2]bool
		if old != nil {
			before[0], before[1] = fit.on(old)
		}
		if cur != nil {
			after[0], after[1] = fit.on(cur)
		}
		if before != after {
			c.queue.Add(runner.Key(ds))
		}
	}
}

func (c *Controller) sync(ctx context.Context, key string) (time.Duration, error) {
	ds, found, err := runner.Find(key, c.pods.Cached)
	if err != nil {
		return 0, err
	}
	if !found {
		c.pods.Forget(key)
		return 0, nil
	}
	if ds.DeletionTimestamp != nil {
		// Its revisions may be going already, so nobody can tell which pods are old.
		return 0, nil
	}
	settled := c.pods.Settled(key)
	now := c.Clock.Now()
	s, past, collisions, err := c.snapshot(ctx, ds, now)
	if err != nil {
		return 0, err
	}

	var plan Plan
	var failure error
	if settled {
		plan = Compute(s, now)
		if failure = c.apply(ctx, s, plan, now); failure == nil {
			failure = c.revisions.Delete(ctx, history.Expired(past, live(past, s.Pods), ds.Spec.RevisionHistoryLimit))
		}
	}
	status := Status(s, settled, now)
	status.CollisionCount = collisions
	if err := c.writeStatus(ctx, ds, status); err != nil {
		return 0, err
	}
	return soonest(plan.RequeueAfter, runner.UntilAvailable(s.Pods, ds.Spec.MinReadySeconds, now)), failure
}

// soonest is the shorter of two waits, where zero is none.
func soonest(a, b time.Duration) time.Duration {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// snapshot gathers what the DaemonSet owns, adopting and releasing on the way, and records its template. It also
// returns the revisions of former templates, sorted, and the count of names that were taken.
func (c *Controller) snapshot(ctx context.Context, ds *appsv1.DaemonSet, now time.Time) (Snapshot, []*appsv1.ControllerRevision, *int32, error) {
	s := Snapshot{DaemonSet: ds, BackOff: func(node string) time.Duration { return c.backOff.remaining(placeOf(ds, node), now) }}
	selector, err := metav1.LabelSelectorAsSelector(ds.Spec.Selector)
	if err != nil {
		return s, nil, nil, fmt.Errorf("daemon set %s/%s: selector: %w", ds.Namespace, ds.Name, err)
	}
	revisions, err := c.revisions.Claim(ctx, ds, selector)
	if err != nil {
		return s, nil, nil, err
	}
	data, err := history.Data(&ds.Spec.Template)
	if err != nil {
		return s, nil, nil, fmt.Errorf("daemon set %s/%s: %w", ds.Namespace, ds.Name, err)
	}
	draft := history.Draft{Data: data, Named: func(collisions *int32) *appsv1.ControllerRevision { return newRevision(ds, collisions) }}
	current, collisions, err := c.revisions.Record(ctx, ds, selector, revisions, draft, ds.Status.CollisionCount)
	if err != nil {
		return s, nil, nil, err
	}
	s.Hash = current.Labels[appsv1.ControllerRevisionHashLabelKey]
	var past []*appsv1.ControllerRevision
	for _, revision := range revisions {
		if revision.Name != current.Name {
			past = append(past, revision)
		}
	}

	if s.Nodes, err = c.nodes.List(labels.Everything()); err != nil {
		return s, nil, nil, fmt.Errorf("list nodes: %w", err)
	}
	candidates, err := c.pods.Candidates(ds)
	if err != nil {
		return s, nil, nil, err
	}
	s.Pods, err = c.pods.Claim(ctx, ds, selector, candidates)
	return s, past, collisions, err
}

// newRevision is the record of a DaemonSet's template, named by the template's hash.
func newRevision(ds *appsv1.DaemonSet, collisions *int32) *appsv1.ControllerRevision {
	hash := controller.ComputeHash(&ds.Spec.Template, collisions)
	return &appsv1.ControllerRevision{ObjectMeta: metav1.ObjectMeta{
		Name:            ds.Name + "-" + hash,
		Labels:          labelsutil.CloneAndAddLabel(ds.Spec.Template.Labels, appsv1.ControllerRevisionHashLabelKey, hash),
		Annotations:     ds.Annotations,
		OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(ds, Kind)},
	}}
}

// live names the revisions whose pods are still there.
func live(revisions []*appsv1.ControllerRevision, pods []*corev1.Pod) sets.Set[string] {
	hashes := sets.New[string]()
	for _, pod := range pods {
		hashes.Insert(pod.Labels[appsv1.ControllerRevisionHashLabelKey])
	}
	names := sets.New[string]()
	for _, revision := range revisions {
		if hashes.Has(revision.Labels[appsv1.ControllerRevisionHashLabelKey]) {
			names.Insert(revision.Name)
		}
	}
	return names
}

func placeOf(ds *appsv1.DaemonSet, node string) place {
	return place{daemonSet: ds.UID, generation: ds.Generation, node: node}
}

func (c *Controller) apply(ctx context.Context, s Snapshot, plan Plan, now time.Time) error {
	ds := s.DaemonSet
	for _, pod := range plan.Delete {
		node, err := util.GetTargetNodeName(pod)
		if err != nil {
			continue // the plan has none without
		}
		switch pod.Status.Phase {
		case corev1.PodFailed:
			c.backOff.replaced(placeOf(ds, node), now)
			c.recorder.Eventf(ds, corev1.EventTypeWarning, "FailedDaemonPod", "Found failed daemon pod %s/%s on node %s, will try to kill it", pod.Namespace, pod.Name, node)
		case corev1.PodSucceeded:
			c.recorder.Eventf(ds, corev1.EventTypeNormal, "SucceededDaemonPod", "Found succeeded daemon pod %s/%s on node %s, will try to delete it", pod.Namespace, pod.Name, node)
		}
	}
	ref := metav1.NewControllerRef(ds, Kind)
	// An annotation that does not parse only means a label less.
	generation, _ := util.GetTemplateGeneration(ds)
	template := util.CreatePodTemplate(ds.Spec.Template, generation, s.Hash)
	return c.pods.Act(ctx, ds, len(plan.Create), func(i int) error {
		onNode := template
		onNode.Spec.Affinity = util.ReplaceDaemonSetPodNodeNameNodeAffinity(template.Spec.Affinity.DeepCopy(), plan.Create[i])
		return c.pods.Control.CreatePods(ctx, ds.Namespace, &onNode, ds, ref)
	}, plan.Delete, func(pod *corev1.Pod) error {
		return c.pods.Control.DeletePod(ctx, pod.Namespace, pod.Name, ds)
	})
}

func (c *Controller) writeStatus(ctx context.Context, ds *appsv1.DaemonSet, status appsv1.DaemonSetStatus) error {
	if apiequality.Semantic.DeepEqual(ds.Status, status) {
		return nil
	}
	return runner.WriteStatus(ctx, c.Client.AppsV1().DaemonSets(ds.Namespace), ds, func(to *appsv1.DaemonSet) *appsv1.DaemonSet {
		changed := *to
		changed.Status = status
		// Conditions are for others to write.
		changed.Status.Conditions = to.Status.Conditions
		return &changed
	})
}
