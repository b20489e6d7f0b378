// SPDX-License-Identifier: Apache-2.0

package podpreset

import (
	"context"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/client-go/dynamic/fake"
	kubefake "k8s.io/client-go/kubernetes/fake"
	core "k8s.io/kubernetes/pkg/apis/core"
	"sigs.k8s.io/yaml"

	api "skep.io/skep/api/podpreset"
)

func presetOf(t *testing.T, name, spec string) *api.PodPreset {
	t.Helper()
	p := &api.PodPreset{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, ResourceVersion: "7"}}
	if err := yaml.UnmarshalStrict([]byte(spec), &p.Spec); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestSelecting(t *testing.T) {
	all := []*api.PodPreset{
		presetOf(t, "z", `selector: {matchLabels: {app: web}}`), presetOf(t, "a", `selector: {}`),
		presetOf(t, "m", `selector: {matchExpressions: [{key: app, operator: NotIn, values: [web]}]}`),
	}
	names := func(labels map[string]string) (out []string) {
		list, err := selecting(all, labels)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range list {
			out = append(out, p.Name)
		}
		return out
	}
	if diff := cmp.Diff([]string{"a", "z"}, names(map[string]string{"app": "web"})); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"a", "m"}, names(nil)); diff != "" {
		t.Error(diff)
	}
	if _, err := selecting([]*api.PodPreset{presetOf(t, "bad", `selector: {matchLabels: {"a b": c}}`)}, nil); err == nil {
		t.Error("a selector that is none selects")
	}
}

func TestMerge(t *testing.T) {
	const pod = `
initContainers: [{name: i, image: x}]
containers: [{name: c, image: x, env: [{name: A, value: a}], volumeMounts: [{name: v, mountPath: /v}]}]
volumes: [{name: v, emptyDir: {}}]`
	for name, c := range map[string]struct {
		presets []string
		want    string // of the spec; empty: as it was
		errs    []string
	}{
		"everything": {
			[]string{`{env: [{name: B, value: b}], envFrom: [{configMapRef: {name: m}}], volumes: [{name: w, emptyDir: {}}], volumeMounts: [{name: w, mountPath: /w}]}`}, `
initContainers: [{name: i, image: x, env: [{name: B, value: b}], envFrom: [{configMapRef: {name: m}}], volumeMounts: [{name: w, mountPath: /w}]}]
containers: [{name: c, image: x, env: [{name: A, value: a}, {name: B, value: b}], envFrom: [{configMapRef: {name: m}}], volumeMounts: [{name: v, mountPath: /v}, {name: w, mountPath: /w}]}]
volumes: [{name: v, emptyDir: {}}, {name: w, emptyDir: {}}]`, nil,
		},
		"what is there already": {
			[]string{`{env: [{name: A, value: a}], volumes: [{name: v, emptyDir: {}}]}`, `{envFrom: [{configMapRef: {name: m}}]}`, `{envFrom: [{configMapRef: {name: m}}]}`}, `
initContainers: [{name: i, image: x, env: [{name: A, value: a}], envFrom: [{configMapRef: {name: m}}]}]
containers: [{name: c, image: x, env: [{name: A, value: a}], envFrom: [{configMapRef: {name: m}}], volumeMounts: [{name: v, mountPath: /v}]}]
volumes: [{name: v, emptyDir: {}}]`, nil,
		},
		"the pod has another value":     {[]string{`{env: [{name: B, value: b}]}`, `{env: [{name: A, value: other}]}`}, "", []string{"PodPreset 1: container c: variable A"}},
		"another volume of that name":   {[]string{`{volumes: [{name: v, hostPath: {path: /}}]}`}, "", []string{"PodPreset 0: volume v"}},
		"another volume at that path":   {[]string{`{volumes: [{name: w, emptyDir: {}}], volumeMounts: [{name: w, mountPath: /v}]}`}, "", []string{"container c: mount path /v"}},
		"two presets contradict":        {[]string{`{env: [{name: B, value: b}]}`, `{env: [{name: B, value: c}]}`}, "", []string{"PodPreset 1: container i: variable B", "PodPreset 1: container c: variable B"}},
		"a preset that has nothing":     {[]string{`{}`}, "", nil},
		"a volume mounted at two paths": {[]string{`{volumeMounts: [{name: v, mountPath: /elsewhere}]}`}, strings.Replace(strings.Replace(pod, "mountPath: /v}", "mountPath: /v}, {name: v, mountPath: /elsewhere}", 1), "{name: i, image: x}", "{name: i, image: x, volumeMounts: [{name: v, mountPath: /elsewhere}]}", 1), nil},
	} {
		var list []*api.PodPreset
		for i, p := range c.presets {
			list = append(list, presetOf(t, string(rune('0'+i)), p))
		}
		read := func(text string) (out corev1.PodSpec) {
			if err := yaml.UnmarshalStrict([]byte(text), &out); err != nil {
				t.Fatal(err)
			}
			return out
		}
		got, want := &corev1.Pod{Spec: read(pod)}, read(pod)
		if c.want != "" {
			want = read(c.want)
		}
		err := merge(got, list)
		if (err != nil) != (len(c.errs) > 0) {
			t.Errorf("%s: %v", name, err)
		}
		for _, e := range c.errs {
			if err != nil && !strings.Contains(err.Error(), e) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if diff := cmp.Diff(want, got.Spec); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

// definition is one that is in force, or not yet.
func definition(established bool) *unstructured.Unstructured {
	status := "False"
	if established {
		status = "True"
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": map[string]any{"name": api.DefinitionName},
		"status": map[string]any{"conditions": []any{map[string]any{"type": "Established", "status": status}}},
	}}
}

func untyped(t *testing.T, p *api.PodPreset) *unstructured.Unstructured {
	t.Helper()
	raw, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	u := &unstructured.Unstructured{}
	if err := json.Unmarshal(raw, &u.Object); err != nil {
		t.Fatal(err)
	}
	u.SetAPIVersion("settings.k8s.io/v1alpha1")
	u.SetKind("PodPreset")
	return u
}

func runPlugin(t *testing.T, objects ...runtime.Object) (*Plugin, *fake.FakeDynamicClient, *kubefake.Clientset) {
	t.Helper()
	client := fake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		definitions: "CustomResourceDefinitionList", api.Resource: "PodPresetList",
	}, objects...)
	events := kubefake.NewClientset()
	p := New(slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx, client, events) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return p, client, events
}

