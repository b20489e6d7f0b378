// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox/cgroup"
)

func testLookup() lookup {
	return lookup{
		configMap: func(_ context.Context, _, name string) (*corev1.ConfigMap, error) {
			if name != "cm" {
				return nil, apierrors.NewNotFound(corev1.Resource("configmap"), name)
			}
			return &corev1.ConfigMap{Data: map[string]string{"a": "1", "b": "2"}}, nil
		},
		secret: func(_ context.Context, _, name string) (*corev1.Secret, error) {
			if name != "s" {
				return nil, apierrors.NewNotFound(corev1.Resource("secret"), name)
			}
			return &corev1.Secret{Data: map[string][]byte{"k": []byte("hidden")}}, nil
		},
		envFile: func(volume, path, key string) (string, error) {
			if path != "env" {
				return "", fmt.Errorf("file %q: %w", path, fs.ErrNotExist)
			}
			return map[string]string{"K": "from a file"}[key], nil
		},
		services: func(ns string) ([]*corev1.Service, error) {
			svc := func(name, ip string) *corev1.Service {
				return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{ClusterIP: ip, Ports: []corev1.ServicePort{{Port: 80}}}}
			}
			if ns == "default" {
				return []*corev1.Service{svc("kubernetes", "10.43.0.1"), svc("other", "10.43.0.2")}, nil
			}
			return []*corev1.Service{svc("my-db", "10.43.0.3"), svc("headless", "None")}, nil
		},
		allocatable: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4")},
		podIPs:      []string{"10.42.0.1", "fd00::1"}, hostIPs: []string{"192.0.2.1"},
	}
}

func TestEnvironment(t *testing.T) {
	yes, no := true, false
	field := func(path string) *corev1.EnvVarSource {
		return &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}
	}
	fromMap := func(name, key string, optional *bool) *corev1.EnvVarSource {
		return &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: name}, Key: key, Optional: optional}}
	}
	fromFile := func(path, key string, optional *bool) []corev1.EnvVar {
		return []corev1.EnvVar{{Name: "A", ValueFrom: &corev1.EnvVarSource{FileKeyRef: &corev1.FileKeySelector{VolumeName: "v", Path: path, Key: key, Optional: optional}}}}
	}
	tests := []struct {
		name  string
		links *bool
		from  []corev1.EnvFromSource
		env   []corev1.EnvVar
		want  []string // that the environment must have
		lacks []string // names that it must not have
		err   string
	}{
		{name: "values refer to what came before", env: []corev1.EnvVar{{Name: "A", Value: "x"}, {Name: "B", Value: "$(A)-$(NOPE)-$$(A)"}}, want: []string{"A=x", "B=x-$(NOPE)-$(A)"}},
		{name: "services of the namespace", want: []string{"MY_DB_SERVICE_HOST=10.43.0.3", "KUBERNETES_SERVICE_HOST=10.43.0.1"}, lacks: []string{"OTHER_SERVICE_HOST", "HEADLESS_SERVICE_HOST"}},
		{name: "only the API server without links", links: &no, want: []string{"KUBERNETES_SERVICE_HOST=10.43.0.1"}, lacks: []string{"MY_DB_SERVICE_HOST"}},
		{name: "a variable of the pod wins over a service's", env: []corev1.EnvVar{{Name: "MY_DB_SERVICE_HOST", Value: "mine"}}, want: []string{"MY_DB_SERVICE_HOST=mine"}},
		{name: "fields", env: []corev1.EnvVar{{Name: "IP", ValueFrom: field("status.podIP")}, {Name: "IPS", ValueFrom: field("status.podIPs")}, {Name: "HOST", ValueFrom: field("status.hostIP")}, {Name: "NAME", ValueFrom: field("metadata.name")}},
			want: []string{"IP=10.42.0.1", "IPS=10.42.0.1,fd00::1", "HOST=192.0.2.1", "NAME=p"}},
		{name: "resources default to the node's", env: []corev1.EnvVar{{Name: "CPU", ValueFrom: &corev1.EnvVarSource{ResourceFieldRef: &corev1.ResourceFieldSelector{Resource: "limits.cpu"}}}}, want: []string{"CPU=4"}},
		{name: "all of a config map, with a prefix", from: []corev1.EnvFromSource{{Prefix: "X_", ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "cm"}}}}, want: []string{"X_a=1", "X_b=2"}},
		{name: "all of a secret", from: []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "s"}}}}, want: []string{"k=hidden"}},
		{name: "an optional one that is missing", from: []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "nope"}, Optional: &yes}}}, env: []corev1.EnvVar{{Name: "A", ValueFrom: fromMap("cm", "zzz", &yes)}}, lacks: []string{"A"}},
		{name: "a missing config map", env: []corev1.EnvVar{{Name: "A", ValueFrom: fromMap("nope", "a", nil)}}, err: `configmap "nope" not found`},
		{name: "a file that an init container wrote", env: fromFile("env", "K", nil), want: []string{"A=from a file"}},
		{name: "optionally", env: fromFile("env", "L", &yes), lacks: []string{"A"}},
		{name: "even the file", env: fromFile("none", "K", &yes), lacks: []string{"A"}},
		{name: "a file without the key", env: fromFile("env", "L", nil), err: `environment variable key "L" not found in file "env"`},
		{name: "a missing file", env: fromFile("none", "K", &no), err: `file "none": file does not exist`},
		{name: "a missing key", env: []corev1.EnvVar{{Name: "A", ValueFrom: fromMap("cm", "zzz", nil)}}, err: "couldn't find key zzz in ConfigMap ns/cm"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := pod(main("c", func(c *corev1.Container) { c.Env, c.EnvFrom = tt.env, tt.from }))
			p.Spec.EnableServiceLinks = tt.links
			env, err := environment(context.Background(), p, &p.Spec.Containers[0], testLookup())
			if tt.err != "" {
				if !errors.Is(err, errConfig) || configMessage(err).Error() != tt.err {
					t.Fatalf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			list := "\n" + strings.Join(env.list(), "\n") + "\n"
			for _, w := range tt.want {
				if !strings.Contains(list, "\n"+w+"\n") {
					t.Errorf("lacks %s:%s", w, list)
				}
			}
			for _, l := range tt.lacks {
				if strings.Contains(list, "\n"+l+"=") {
					t.Errorf("has %s:%s", l, list)
				}
			}
		})
	}
}

