// SPDX-License-Identifier: Apache-2.0

// Package deployment rolls a Deployment's pod template out over ReplicaSets, one for each template,
// exactly as Kubernetes does: surge and unavailability bounds, proportional scaling, pause, revisions.
//
// Compute is the whole decision: from a Deployment and the ReplicaSets it owns to what should be written.
// The controller only gathers and writes.
package deployment

import (
	"context"
	"fmt"
	"maps"
	"sort"
	"strconv"
	"time"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/kubernetes/pkg/controller"
	"k8s.io/kubernetes/pkg/controller/deployment/util"
	labelsutil "k8s.io/kubernetes/pkg/util/labels"
)

// Kind is how ReplicaSets name their owner.
var Kind = appsv1.SchemeGroupVersion.WithKind("Deployment")

// historyLength bounds the annotation that lists a ReplicaSet's former revisions, in characters.
const historyLength = 2000

// Snapshot is what a decision is made from. Nothing in it is changed.
type Snapshot struct {
	Deployment *appsv1.Deployment
	// ReplicaSets are those that the Deployment controls.
	ReplicaSets []*appsv1.ReplicaSet
	// Pods of these ReplicaSets, by the ReplicaSet's UID. Only the Recreate strategy reads them.
	Pods map[types.UID][]*corev1.Pod
	// TerminatingReplicas says that the API server stores status.terminatingReplicas.
	TerminatingReplicas bool
}

// Plan is what should be written, in this order. A zero Plan means that nothing should.
type Plan struct {
	// Create is the ReplicaSet of a new template. Its name depends only on template and collision count.
	Create *appsv1.ReplicaSet
	// Update are ReplicaSets with a new size, annotations or minReadySeconds.
	Update []Update
	// Delete are ReplicaSets beyond the revision history limit.
	Delete []*appsv1.ReplicaSet
	// Status, if not nil, is the Deployment with its new status and revision annotation.
	Status *appsv1.Deployment
	// RequeueAfter is when a rollout without progress must be judged again; zero if never.
	RequeueAfter time.Duration
}

// Update is one ReplicaSet's change. If From and To differ it is a scaling.
type Update struct {
	ReplicaSet *appsv1.ReplicaSet
	From, To   int32
}

// Compute decides what to do next about a Deployment.
func Compute(s Snapshot, now time.Time) Plan {
	p := newPlanner(s, now)
	d := p.d
	if d.DeletionTimestamp != nil {
		p.findNew(false)
		p.status(p.counts())
		return p.plan()
	}

	p.notePause()
	switch {
	case d.Spec.Paused:
		p.findNew(false)
		p.scale()
		p.cleanUp()
		p.status(p.counts())
	case p.findNew(false) && p.isScaling():
		p.scale()
		p.status(p.counts())
	case d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType:
		p.recreate()
		p.status(p.progress())
	default:
		p.rollingUpdate()
		p.status(p.progress())
	}
	return p.plan()
}

// planner holds working copies: d with the conditions noted so far, and the ReplicaSets with their
// planned sizes. Pod templates are shared with the cache and not written.
type planner struct {
	s   Snapshot
	now metav1.Time
	d   *appsv1.Deployment

	all    []*appsv1.ReplicaSet // oldest first, without created
	newRS  *appsv1.ReplicaSet   // has the Deployment's template; nil if there is none yet
	old    []*appsv1.ReplicaSet
	before map[types.UID]*appsv1.ReplicaSet

	created     *appsv1.ReplicaSet
	toDelete    []*appsv1.ReplicaSet
	newStatus   *appsv1.DeploymentStatus
	nextJudging time.Duration
}

func newPlanner(s Snapshot, now time.Time) *planner {
	p := &planner{s: s, now: metav1.NewTime(now), before: make(map[types.UID]*appsv1.ReplicaSet, len(s.ReplicaSets))}
	d := *s.Deployment
	d.Annotations = maps.Clone(d.Annotations)
	d.Status = *s.Deployment.Status.DeepCopy()
	p.d = &d
	for _, rs := range s.ReplicaSets {
		p.before[rs.UID] = rs
		p.all = append(p.all, workingCopy(rs))
	}
	sort.Sort(controller.ReplicaSetsByCreationTimestamp(p.all))
	return p
}

func workingCopy(rs *appsv1.ReplicaSet) *appsv1.ReplicaSet {
	c := *rs
	c.Annotations = maps.Clone(rs.Annotations)
	replicas := *rs.Spec.Replicas
	c.Spec.Replicas = &replicas
	return &c
}

func (p *planner) plan() Plan {
	plan := Plan{Create: p.created, Delete: p.toDelete, RequeueAfter: p.nextJudging}
	for _, rs := range p.all {
		was := p.before[rs.UID]
		if *was.Spec.Replicas != *rs.Spec.Replicas || was.Spec.MinReadySeconds != rs.Spec.MinReadySeconds ||
			!maps.Equal(was.Annotations, rs.Annotations) {
			plan.Update = append(plan.Update, Update{ReplicaSet: rs, From: *was.Spec.Replicas, To: *rs.Spec.Replicas})
		}
	}
	if p.newStatus != nil {
		p.d.Status = *p.newStatus
	}
	if !apiequality.Semantic.DeepEqual(p.d.Status, p.s.Deployment.Status) || !maps.Equal(p.d.Annotations, p.s.Deployment.Annotations) {
		plan.Status = p.d
	}
	return plan
}

