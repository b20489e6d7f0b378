// SPDX-License-Identifier: Apache-2.0

package localpath

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	storagelisters "k8s.io/client-go/listers/storage/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	nodeutil "k8s.io/component-helpers/node/util"
	"k8s.io/component-helpers/storage/volume"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/controllers/runner"
)

// workers is how many nodes may be waited for at once.
const workers = 8

// callTimeout bounds one request to a node; removing a large tree takes a while, and goes on if it is cut off.
const callTimeout = 30 * time.Second

// Directories are made and removed on nodes, by name. Making one that is there, or removing one that is not, is no
// error.
type Directories interface {
	Make(ctx context.Context, node, name string) error
	Remove(ctx context.Context, node, name string) error
}

// NodeDirectories asks the node's agent, through the API server.
func NodeDirectories(client kubernetes.Interface) Directories { return nodeDirectories{client} }

type nodeDirectories struct{ client kubernetes.Interface }

func (d nodeDirectories) Make(ctx context.Context, node, name string) error {
	return d.client.CoreV1().RESTClient().Put().Resource("nodes").Name(node).SubResource("proxy").Suffix("localVolumes", name).Timeout(callTimeout).Do(ctx).Error()
}

func (d nodeDirectories) Remove(ctx context.Context, node, name string) error {
	return d.client.CoreV1().RESTClient().Delete().Resource("nodes").Name(node).SubResource("proxy").Suffix("localVolumes", name).Timeout(callTimeout).Do(ctx).Error()
}

// Controller provisions and deletes.
type Controller struct {
	runner.Deps
	dirs     Directories
	queue    *runner.Queue
	recorder record.EventRecorder
	claims   corelisters.PersistentVolumeClaimLister
	volumes  corelisters.PersistentVolumeLister
	nodes    corelisters.NodeLister
	classes  storagelisters.StorageClassLister
	synced   []cache.InformerSynced
}

// Keys of the queue are those of claims, which have a slash, and of volumes, which have none.

// New registers the controller with the shared informers.
func New(deps runner.Deps, dirs Directories) (*Controller, error) {
	core, classes := deps.Informers.Core().V1(), deps.Informers.Storage().V1().StorageClasses()
	c := &Controller{
		Deps: deps, dirs: dirs, recorder: deps.Recorder(api.LocalPathProvisioner),
		claims: core.PersistentVolumeClaims().Lister(), volumes: core.PersistentVolumes().Lister(), nodes: core.Nodes().Lister(), classes: classes.Lister(),
	}
	c.queue = runner.New("localpath", workers, deps, c.sync)
	onVolume := func(v *corev1.PersistentVolume) {
		c.queue.Add(v.Name)
		if ref := v.Spec.ClaimRef; ref != nil {
			c.queue.Add(ref.Namespace + "/" + ref.Name)
		}
	}
	wakeAll := func() {
		// Rare: what waits is found among all.
		claims, _ := c.claims.List(labels.Everything()) // reads memory: cannot fail
		for _, claim := range claims {
			if claim.Status.Phase == corev1.ClaimPending || slices.Contains(claim.Finalizers, Finalizer) {
				c.queue.Add(runner.Key(claim))
			}
		}
		volumes, _ := c.volumes.List(labels.Everything())
		for _, v := range volumes {
			if v.DeletionTimestamp != nil {
				c.queue.Add(v.Name)
			}
		}
	}
	for _, register := range []func() (cache.InformerSynced, error){
		func() (cache.InformerSynced, error) {
			return runner.Watch(core.PersistentVolumeClaims().Informer(), runner.Handlers[*corev1.PersistentVolumeClaim]{
				Add: func(claim *corev1.PersistentVolumeClaim) { c.queue.Add(runner.Key(claim)) }, Update: func(_, claim *corev1.PersistentVolumeClaim) { c.queue.Add(runner.Key(claim)) },
			})
		},
		func() (cache.InformerSynced, error) {
			return runner.Watch(core.PersistentVolumes().Informer(), runner.Handlers[*corev1.PersistentVolume]{
				Add: onVolume, Update: func(_, v *corev1.PersistentVolume) { onVolume(v) }, Delete: onVolume,
			})
		},
		func() (cache.InformerSynced, error) {
			return runner.Watch(core.Nodes().Informer(), runner.Handlers[*corev1.Node]{
				Add: func(*corev1.Node) { wakeAll() },
				Update: func(old, node *corev1.Node) {
					if old.Annotations[api.LocalPathAnnotation] != node.Annotations[api.LocalPathAnnotation] || !isReady(old) && isReady(node) {
						wakeAll()
					}
				},
			})
		},
		func() (cache.InformerSynced, error) {
			return runner.Watch(classes.Informer(), runner.Handlers[*storagev1.StorageClass]{Add: func(*storagev1.StorageClass) { wakeAll() }})
		},
	} {
		synced, err := register()
		if err != nil {
			return nil, err
		}
		c.synced = append(c.synced, synced)
	}
	return c, nil
}

