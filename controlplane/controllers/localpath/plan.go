// SPDX-License-Identifier: Apache-2.0

// Package localpath makes volumes of the default StorageClass: a directory on the node that the scheduler has chosen
// for the first pod that uses the claim. The directory is made and removed by that node's agent, which is asked through
// the API server.
//
// Nothing is lost or left behind if it stops at any step. A claim gets a finalizer before its directory is made, and
// loses it once there is a PersistentVolume that names the directory; the volume has one until its directory is gone.
package localpath

import (
	"fmt"
	"path"
	"slices"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/storage/volume"

	"skep.io/skep/api"
)

// Finalizer keeps claims and volumes until their directories are taken care of.
const Finalizer = "skep.io/local-path"

// nameLimit is how long a file's name may be (NAME_MAX).
const nameLimit = 255

// Step is what to do next. Every step can be done twice.
type Step int

// The steps for claims, then those for volumes.
const (
	Nothing    Step = iota
	Protect         // give the claim the finalizer
	Provision       // make the directory, then the volume
	Reschedule      // take the node off the claim: it cannot be there
	Refuse          // tell that the claim cannot be served
	Release         // take the finalizer off the claim: there is a volume, which now knows of the directory
	Abandon         // remove the directory, unless there is a volume after all, and release
	Grow            // the claim asks for more than the volume says it has
	Grown           // the volume has what the claim asks for; it should say so

	Delete  // delete the volume
	Remove  // remove the directory, and then the finalizer
	Keep    // remove the finalizer only
	Unknown // the node of the directory is gone
)

// Action is a step with what it needs. Message is for an event.
type Action struct {
	Step    Step
	Node    string // whose directory
	Dir     string // its name
	Volume  *corev1.PersistentVolume
	Message string
}

// VolumeName is the name of a claim's volume, as every provisioner names them.
func VolumeName(claim *corev1.PersistentVolumeClaim) string { return "pvc-" + string(claim.UID) }

// DirName is the directory of a claim's volume, in words for the people who look there.
func DirName(claim *corev1.PersistentVolumeClaim) string {
	name := VolumeName(claim) + "_" + claim.Namespace + "_" + claim.Name
	return name[:min(len(name), nameLimit)]
}

// PlanClaim decides about a claim. made is the volume of its VolumeName, class its class, and node the one that the
// scheduler has chosen; each may be nil.
func PlanClaim(claim *corev1.PersistentVolumeClaim, made *corev1.PersistentVolume, class *storagev1.StorageClass, node *corev1.Node) Action {
	protected := slices.Contains(claim.Finalizers, Finalizer)
	selected := claim.Annotations[volume.AnnSelectedNode]
	a := Action{Node: selected, Dir: DirName(claim)}
	switch {
	case made != nil || claim.Spec.VolumeName != "":
		switch {
		case protected:
			a.Step = Release
		case made != nil && claim.Status.Phase == corev1.ClaimBound && claim.Spec.VolumeName == made.Name:
			a.Step = planSize(claim, made)
		}
		return a
	case claim.DeletionTimestamp != nil:
		if protected {
			a.Step = Abandon
		}
		return a
	case claim.Annotations[volume.AnnStorageProvisioner] != api.LocalPathProvisioner || class == nil || class.Provisioner != api.LocalPathProvisioner:
		return a
	}
	if a.Message = unfit(claim, class, selected); a.Message != "" {
		a.Step = Refuse
		return a
	}
	switch dir := nodeDir(node); {
	case node == nil:
		a.Step, a.Message = Reschedule, fmt.Sprintf("node %q does not exist", selected)
	case dir == "":
		a.Step, a.Message = Reschedule, fmt.Sprintf("node %q says no directory for volumes in annotation %s", selected, api.LocalPathAnnotation)
	case !protected:
		a.Step = Protect
	default:
		a.Step, a.Volume = Provision, newVolume(claim, class, node, path.Join(dir, a.Dir))
	}
	return a
}

func nodeDir(node *corev1.Node) string {
	if node == nil || !path.IsAbs(node.Annotations[api.LocalPathAnnotation]) {
		return ""
	}
	return node.Annotations[api.LocalPathAnnotation]
}