// findNew splits the ReplicaSets into new and old, gives the new one its revision, and creates it if
// asked to. It always returns true, so that it can stand in a condition.
func (p *planner) findNew(create bool) bool {
	p.newRS = util.FindNewReplicaSet(p.d, p.all)
	p.old = p.old[:0]
	for _, rs := range p.all {
		if rs != p.newRS {
			p.old = append(p.old, rs)
		}
	}
	revision := strconv.FormatInt(util.MaxRevision(logr.Discard(), p.old)+1, 10)
	switch {
	case p.newRS != nil:
		util.SetNewReplicaSetAnnotations(context.Background(), p.d, p.newRS, revision, true, historyLength)
		p.newRS.Spec.MinReadySeconds = p.d.Spec.MinReadySeconds
		util.SetDeploymentRevision(p.d, p.newRS.Annotations[util.RevisionAnnotation])
		if util.HasProgressDeadline(p.d) && condition(p.d.Status.Conditions, appsv1.DeploymentProgressing) == nil {
			p.note(appsv1.DeploymentProgressing, corev1.ConditionTrue, util.FoundNewRSReason,
				fmt.Sprintf("Found new replica set %q", p.newRS.Name))
		}
	case create:
		p.create(revision)
	}
	return true
}

func (p *planner) create(revision string) {
	rs := NewReplicaSet(p.d)
	size, err := util.NewRSNewReplicas(p.d, append(p.old[:len(p.old):len(p.old)], rs), rs)
	if err != nil {
		// Validation admits only whole numbers and percentages; without a usable one nothing may grow.
		size = 0
	}
	rs.Spec.Replicas = &size
	util.SetNewReplicaSetAnnotations(context.Background(), p.d, rs, revision, false, historyLength)
	p.created, p.newRS = rs, rs
	util.SetDeploymentRevision(p.d, revision)
	if util.HasProgressDeadline(p.d) {
		p.note(appsv1.DeploymentProgressing, corev1.ConditionTrue, util.NewReplicaSetReason,
			fmt.Sprintf("Created new replica set %q", rs.Name))
	}
}

// NewReplicaSet is the ReplicaSet, still of size zero, for a Deployment's current template. The template's
// hash is in its name, its labels, its selector and its pods' labels.
func NewReplicaSet(d *appsv1.Deployment) *appsv1.ReplicaSet {
	template := *d.Spec.Template.DeepCopy()
	hash := controller.ComputeHash(&template, d.Status.CollisionCount)
	template.Labels = labelsutil.CloneAndAddLabel(d.Spec.Template.Labels, appsv1.DefaultDeploymentUniqueLabelKey, hash)
	name := d.Name
	if longest := validation.DNS1123SubdomainMaxLength - len(hash) - 1; len(name) > longest {
		name = name[:longest]
	}
	return &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{
			Name:            name + "-" + hash,
			Namespace:       d.Namespace,
			Labels:          template.Labels,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(d, Kind)},
		},
		Spec: appsv1.ReplicaSetSpec{
			Replicas:        new(int32),
			MinReadySeconds: d.Spec.MinReadySeconds,
			Selector:        labelsutil.CloneSelectorAndAddLabel(d.Spec.Selector, appsv1.DefaultDeploymentUniqueLabelKey, hash),
			Template:        template,
		},
	}
}

// IsOurs tells whether a ReplicaSet that holds the name of a Deployment's new one is just that, seen late,
// rather than another template whose hash collides.
func IsOurs(d *appsv1.Deployment, rs *appsv1.ReplicaSet) bool {
	return metav1.IsControlledBy(rs, d) && util.EqualIgnoreHash(&d.Spec.Template, &rs.Spec.Template)
}

// AfterCollision is the Deployment with a higher collision count, which gives its template another hash.
func AfterCollision(d *appsv1.Deployment) *appsv1.Deployment {
	c := d.DeepCopy()
	if c.Status.CollisionCount == nil {
		c.Status.CollisionCount = new(int32)
	}
	*c.Status.CollisionCount++
	return c
}

// AfterFailedCreate is the Deployment with the condition that its ReplicaSet could not be created, or nil if
// its status need not change.
func AfterFailedCreate(d *appsv1.Deployment, message string, now time.Time) *appsv1.Deployment {
	if !util.HasProgressDeadline(d) {
		return nil
	}
	c := d.DeepCopy()
	setCondition(&c.Status.Conditions, newCondition(appsv1.DeploymentProgressing, corev1.ConditionFalse,
		util.FailedRSCreateReason, message, metav1.NewTime(now)))
	if apiequality.Semantic.DeepEqual(c.Status, d.Status) {
		return nil
	}
	return c
}