func admit(t *testing.T, p *Plugin, pod *core.Pod) error {
	t.Helper()
	pod.Namespace = "ns"
	if pod.Spec.Containers == nil {
		pod.Spec.Containers = []core.Container{{Name: "c"}}
	}
	a := admission.NewAttributesRecord(pod, nil, core.Kind("Pod").WithVersion("v1"), "ns", pod.Name, core.Resource("pods").WithVersion("v1"), "", admission.Create, nil, false, nil)
	return p.Admit(context.Background(), a, nil)
}

func TestAdmit(t *testing.T) {
	preset := presetOf(t, "db", `{selector: {matchLabels: {role: frontend}}, env: [{name: PORT, value: "6379"}], volumes: [{name: conf, configMap: {name: conf}}], volumeMounts: [{name: conf, mountPath: /conf}]}`)
	p, _, events := runPlugin(t, definition(true), untyped(t, preset))
	labelled := func(annotations map[string]string) *core.Pod {
		return &core.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Labels: map[string]string{"role": "frontend"}, Annotations: annotations}}
	}
	pod := labelled(nil)
	if err := admit(t, p, pod); err != nil {
		t.Fatal(err)
	}
	if pod.Annotations[api.AppliedPrefix+"db"] != "7" || len(pod.Spec.Containers[0].Env) != 1 || len(pod.Spec.Containers[0].VolumeMounts) != 1 {
		t.Errorf("pod %+v", pod)
	}
	if m := pod.Spec.Volumes[0].ConfigMap.DefaultMode; m == nil || *m != 0o644 {
		t.Errorf("what was added has no defaults: %v", m)
	}
	for name, other := range map[string]*core.Pod{
		"another":  {ObjectMeta: metav1.ObjectMeta{Name: "p"}},
		"excluded": labelled(map[string]string{api.ExcludeAnnotation: "true"}),
		"mirror":   labelled(map[string]string{core.MirrorPodAnnotationKey: "x"}),
	} {
		if err := admit(t, p, other); err != nil || len(other.Spec.Containers[0].Env) != 0 {
			t.Errorf("%s: %v, %+v", name, err, other.Spec)
		}
	}
	against := labelled(nil)
	against.Spec.Containers = []core.Container{{Name: "c", Env: []core.EnvVar{{Name: "PORT", Value: "1"}}}}
	if err := admit(t, p, against); err != nil {
		t.Fatal(err)
	}
	if c := against.Spec.Containers[0]; len(c.VolumeMounts) != 0 || c.Env[0].Value != "1" || !strings.Contains(against.Annotations[api.ConflictAnnotation], "PodPreset db: container c: variable PORT") {
		t.Errorf("pod %+v", against)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		list, err := events.CoreV1().Events("ns").List(context.Background(), metav1.ListOptions{})
		if err != nil || time.Now().After(end) {
			t.Fatalf("events %v, %v", list, err)
		}
		if len(list.Items) == 1 {
			if e := list.Items[0]; e.Reason != "PodPresetConflict" || e.InvolvedObject.Name != "db" || !strings.Contains(e.Message, "pod ns/p") {
				t.Errorf("event %+v", e)
			}
			return
		}
	}
}

// A definition that is not in force yet may have presets that nobody knows: pods wait.
func TestPodsWaitUntilPresetsAreKnown(t *testing.T) {
	p, client, _ := runPlugin(t, definition(false), untyped(t, presetOf(t, "all", `{env: [{name: A, value: a}]}`)))
	done := make(chan error, 1)
	pod := &core.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}}
	go func() { done <- admit(t, p, pod) }()
	if _, err := client.Resource(definitions).Update(context.Background(), definition(true), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil || len(pod.Spec.Containers[0].Env) != 1 {
		t.Errorf("%v, %+v", err, pod.Spec)
	}
}

// Without the definition there are none, and once there is one they count.
func TestPodsWithoutDefinition(t *testing.T) {
	p, client, _ := runPlugin(t)
	pod := &core.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}}
	if err := admit(t, p, pod); err != nil || len(pod.Spec.Containers[0].Env) != 0 {
		t.Errorf("%v, %+v", err, pod.Spec)
	}
	ctx := context.Background()
	if _, err := client.Resource(definitions).Create(ctx, definition(true), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Resource(api.Resource).Namespace("ns").Create(ctx, untyped(t, presetOf(t, "all", `{env: [{name: A, value: a}]}`)), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		pod := &core.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}}
		if err := admit(t, p, pod); err != nil {
			t.Fatal(err)
		}
		if len(pod.Spec.Containers[0].Env) == 1 {
			return
		}
		if time.Now().After(end) {
			t.Fatal("the preset does not count")
		}
	}
}
