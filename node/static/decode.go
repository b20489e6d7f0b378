// SPDX-License-Identifier: Apache-2.0

// Package static reads the pods that a node runs because of files on it: static pods. Nobody need reach
// an API server for them.
package static

import (
	"encoding/hex"
	"errors"
	"fmt"
	"hash/fnv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	podutil "k8s.io/kubernetes/pkg/api/pod"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/apis/core/helper"
	_ "k8s.io/kubernetes/pkg/apis/core/install" // the kinds that files may hold
	corev1conversion "k8s.io/kubernetes/pkg/apis/core/v1"
	"k8s.io/kubernetes/pkg/apis/core/validation"
	"k8s.io/kubernetes/pkg/util/hash"
)

// HashAnnotation holds the uid that a static pod has on its node, on the pod and on its mirror.
const HashAnnotation = "kubernetes.io/config.hash"

// sourceAnnotation says where a static pod comes from, as kubelet does.
const sourceAnnotation = "kubernetes.io/config.source"

// decode reads the one pod that a file holds, in YAML or JSON, and completes it as the API server would. Its name gets
// the node's name behind it, and its uid follows from what it says, the file and the node: a pod that is changed is another
// pod (kubelet: config/common.go).
func decode(data []byte, file, node string) (*corev1.Pod, error) {
	raw, err := yaml.ToJSON(data)
	if err != nil {
		return nil, err
	}
	object, err := runtime.Decode(legacyscheme.Codecs.UniversalDecoder(), raw)
	if err != nil {
		return nil, err
	}
	pod, ok := object.(*core.Pod)
	if !ok {
		return nil, fmt.Errorf("it holds a %s: a file in this directory holds one Pod", object.GetObjectKind().GroupVersionKind().Kind)
	}
	if pod.Name == "" {
		return nil, errors.New("metadata.name is missing")
	}
	sum := fnv.New128a()
	hash.DeepHashObject(sum, pod)
	fmt.Fprintf(sum, "host:%s", node)
	fmt.Fprintf(sum, "file:%s", file)
	// The uid names directories on this host: never the file's own.
	pod.UID = types.UID(hex.EncodeToString(sum.Sum(nil)))
	pod.Name += "-" + strings.ToLower(node)
	if pod.Namespace == "" {
		pod.Namespace = metav1.NamespaceDefault
	}
	pod.Spec.NodeName = node
	if pod.Annotations == nil {
		pod.Annotations = map[string]string{}
	}
	pod.Annotations[HashAnnotation], pod.Annotations[sourceAnnotation] = string(pod.UID), "file"
	delete(pod.Annotations, corev1.MirrorPodAnnotationKey)
	// Trouble of the node is no reason to take it off the node.
	helper.AddOrUpdateTolerationInPod(pod, &core.Toleration{Operator: core.TolerationOpExists, Effect: core.TaintEffectNoExecute})
	pod.Status = core.PodStatus{Phase: core.PodPending}
	pod.DeletionTimestamp, pod.DeletionGracePeriodSeconds, pod.OwnerReferences, pod.Finalizers = nil, nil, nil, nil

	options := podutil.GetValidationOptionsFromPodSpecAndMeta(&pod.Spec, nil, &pod.ObjectMeta, nil)
	if errs := validation.ValidatePodCreate(pod, options); len(errs) > 0 {
		return nil, errs.ToAggregate()
	}
	if refers, what, err := podutil.HasAPIObjectReference(pod); err != nil {
		return nil, err
	} else if refers {
		return nil, fmt.Errorf("it refers to %s: a static pod runs without the API, so put what it needs into files on this host", what)
	}
	out := &corev1.Pod{}
	if err := corev1conversion.Convert_core_Pod_To_v1_Pod(pod, out, nil); err != nil {
		return nil, err
	}
	return out, nil
}
