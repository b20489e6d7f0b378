// SPDX-License-Identifier: Apache-2.0

// Package podpreset has PodPresets (settings.k8s.io/v1alpha1), as Kubernetes had them until 1.19: what they are, and how
// the resource is defined.
package podpreset

import (
	_ "embed"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Resource is that of PodPresets.
var Resource = schema.GroupVersionResource{Group: "settings.k8s.io", Version: "v1alpha1", Resource: "podpresets"}

// DefinitionName is the name of the CustomResourceDefinition.
const DefinitionName = "podpresets.settings.k8s.io"

// Definition is the CustomResourceDefinition, as YAML.
//
//go:embed podpresets.yaml
var Definition []byte

// Annotations of pods.
const (
	// ExcludeAnnotation with the value "true" keeps a pod as it is.
	ExcludeAnnotation = "podpreset.admission.kubernetes.io/exclude"
	// AppliedPrefix and a PodPreset's name say which was applied, with its resource version.
	AppliedPrefix = "podpreset.admission.kubernetes.io/podpreset-"
	// ConflictAnnotation says why the PodPresets that select the pod were not applied.
	ConflictAnnotation = "podpreset.admission.kubernetes.io/conflict"
)

// PodPreset is added to the pods of its namespace that it selects, when they are created.
type PodPreset struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec Spec `json:"spec"`
}

// Spec of a PodPreset.
type Spec struct {
	// Selector chooses pods by their labels; an empty one chooses all.
	Selector metav1.LabelSelector `json:"selector,omitempty"`
	// Env, EnvFrom and VolumeMounts are added to all containers, init containers included.
	Env          []corev1.EnvVar        `json:"env,omitempty"`
	EnvFrom      []corev1.EnvFromSource `json:"envFrom,omitempty"`
	Volumes      []corev1.Volume        `json:"volumes,omitempty"`
	VolumeMounts []corev1.VolumeMount   `json:"volumeMounts,omitempty"`
}
