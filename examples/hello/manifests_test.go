// SPDX-License-Identifier: Apache-2.0

// Package hello holds the example application's manifests.
package hello

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

// objects decodes every manifest, refusing unknown and doubled fields.
func objects(t *testing.T) []runtime.Object {
	t.Helper()
	files, err := filepath.Glob("*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no manifests: %v", err)
	}
	decoder := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, json.SerializerOptions{Yaml: true, Strict: true})
	var out []runtime.Object
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		docs := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(b)))
		for {
			doc, err := docs.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			obj, _, err := decoder.Decode(doc, nil, nil)
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			out = append(out, obj)
		}
	}
	return out
}

func TestManifestsFitTogether(t *testing.T) {
	var dep *appsv1.Deployment
	services := map[string]*corev1.Service{}
	var ing *networkingv1.Ingress
	kinds := map[string]int{}
	for _, o := range objects(t) {
		kinds[o.GetObjectKind().GroupVersionKind().Kind]++
		switch o := o.(type) {
		case *appsv1.Deployment:
			dep = o
		case *corev1.Service:
			services[o.Name] = o
		case *networkingv1.Ingress:
			ing = o
		}
	}
	for kind, n := range map[string]int{"Namespace": 1, "ConfigMap": 1, "Deployment": 1, "Service": 2, "Ingress": 1} {
		if kinds[kind] != n {
			t.Errorf("%d of kind %s, want %d", kinds[kind], kind, n)
		}
	}
	if dep == nil || ing == nil {
		t.Fatal("no Deployment or no Ingress")
	}
	pod := labels.Set(dep.Spec.Template.Labels)
	ports := map[string]bool{}
	for _, p := range dep.Spec.Template.Spec.Containers[0].Ports {
		ports[p.Name] = true
	}
	for name, s := range services {
		if !labels.SelectorFromSet(s.Spec.Selector).Matches(pod) {
			t.Errorf("Service %s does not select the Deployment's pods", name)
		}
		if !ports[s.Spec.Ports[0].TargetPort.StrVal] {
			t.Errorf("Service %s: the pods have no port %s", name, s.Spec.Ports[0].TargetPort.StrVal)
		}
	}
	backend := ing.Spec.Rules[0].HTTP.Paths[0].Backend.Service
	if s := services[backend.Name]; s == nil || s.Spec.Ports[0].Name != backend.Port.Name {
		t.Errorf("the Ingress leads to Service %s port %s, which does not exist", backend.Name, backend.Port.Name)
	}
}
