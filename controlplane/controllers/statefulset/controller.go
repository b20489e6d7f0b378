// SPDX-License-Identifier: Apache-2.0

package statefulset

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/sets"
	appslisters "k8s.io/client-go/listers/apps/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	upstream "k8s.io/kubernetes/pkg/controller/history"

	"skep.io/skep/controlplane/controllers/history"
	"skep.io/skep/controlplane/controllers/runner"
)

const workers = 5

// Controller keeps StatefulSets' pods and claims.
type Controller struct {
	runner.Deps
	queue     *runner.Queue
	pods      runner.Pods[*appsv1.StatefulSet]
	revisions *history.Revisions[*appsv1.StatefulSet]
	recorder  record.EventRecorder
	sets      appslisters.StatefulSetLister
	claims    corelisters.PersistentVolumeClaimLister
	synced    []cache.InformerSynced
}

// New registers the controller with the shared informers.
func New(deps runner.Deps) (*Controller, error) {
	stateful, core := deps.Informers.Apps().V1().StatefulSets(), deps.Informers.Core().V1()
	c := &Controller{
		Deps:     deps,
		recorder: deps.Recorder("statefulset-controller"),
		sets:     stateful.Lister(),
		claims:   core.PersistentVolumeClaims().Lister(),
	}
	c.queue = runner.New("statefulset", workers, deps, c.sync)
	var err error
	if c.pods, err = runner.NewPods[*appsv1.StatefulSet](deps, Kind, c.queue, c.recorder); err != nil {
		return nil, err
	}
	c.pods.Cached = func(namespace, name string) (*appsv1.StatefulSet, error) {
		return c.sets.StatefulSets(namespace).Get(name)
	}
	c.pods.Fresh = func(ctx context.Context, namespace, name string, opts metav1.GetOptions) (*appsv1.StatefulSet, error) {
		return deps.Client.AppsV1().StatefulSets(namespace).Get(ctx, name, opts)
	}
	c.pods.Matching = c.sets.GetPodStatefulSets
	c.pods.Member = func(set *appsv1.StatefulSet, pod *corev1.Pod) bool {
		_, ok := Ordinal(set, pod)
		return ok
	}

	setsSynced, err := runner.Watch(stateful.Informer(), c.pods.Owners(c.forget))
	if err != nil {
		return nil, err
	}
	podsSynced, err := runner.Watch(core.Pods().Informer(), c.pods.Handlers())
	if err != nil {
		return nil, err
	}
	claimsSynced, err := runner.Watch(core.PersistentVolumeClaims().Informer(), runner.Handlers[*corev1.PersistentVolumeClaim]{
		Delete: c.claimGone,
	})
	if err != nil {
		return nil, err
	}
	revisions, revisionsSynced, err := history.Watch(deps, c.pods)
	if err != nil {
		return nil, err
	}
	c.revisions = revisions
	c.synced = []cache.InformerSynced{setsSynced, podsSynced, claimsSynced, revisionsSynced}
	return c, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error { return c.queue.Run(ctx, c.synced...) }

func (c *Controller) forget(set *appsv1.StatefulSet) {
	c.pods.Forget(runner.Key(set))
	c.queue.Add(runner.Key(set))
}

// claimGone wakes the sets one of whose pods may have waited for a claim to go.
func (c *Controller) claimGone(claim *corev1.PersistentVolumeClaim) {
	all, err := c.sets.StatefulSets(claim.Namespace).List(labels.Everything())
	if err != nil {
		return // a lister that reads memory has no other error
	}
	for _, set := range all {
		if slices.ContainsFunc(set.Spec.VolumeClaimTemplates, func(template corev1.PersistentVolumeClaim) bool {
			digits, ok := strings.CutPrefix(claim.Name, template.Name+"-"+set.Name+"-")
			_, err := strconv.Atoi(digits)
			return ok && err == nil
		}) {
			c.queue.Add(runner.Key(set))
		}
	}
}

func (c *Controller) sync(ctx context.Context, key string) (time.Duration, error) {
	set, found, err := runner.Find(key, c.pods.Cached)
	if err != nil {
		return 0, err
	}
	if !found {
		c.pods.Forget(key)
		return 0, nil
	}
	settled := c.pods.Settled(key)
	s, revisions, collisions, err := c.snapshot(ctx, set)
	if err != nil {
		return 0, err
	}

	now := c.Clock.Now()
	var failure error
	if settled {
		if failure = c.apply(ctx, s, Compute(s, now)); failure == nil {
			failure = c.revisions.Delete(ctx, history.Expired(revisions, live(s), set.Spec.RevisionHistoryLimit))
		}
	}
	if err := c.writeStatus(ctx, set, Status(s, collisions, now)); err != nil {
		return 0, err
	}
	return runner.UntilAvailable(s.Pods, set.Spec.MinReadySeconds, now), failure
}

// snapshot gathers what the set owns, adopting and releasing on the way, and records its template. It also returns
// the revisions that were recorded before, sorted, and the count of names that were taken.
func (c *Controller) snapshot(ctx context.Context, set *appsv1.StatefulSet) (Snapshot, []*appsv1.ControllerRevision, *int32, error) {
	s := Snapshot{Set: set, Claim: func(name string) *corev1.PersistentVolumeClaim {
		claim, err := c.claims.PersistentVolumeClaims(set.Namespace).Get(name)
		if err != nil {
			return nil // a lister that reads memory has no other error than that there is none
		}
		return claim
	}}
	selector, err := metav1.LabelSelectorAsSelector(set.Spec.Selector)
	if err != nil {
		return s, nil, nil, fmt.Errorf("stateful set %s/%s: selector: %w", set.Namespace, set.Name, err)
	}
	revisions, err := c.revisions.Claim(ctx, set, selector)
	if err != nil {
		return s, nil, nil, err
	}
	data, err := history.Data(&set.Spec.Template)
	if err != nil {
		return s, nil, nil, fmt.Errorf("stateful set %s/%s: %w", set.Namespace, set.Name, err)
	}
	collisions := set.Status.CollisionCount
	if collisions == nil {
		collisions = new(int32) // the field is never empty
	}
	draft := history.Draft{Data: data, Named: func(collisions *int32) *appsv1.ControllerRevision { return newRevision(set, data, collisions) }}
	update, collisions, err := c.revisions.Record(ctx, set, selector, revisions, draft, collisions)
	if err != nil {
		return s, nil, nil, err
	}
	s.Update = Revision{update.Name, &set.Spec.Template}
	s.Current = s.Update
	for _, revision := range revisions {
		if revision.Name != set.Status.CurrentRevision || revision.Name == update.Name {
			continue
		}
		template, err := history.Template(revision)
		if err != nil {
			return s, nil, nil, err
		}
		s.Current = Revision{revision.Name, template}
	}
	candidates, err := c.pods.Candidates(set)
	if err != nil {
		return s, nil, nil, err
	}
	s.Pods, err = c.pods.Claim(ctx, set, selector, candidates)
	return s, revisions, collisions, err
}

// newRevision is the record of a set's template, named by the record's hash.
func newRevision(set *appsv1.StatefulSet, data []byte, collisions *int32) *appsv1.ControllerRevision {
	// It never returns an error.
	revision, _ := upstream.NewControllerRevision(set, Kind, set.Spec.Template.Labels, runtime.RawExtension{Raw: data}, 0, collisions)
	revision.Annotations = set.Annotations
	return revision
}

// live names the revisions that pods have or may get.
func live(s Snapshot) sets.Set[string] {
	names := sets.New(s.Current.Name, s.Update.Name)
	for _, pod := range s.Pods {
		names.Insert(revisionOf(pod))
	}
	return names
}

func (c *Controller) writeStatus(ctx context.Context, set *appsv1.StatefulSet, status appsv1.StatefulSetStatus) error {
	if apiequality.Semantic.DeepEqual(set.Status, status) {
		return nil
	}
	return runner.WriteStatus(ctx, c.Client.AppsV1().StatefulSets(set.Namespace), set, func(to *appsv1.StatefulSet) *appsv1.StatefulSet {
		changed := *to
		changed.Status = status
		changed.Status.Conditions = to.Status.Conditions
		return &changed
	})
}
