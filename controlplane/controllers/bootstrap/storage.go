// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	storageutil "k8s.io/kubernetes/pkg/apis/storage/util"

	"skep.io/skep/api"
)

// What was made once is noted in this ConfigMap of kube-system. Who deletes the note gets what is missing again.
const (
	onceName        = "skep-bootstrap"
	onceStorageName = "storage-class"
)

// StorageClass is what a claim without a class gets.
func StorageClass() *storagev1.StorageClass {
	mode, reclaim, expand := storagev1.VolumeBindingWaitForFirstConsumer, corev1.PersistentVolumeReclaimDelete, true
	return &storagev1.StorageClass{
		ObjectMeta: metav1.ObjectMeta{
			Name: api.LocalPathClassName, Annotations: map[string]string{storageutil.IsDefaultStorageClassAnnotation: "true"},
		},
		Provisioner: api.LocalPathProvisioner, VolumeBindingMode: &mode, ReclaimPolicy: &reclaim, AllowVolumeExpansion: &expand,
	}
}

// ensureStorage makes the StorageClass in a new cluster, and never again: whoever changes or deletes it means it.
func (c *Controller) ensureStorage(ctx context.Context) error {
	notes := c.Client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	note, err := notes.Get(ctx, onceName, metav1.GetOptions{})
	missing := apierrors.IsNotFound(err)
	switch {
	case err != nil && !missing:
		return fmt.Errorf("read what was made once: %w", err)
	case !missing && note.Data[onceStorageName] != "":
		return nil
	}
	if _, err := c.Client.StorageV1().StorageClasses().Create(ctx, StorageClass(), metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create storage class %s: %w", api.LocalPathClassName, err)
	}
	if missing {
		note = &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: onceName}}
	}
	note = note.DeepCopy()
	if note.Data == nil {
		note.Data = map[string]string{}
	}
	note.Data[onceStorageName] = api.LocalPathClassName
	if missing {
		_, err = notes.Create(ctx, note, metav1.CreateOptions{})
	} else {
		_, err = notes.Update(ctx, note, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("note what was made once: %w", err)
	}
	return nil
}