func TestHostsFile(t *testing.T) {
	got := string(podHosts([]string{"10.42.0.1", "fd00::1"}, "web", "sub.ns.svc.cluster.local", []corev1.HostAlias{{IP: "192.0.2.9", Hostnames: []string{"a", "b"}}}))
	for _, want := range []string{"127.0.0.1\tlocalhost\n", "10.42.0.1\tweb.sub.ns.svc.cluster.local\tweb\n", "fd00::1\tweb.sub", "# Entries added by HostAliases.\n192.0.2.9\ta\tb\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("lacks %q:\n%s", want, got)
		}
	}
}

func TestHostname(t *testing.T) {
	long := strings.Repeat("a", 62) + "-" + strings.Repeat("b", 10)
	for _, tt := range []struct{ pod, host, sub, name, domain string }{
		{"p", "", "", "p", ""}, {"p", "h", "s", "h", "s.ns.svc.cluster.local"}, {long, "", "", strings.Repeat("a", 62), ""},
	} {
		p := pod()
		p.Name, p.Spec.Hostname, p.Spec.Subdomain = tt.pod, tt.host, tt.sub
		if name, domain := hostname(p, "cluster.local"); name != tt.name || domain != tt.domain {
			t.Errorf("%s: %q %q", tt.pod, name, domain)
		}
	}
}