// unfit says why a directory on a node cannot be what the claim asks for.
func unfit(claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass, selected string) string {
	for _, mode := range claim.Spec.AccessModes {
		if mode != corev1.ReadWriteOnce && mode != corev1.ReadWriteOncePod {
			return fmt.Sprintf("access mode %s is not supported: a directory is on one node; ask for ReadWriteOnce or ReadWriteOncePod", mode)
		}
	}
	switch {
	case claim.Spec.VolumeMode != nil && *claim.Spec.VolumeMode != corev1.PersistentVolumeFilesystem:
		return "volume mode Block is not supported: a directory is no device; ask for Filesystem"
	case claim.Spec.Selector != nil:
		return "a selector is not supported: the volume is made for the claim"
	case claim.Spec.DataSource != nil || claim.Spec.DataSourceRef != nil:
		return "a data source is not supported: the volume is made empty"
	case selected == "":
		return fmt.Sprintf("no node is selected: StorageClass %s must have volumeBindingMode WaitForFirstConsumer", class.Name)
	}
	return ""
}

func newVolume(claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass, node *corev1.Node, dir string) *corev1.PersistentVolume {
	reclaim, mode := corev1.PersistentVolumeReclaimDelete, corev1.PersistentVolumeFilesystem
	if class.ReclaimPolicy != nil {
		reclaim = *class.ReclaimPolicy
	}
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{
			Name: VolumeName(claim), Finalizers: []string{Finalizer},
			Annotations: map[string]string{volume.AnnDynamicallyProvisioned: api.LocalPathProvisioner, volume.AnnSelectedNode: node.Name},
		},
		Spec: corev1.PersistentVolumeSpec{
			AccessModes: claim.Spec.AccessModes, StorageClassName: class.Name, MountOptions: class.MountOptions, VolumeMode: &mode,
			PersistentVolumeReclaimPolicy: reclaim,
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: claim.Spec.Resources.Requests[corev1.ResourceStorage]},
			PersistentVolumeSource:        corev1.PersistentVolumeSource{Local: &corev1.LocalVolumeSource{Path: dir}},
			ClaimRef: &corev1.ObjectReference{
				Kind: "PersistentVolumeClaim", APIVersion: "v1", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID, ResourceVersion: claim.ResourceVersion,
			},
			NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchExpressions: []corev1.NodeSelectorRequirement{{Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: []string{hostname(node)}}},
			}}}},
		},
	}
}

func hostname(node *corev1.Node) string {
	if name := node.Labels[corev1.LabelHostname]; name != "" {
		return name
	}
	return node.Name
}

// planSize: a directory has no size of its own, so growing is only saying so.
func planSize(claim *corev1.PersistentVolumeClaim, made *corev1.PersistentVolume) Step {
	if made.Annotations[volume.AnnDynamicallyProvisioned] != api.LocalPathProvisioner {
		return Nothing
	}
	wants := claim.Spec.Resources.Requests[corev1.ResourceStorage]
	has, says := made.Spec.Capacity[corev1.ResourceStorage], claim.Status.Capacity[corev1.ResourceStorage]
	switch {
	case wants.Cmp(has) > 0:
		return Grow
	case wants.Cmp(says) > 0:
		return Grown
	}
	return Nothing
}

// PlanVolume decides about a volume. nodeExists says whether the node that has its directory is there.
func PlanVolume(v *corev1.PersistentVolume, nodeExists bool) Action {
	a := Action{Node: v.Annotations[volume.AnnSelectedNode], Volume: v}
	if v.Annotations[volume.AnnDynamicallyProvisioned] != api.LocalPathProvisioner || v.Spec.Local == nil || !slices.Contains(v.Finalizers, Finalizer) {
		return a
	}
	a.Dir = path.Base(v.Spec.Local.Path)
	deletes := v.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete
	switch {
	case v.Status.Phase == corev1.VolumeBound: // whoever wants it gone waits for the claim to go
	case v.DeletionTimestamp == nil:
		if deletes && v.Status.Phase == corev1.VolumeReleased {
			a.Step = Delete
		}
	case !deletes:
		a.Step = Keep
	case !nodeExists:
		a.Step = Unknown
		a.Message = fmt.Sprintf("directory %s is on node %q, which does not exist: bring the node back, or remove finalizer %s to leave the directory there", v.Spec.Local.Path, a.Node, Finalizer)
	default:
		a.Step = Remove
	}
	return a
}
