// SPDX-License-Identifier: Apache-2.0

// Package history records the pod templates that a StatefulSet or DaemonSet has had, as ControllerRevisions.
// `kubectl rollout history` and `undo` read them; undo sends a revision's data to the API as a patch.
//
// Find and Expired decide; Revisions reads and writes.
package history

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/json"
	"k8s.io/apimachinery/pkg/util/sets"
	corev1defaults "k8s.io/kubernetes/pkg/apis/core/v1"
)

// Data is what a revision keeps of a template: a strategic merge patch that replaces .spec.template.
func Data(template *corev1.PodTemplateSpec) ([]byte, error) {
	encoded, err := json.Marshal(template)
	if err != nil {
		return nil, fmt.Errorf("encode pod template: %w", err)
	}
	var fields map[string]any
	if err := json.Unmarshal(encoded, &fields); err != nil {
		return nil, fmt.Errorf("encode pod template: %w", err)
	}
	fields["$patch"] = "replace"
	return json.Marshal(map[string]any{"spec": map[string]any{"template": fields}})
}

// Template is the template that a revision recorded, with today's defaults for fields that it did not know.
func Template(revision *appsv1.ControllerRevision) (*corev1.PodTemplateSpec, error) {
	var data struct {
		Spec struct {
			Template *corev1.PodTemplateSpec `json:"template"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(revision.Data.Raw, &data); err != nil {
		return nil, fmt.Errorf("controller revision %s/%s: data: %w", revision.Namespace, revision.Name, err)
	}
	if data.Spec.Template == nil {
		return nil, fmt.Errorf("controller revision %s/%s: data has no spec.template; delete the revision", revision.Namespace, revision.Name)
	}
	defaulted := corev1.PodTemplate{Template: *data.Spec.Template}
	corev1defaults.SetObjectDefaults_PodTemplate(&defaulted)
	return &defaulted.Template, nil
}

// Sort orders revisions from oldest to newest.
func Sort(revisions []*appsv1.ControllerRevision) {
	slices.SortFunc(revisions, func(a, b *appsv1.ControllerRevision) int {
		return cmp.Or(
			cmp.Compare(a.Revision, b.Revision),
			a.CreationTimestamp.Compare(b.CreationTimestamp.Time),
			strings.Compare(a.Name, b.Name))
	})
}

// Find returns the revision that recorded data, the newest if several did, and the number it must have to be the
// newest of all. It is nil if none of revisions, which are sorted, did. A revision written before the API had some
// field counts as equal to the same template with that field's default: an upgrade must restart nothing.
func Find(revisions []*appsv1.ControllerRevision, data []byte) (equal *appsv1.ControllerRevision, number int64) {
	number = 1
	if n := len(revisions); n > 0 {
		number = revisions[n-1].Revision + 1
	}
	isEqual := func(r *appsv1.ControllerRevision) bool { return bytes.Equal(r.Data.Raw, data) }
	isSame := func(r *appsv1.ControllerRevision) bool {
		template, err := Template(r)
		if err != nil {
			return false // it can still be deleted when it expires
		}
		redone, err := Data(template)
		return err == nil && bytes.Equal(redone, data)
	}
	for _, matches := range []func(*appsv1.ControllerRevision) bool{isEqual, isSame} {
		for i, r := range slices.Backward(revisions) {
			if !matches(r) {
				continue
			}
			if i == len(revisions)-1 {
				number = r.Revision
			}
			return r, number
		}
	}
	return nil, number
}

// Expired are the oldest of revisions, which are sorted, beyond limit. Those named live, which pods still have or may
// get, neither expire nor count.
func Expired(revisions []*appsv1.ControllerRevision, live sets.Set[string], limit *int32) []*appsv1.ControllerRevision {
	var dead []*appsv1.ControllerRevision
	for _, r := range revisions {
		if !live.Has(r.Name) {
			dead = append(dead, r)
		}
	}
	if limit == nil || len(dead) <= int(*limit) {
		return nil
	}
	return dead[:len(dead)-int(*limit)]
}
