// SPDX-License-Identifier: Apache-2.0

// Package podpreset adds what PodPresets have to pods that are created.
//
// A preset that contradicts the pod, or another preset, is not applied, and neither is any other to that pod: it is
// created as it was sent, an annotation says why, and an event at the preset.
package podpreset

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/client-go/tools/record"
	core "k8s.io/kubernetes/pkg/apis/core"
	corev1api "k8s.io/kubernetes/pkg/apis/core/v1"

	api "skep.io/skep/api/podpreset"
)

// PluginName is how the plugin is named among the others.
const PluginName = "PodPreset"

// patience is how long a pod waits, just after the server has started, until it is known which presets there are.
const patience = 10 * time.Second

// Plugin is an admission plugin.
type Plugin struct {
	*admission.Handler
	presets  *presets
	recorder record.EventRecorder // made by Run, before presets are known
	log      *slog.Logger
}

var _ admission.MutationInterface = (*Plugin)(nil)

// New makes the plugin, which holds up pods until Run knows the presets.
func New(log *slog.Logger) *Plugin {
	return &Plugin{Handler: admission.NewHandler(admission.Create), presets: newPresets(), log: log}
}

// Admit adds to a pod what the presets have that select it.
func (p *Plugin) Admit(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	if a.GetResource().GroupResource() != core.Resource("pods") || a.GetSubresource() != "" {
		return nil
	}
	pod, ok := a.GetObject().(*core.Pod)
	if !ok {
		return apierrors.NewBadRequest(fmt.Sprintf("a pod was expected, not %T", a.GetObject()))
	}
	if _, mirror := pod.Annotations[core.MirrorPodAnnotationKey]; mirror || pod.Annotations[api.ExcludeAnnotation] == "true" {
		return nil
	}
	all, err := p.presets.of(ctx, a.GetNamespace())
	if err != nil {
		return admission.NewForbidden(a, fmt.Errorf("PodPresets are not known yet: try again: %w", err))
	}
	list, err := selecting(all, pod.Labels)
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	if len(list) == 0 {
		return nil
	}
	return p.apply(pod, list, a)
}

func (p *Plugin) apply(pod *core.Pod, list []*api.PodPreset, a admission.Attributes) error {
	v1 := &corev1.Pod{}
	if err := corev1api.Convert_core_Pod_To_v1_Pod(pod, v1, nil); err != nil {
		return apierrors.NewInternalError(err)
	}
	if err := merge(v1, list); err != nil {
		name := strings.TrimPrefix(a.GetNamespace()+"/"+cmp.Or(pod.Name, pod.GenerateName), "/")
		p.log.Info("PodPresets are not applied", "pod", name, "conflict", err)
		for _, preset := range list {
			ref := &corev1.ObjectReference{
				APIVersion: api.Resource.GroupVersion().String(), Kind: "PodPreset", Namespace: a.GetNamespace(), Name: preset.Name, UID: preset.UID,
			}
			p.recorder.Eventf(ref, corev1.EventTypeWarning, "PodPresetConflict", "not applied to pod %s: %v", name, err)
		}
		metav1.SetMetaDataAnnotation(&pod.ObjectMeta, api.ConflictAnnotation, strings.ReplaceAll(err.Error(), "\n", "; "))
		return nil
	}
	for _, preset := range list {
		metav1.SetMetaDataAnnotation(&v1.ObjectMeta, api.AppliedPrefix+preset.Name, preset.ResourceVersion)
	}
	corev1api.SetObjectDefaults_Pod(v1) // the pod has its defaults, what was added has not
	out := &core.Pod{}
	if err := corev1api.Convert_v1_Pod_To_core_Pod(v1, out, nil); err != nil {
		return apierrors.NewInternalError(errors.Join(errors.New("what PodPresets made of the pod"), err))
	}
	pod.Annotations, pod.Spec = out.Annotations, out.Spec
	return nil
}