func TestPodLimits(t *testing.T) {
	res := func(reqCPU, limCPU, limMem string) func(*corev1.Container) {
		return func(c *corev1.Container) {
			c.Resources = corev1.ResourceRequirements{Requests: corev1.ResourceList{}, Limits: corev1.ResourceList{}}
			for name, q := range map[corev1.ResourceName]string{corev1.ResourceCPU: limCPU, corev1.ResourceMemory: limMem} {
				if q != "" {
					c.Resources.Limits[name] = resource.MustParse(q)
				}
			}
			if reqCPU != "" {
				c.Resources.Requests[corev1.ResourceCPU] = resource.MustParse(reqCPU)
			}
		}
	}
	tests := []struct {
		name, parent string
		pod          *corev1.Pod
		want         cgroup.Limits
	}{
		{"best effort", "kubepods/besteffort/poduid", pod(), cgroup.Limits{CPUShares: 2}},
		{"burstable", "kubepods/burstable/poduid", pod(main("a", res("500m", "1", "64Mi")), main("b", res("250m", "", ""))), cgroup.Limits{CPUShares: 768}},
		{"all have limits", "kubepods/burstable/poduid", pod(main("a", res("500m", "1", "64Mi")), main("b", res("500m", "1", "64Mi"))), cgroup.Limits{CPUShares: 1024, CPUQuota: 200_000, CPUPeriod: 100_000, MemoryBytes: 128 << 20}},
	}
	for _, tt := range tests {
		if d := cmp.Diff(tt.want, podLimits(tt.pod, 0)); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, d)
		}
		if got := cgroupParent(tt.pod); got != tt.parent {
			t.Errorf("%s: cgroup %s", tt.name, got)
		}
	}
}

func TestMayRun(t *testing.T) {
	yes := true
	root, bee := int64(0), int64(1000)
	tests := []struct {
		user  *int64
		image string
		err   string
	}{
		{nil, "", "image will run as root"}, {nil, "0", "image will run as root"}, {nil, "bee", "non-numeric user (bee)"},
		{nil, "1000:1000", ""}, {&root, "1000", "breaks non-root policy"}, {&bee, "", ""},
	}
	for _, tt := range tests {
		p := pod(main("c", func(c *corev1.Container) {
			c.SecurityContext = &corev1.SecurityContext{RunAsNonRoot: &yes, RunAsUser: tt.user}
		}))
		err := mayRun(p, &p.Spec.Containers[0], runtime.Image{User: tt.image})
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("user %v image %q: %v", tt.user, tt.image, err)
		}
	}
}

func TestTerminationMessage(t *testing.T) {
	h := hostFiles{dir: t.TempDir(), logs: t.TempDir()}
	p := pod(main("c", func(c *corev1.Container) { c.TerminationMessagePolicy = corev1.TerminationMessageFallbackToLogsOnError }))
	c := &p.Spec.Containers[0]
	log := h.log(p, "c", 0)
	if err := os.MkdirAll(filepath.Dir(log), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(log, []byte("2026-01-01T00:00:00Z stdout P par\n2026-01-01T00:00:00Z stdout F tial\n2026-01-01T00:00:01Z stderr F end\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := h.terminationMessage(p, c, 0, true); got != "partial\nend\n" {
		t.Errorf("from the log: %q", got)
	}
	if got := h.terminationMessage(p, c, 0, false); got != "" {
		t.Errorf("after success: %q", got)
	}
	path := h.termination(p.UID, "c", 0)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("x", maxMessage+10)), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := h.terminationMessage(p, c, 0, true); len(got) != maxMessage {
		t.Errorf("from the file: %d bytes", len(got))
	}
}

func FuzzLastLines(f *testing.F) {
	f.Add([]byte("2026-01-01T00:00:00Z stdout F hello\n"))
	f.Add([]byte("x stdout P \xff\xfe\nstderr F\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if s := lastLines(raw, maxMessageLines, maxLogMessage); len(s) > maxLogMessage || !utf8.ValidString(s) {
			t.Errorf("%d bytes, valid %v", len(s), utf8.ValidString(s))
		}
	})
}

func FuzzImageName(f *testing.F) {
	for _, s := range []string{"busybox", "a/b:c", "Not A Reference", "127.0.0.1:5000/x@sha256:00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, image string) {
		ref, err := normalize(image)
		if err != nil {
			return
		}
		if again, err := normalize(ref); err != nil || again != ref {
			t.Errorf("%q becomes %q, then %q, %v", image, ref, again, err)
		}
	})
}