func isReady(node *corev1.Node) bool {
	_, condition := nodeutil.GetNodeCondition(&node.Status, corev1.NodeReady)
	return condition != nil && condition.Status == corev1.ConditionTrue
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error { return c.queue.Run(ctx, c.synced...) }

func (c *Controller) sync(ctx context.Context, key string) (time.Duration, error) {
	if !strings.Contains(key, "/") {
		return 0, c.syncVolume(ctx, key)
	}
	claim, found, err := runner.Find(key, func(namespace, name string) (*corev1.PersistentVolumeClaim, error) {
		return c.claims.PersistentVolumeClaims(namespace).Get(name)
	})
	if err != nil || !found {
		return 0, err
	}
	return 0, c.syncClaim(ctx, claim)
}

// cached is an object of a cache, or nil.
func cached[T any](get func(name string) (*T, error), name string) (*T, error) {
	object, err := get(name)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	return object, err
}

func (c *Controller) syncClaim(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	made, err := cached(c.volumes.Get, VolumeName(claim))
	if err != nil {
		return err
	}
	class, err := cached(c.classes.Get, volume.GetPersistentVolumeClaimClass(claim))
	if err != nil {
		return err
	}
	node, err := cached(c.nodes.Get, claim.Annotations[volume.AnnSelectedNode])
	if err != nil {
		return err
	}
	client := c.Client.CoreV1().PersistentVolumeClaims(claim.Namespace)
	changed := claim.DeepCopy()
	switch a := PlanClaim(claim, made, class, node); a.Step {
	case Protect:
		changed.Finalizers = append(changed.Finalizers, Finalizer)
		_, err = client.Update(ctx, changed, metav1.UpdateOptions{})
	case Provision:
		err = c.provision(ctx, claim, a)
	case Reschedule:
		c.recorder.Event(claim, corev1.EventTypeWarning, "ProvisioningFailed", a.Message)
		delete(changed.Annotations, volume.AnnSelectedNode)
		_, err = client.Update(ctx, changed, metav1.UpdateOptions{})
	case Refuse:
		c.recorder.Event(claim, corev1.EventTypeWarning, "ProvisioningFailed", a.Message)
	case Abandon:
		err = c.abandon(ctx, claim, a)
	case Release:
		err = c.release(ctx, claim)
	case Grow:
		bigger := made.DeepCopy()
		bigger.Spec.Capacity[corev1.ResourceStorage] = claim.Spec.Resources.Requests[corev1.ResourceStorage]
		_, err = c.Client.CoreV1().PersistentVolumes().Update(ctx, bigger, metav1.UpdateOptions{})
	case Grown:
		if changed.Status.Capacity == nil {
			changed.Status.Capacity = corev1.ResourceList{}
		}
		changed.Status.Capacity[corev1.ResourceStorage] = claim.Spec.Resources.Requests[corev1.ResourceStorage]
		if _, err = client.UpdateStatus(ctx, changed, metav1.UpdateOptions{}); err == nil {
			c.recorder.Event(claim, corev1.EventTypeNormal, "VolumeResizeSuccessful", "Resize volume succeeded")
		}
	}
	return err
}

func (c *Controller) provision(ctx context.Context, claim *corev1.PersistentVolumeClaim, a Action) error {
	c.recorder.Eventf(claim, corev1.EventTypeNormal, "Provisioning", "External provisioner is provisioning volume for claim %q", runner.Key(claim))
	if err := c.dirs.Make(ctx, a.Node, a.Dir); err != nil {
		err = fmt.Errorf("make directory %s on node %s: %w", a.Dir, a.Node, err)
		c.recorder.Eventf(claim, corev1.EventTypeWarning, "ProvisioningFailed", "failed to provision volume with StorageClass %q: %v", a.Volume.Spec.StorageClassName, err)
		return err
	}
	if _, err := c.Client.CoreV1().PersistentVolumes().Create(ctx, a.Volume, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create volume %s: %w", a.Volume.Name, err)
	}
	c.recorder.Eventf(claim, corev1.EventTypeNormal, "ProvisioningSucceeded", "Successfully provisioned volume %s", a.Volume.Name)
	return nil
}

// abandon gives up a claim that is going. Only the API server can tell that there is no volume which names the directory.
func (c *Controller) abandon(ctx context.Context, claim *corev1.PersistentVolumeClaim, a Action) error {
	_, err := c.Client.CoreV1().PersistentVolumes().Get(ctx, VolumeName(claim), metav1.GetOptions{})
	if err == nil {
		return c.release(ctx, claim)
	}
	if !apierrors.IsNotFound(err) {
		return fmt.Errorf("read volume %s: %w", VolumeName(claim), err)
	}
	if a.Node != "" {
		if err := c.dirs.Remove(ctx, a.Node, a.Dir); err != nil {
			return fmt.Errorf("remove directory %s on node %s: %w", a.Dir, a.Node, err)
		}
	}
	return c.release(ctx, claim)
}

func (c *Controller) release(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	changed := claim.DeepCopy()
	changed.Finalizers = slices.DeleteFunc(changed.Finalizers, func(f string) bool { return f == Finalizer })
	_, err := c.Client.CoreV1().PersistentVolumeClaims(claim.Namespace).Update(ctx, changed, metav1.UpdateOptions{})
	return err
}

func (c *Controller) syncVolume(ctx context.Context, name string) error {
	v, err := cached(c.volumes.Get, name)
	if err != nil || v == nil {
		return err
	}
	node, err := cached(c.nodes.Get, v.Annotations[volume.AnnSelectedNode])
	if err != nil {
		return err
	}
	client := c.Client.CoreV1().PersistentVolumes()
	switch a := PlanVolume(v, node != nil); a.Step {
	case Delete:
		err = client.Delete(ctx, v.Name, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(v.UID))})
	case Unknown:
		c.recorder.Event(v, corev1.EventTypeWarning, "VolumeFailedDelete", a.Message)
		return nil
	case Remove:
		if err = c.dirs.Remove(ctx, a.Node, a.Dir); err != nil {
			err = fmt.Errorf("remove directory %s on node %s: %w", a.Dir, a.Node, err)
			c.recorder.Event(v, corev1.EventTypeWarning, "VolumeFailedDelete", err.Error())
			return err
		}
		err = c.forget(ctx, v)
	case Keep:
		err = c.forget(ctx, v)
	}
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

func (c *Controller) forget(ctx context.Context, v *corev1.PersistentVolume) error {
	changed := v.DeepCopy()
	changed.Finalizers = slices.DeleteFunc(changed.Finalizers, func(f string) bool { return f == Finalizer })
	_, err := c.Client.CoreV1().PersistentVolumes().Update(ctx, changed, metav1.UpdateOptions{})
	return err
}
