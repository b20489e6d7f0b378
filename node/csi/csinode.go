// SPDX-License-Identifier: Apache-2.0

package csi

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/util/retry"
)

// annotationNodeIDs is where external attachers look up what a driver calls a node.
const annotationNodeIDs = "csi.volume.kubernetes.io/nodeid"

// maxName bounds the name of a driver, as the API does.
const maxName = 63

func checkName(name string) error {
	if len(name) > maxName {
		return fmt.Errorf("the driver's name has more than %d characters", maxName)
	}
	if errs := validation.IsDNS1123Subdomain(strings.ToLower(name)); len(errs) > 0 {
		return fmt.Errorf("%q is no name of a driver: %s", name, strings.Join(errs, "; "))
	}
	return nil
}

// show puts a driver into the node's CSINode, and what goes with it onto its Node.
func (d *Drivers) show(ctx context.Context, name string, info *spec.NodeGetInfoResponse) error {
	entry := storagev1.CSINodeDriver{Name: name, NodeID: info.NodeId}
	topology := map[string]string{}
	if t := info.AccessibleTopology; t != nil {
		topology = t.Segments
		entry.TopologyKeys = slices.Sorted(maps.Keys(t.Segments))
	}
	if n := info.MaxVolumesPerNode; n > 0 {
		count := int32(min(n, math.MaxInt32))
		entry.Allocatable = &storagev1.VolumeNodeResources{Count: &count}
	}
	d.shown.Lock()
	defer d.shown.Unlock()
	node, err := d.onNode(ctx, func(node *corev1.Node) error {
		for key, value := range topology {
			if has, ok := node.Labels[key]; ok && has != value {
				return fmt.Errorf("detected topology value collision: driver reported %q:%q but existing label is %q:%q", key, value, key, has)
			}
			metav1.SetMetaDataLabel(&node.ObjectMeta, key, value)
		}
		return setNodeID(node, name, info.NodeId)
	})
	if err != nil {
		return err
	}
	// The API lets no entry change, but go and come back as another.
	if err := d.onCSINode(ctx, nil, func(list []storagev1.CSINodeDriver) []storagev1.CSINodeDriver {
		return slices.DeleteFunc(list, func(e storagev1.CSINodeDriver) bool { return e.Name == name && !equality.Semantic.DeepEqual(e, entry) })
	}); err != nil {
		return err
	}
	return d.onCSINode(ctx, node, func(list []storagev1.CSINodeDriver) []storagev1.CSINodeDriver {
		return append(without(list, name), entry)
	})
}

// hide takes a driver out of them again. Labels stay: pods may have been placed by them.
func (d *Drivers) hide(ctx context.Context, name string) error {
	d.shown.Lock()
	defer d.shown.Unlock()
	if err := d.onCSINode(ctx, nil, func(list []storagev1.CSINodeDriver) []storagev1.CSINodeDriver { return without(list, name) }); err != nil {
		return err
	}
	_, err := d.onNode(ctx, func(node *corev1.Node) error { return setNodeID(node, name, "") })
	return err
}

func without(list []storagev1.CSINodeDriver, name string) []storagev1.CSINodeDriver {
	return slices.DeleteFunc(list, func(e storagev1.CSINodeDriver) bool { return e.Name == name })
}

// setNodeID notes what a driver calls the node; empty forgets it.
func setNodeID(node *corev1.Node, driver, id string) error {
	ids := map[string]string{}
	if text := node.Annotations[annotationNodeIDs]; text != "" {
		if err := json.Unmarshal([]byte(text), &ids); err != nil {
			return fmt.Errorf("annotation %s of node %s: %w", annotationNodeIDs, node.Name, err)
		}
	}
	ids[driver] = id
	if id == "" {
		delete(ids, driver)
	}
	if len(ids) == 0 {
		delete(node.Annotations, annotationNodeIDs)
		return nil
	}
	text, err := json.Marshal(ids)
	if err != nil {
		return err
	}
	metav1.SetMetaDataAnnotation(&node.ObjectMeta, annotationNodeIDs, string(text))
	return nil
}

// onNode changes labels and annotations of the node's Node.
func (d *Drivers) onNode(ctx context.Context, change func(*corev1.Node) error) (node *corev1.Node, err error) {
	nodes := d.cfg.Client.CoreV1().Nodes()
	err = retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		was, err := nodes.Get(ctx, d.cfg.NodeName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		node = was.DeepCopy()
		if err := change(node); err != nil {
			return err
		}
		if maps.Equal(was.Labels, node.Labels) && maps.Equal(was.Annotations, node.Annotations) {
			return nil
		}
		node, err = nodes.Update(ctx, node, metav1.UpdateOptions{})
		return err
	})
	return node, err
}

// onCSINode changes the drivers of the node's CSINode. It is made for the node, if one is given; else one that is not
// there has no drivers.
func (d *Drivers) onCSINode(ctx context.Context, node *corev1.Node, change func([]storagev1.CSINodeDriver) []storagev1.CSINodeDriver) error {
	csinodes := d.cfg.Client.StorageV1().CSINodes()
	return retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		was, err := csinodes.Get(ctx, d.cfg.NodeName, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err) && node == nil:
			return nil
		case apierrors.IsNotFound(err):
			_, err = csinodes.Create(ctx, &storagev1.CSINode{
				ObjectMeta: metav1.ObjectMeta{Name: node.Name, OwnerReferences: []metav1.OwnerReference{
					{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID},
				}},
				Spec: storagev1.CSINodeSpec{Drivers: change(nil)},
			}, metav1.CreateOptions{})
			if apierrors.IsAlreadyExists(err) {
				err = apierrors.NewConflict(storagev1.Resource("csinodes"), node.Name, err)
			}
			return err
		case err != nil:
			return err
		}
		out := was.DeepCopy()
		out.Spec.Drivers = change(out.Spec.Drivers)
		if equality.Semantic.DeepEqual(was.Spec, out.Spec) {
			return nil
		}
		_, err = csinodes.Update(ctx, out, metav1.UpdateOptions{})
		return err
	})
}
