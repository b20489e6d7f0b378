// SPDX-License-Identifier: Apache-2.0

package static

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
)

const web = `apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  containers: [{name: c, image: "web:1"}]
`

func TestDecode(t *testing.T) {
	p, err := decode([]byte(web), "/m/web.yaml", "bee")
	if err != nil {
		t.Fatal(err)
	}
	if p.Name != "web-bee" || p.Namespace != "default" || p.Spec.NodeName != "bee" || len(p.UID) != 32 || p.Annotations[HashAnnotation] != string(p.UID) || p.Annotations[sourceAnnotation] != "file" {
		t.Errorf("%+v", p.ObjectMeta)
	}
	if p.Spec.RestartPolicy != corev1.RestartPolicyAlways || p.Spec.TerminationGracePeriodSeconds == nil || p.Spec.Containers[0].ImagePullPolicy != corev1.PullIfNotPresent {
		t.Errorf("defaults: %+v", p.Spec)
	}
	if want := (corev1.Toleration{Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute}); !slices.Contains(p.Spec.Tolerations, want) {
		t.Errorf("tolerations: %+v", p.Spec.Tolerations)
	}
	same, err := decode([]byte(`{"kind":"Pod","apiVersion":"v1","metadata":{"name":"web"},"spec":{"containers":[{"image":"web:1","name":"c"}]}}`), "/m/web.yaml", "bee")
	if err != nil || same.UID != p.UID {
		t.Errorf("the same in JSON: uid %s, not %s: %v", same.UID, p.UID, err)
	}
	for what, other := range map[string]func() (*corev1.Pod, error){
		"another image": func() (*corev1.Pod, error) {
			return decode([]byte(strings.Replace(web, "web:1", "web:2", 1)), "/m/web.yaml", "bee")
		},
		"another file": func() (*corev1.Pod, error) { return decode([]byte(web), "/m/x.yaml", "bee") },
		"another node": func() (*corev1.Pod, error) { return decode([]byte(web), "/m/web.yaml", "wasp") },
	} {
		if o, err := other(); err != nil || o.UID == p.UID {
			t.Errorf("%s has the same uid: %v", what, err)
		}
	}
	// Nothing of the file names a directory of this host, or says that the pod is what it is not.
	for _, meta := range []string{`uid: ../../../etc`, `annotations: {kubernetes.io/config.mirror: x}`, `finalizers: [a/b]`} {
		o, err := decode([]byte(strings.Replace(web, "{name: web}", "{name: web, "+meta+"}", 1)), "/m/web.yaml", "bee")
		if err != nil || len(o.UID) != 32 || strings.Contains(string(o.UID), ".") || o.Annotations[corev1.MirrorPodAnnotationKey] != "" || len(o.Finalizers) > 0 {
			t.Errorf("%s: %+v, %v", meta, o, err)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	with := func(spec string) string { return strings.Replace(web, "spec:\n", "spec:\n  "+spec+"\n", 1) }
	for _, c := range []struct{ name, text, want string }{
		{"nothing", "", "Kind"},
		{"no object", "hello", "json"},
		{"half a file", web[:len(web)/2], "Kind|name|yaml|containers"},
		{"another kind", "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {ports: [{port: 1}]}\n", "one Pod"},
		{"no name", strings.Replace(web, "name: web}", "}", 1), "metadata.name is missing"},
		{"long name", strings.Replace(web, "name: web", "name: "+strings.Repeat("w", 252), 1), "metadata.name"},
		{"no containers", "apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec: {}\n", "spec.containers"},
		{"service account", with("serviceAccountName: x"), "serviceaccounts"},
		{"secret volume", with("volumes: [{name: v, secret: {secretName: s}}]"), "secrets"},
		{"config map volume", with("volumes: [{name: v, configMap: {name: s}}]"), "configmaps"},
		{"claim", with("volumes: [{name: v, persistentVolumeClaim: {claimName: s}}]"), "persistentvolumeclaims"},
		{"token", with("volumes: [{name: v, projected: {sources: [{serviceAccountToken: {path: t}}]}}]"), "serviceAccountName"},
	} {
		_, err := decode([]byte(c.text), "/m/f", "bee")
		if err == nil || !slices.ContainsFunc(strings.Split(c.want, "|"), func(w string) bool { return strings.Contains(err.Error(), w) }) {
			t.Errorf("%s: error %v, want one with %q", c.name, err, c.want)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func names(pods []*corev1.Pod) string {
	var out []string
	for _, p := range pods {
		out = append(out, p.Name+"="+p.Spec.Containers[0].Image)
	}
	return strings.Join(out, " ")
}

func TestRead(t *testing.T) {
	dir := t.TempDir()
	var log bytes.Buffer
	d := NewDir(dir, "n", slog.New(slog.NewTextHandler(&log, nil)))
	read := func(want string) {
		t.Helper()
		pods, err := d.Read()
		if err != nil || names(pods) != want {
			t.Errorf("%q, %v; want %q", names(pods), err, want)
		}
	}
	read("")
	write(t, filepath.Join(dir, "b.yaml"), web)
	write(t, filepath.Join(dir, ".a.swp"), strings.Replace(web, "web}", "hidden}", 1))
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("gone", filepath.Join(dir, "dangling")); err != nil {
		t.Fatal(err)
	}
	read("web-n=web:1")
	// A slip leaves the pod as it was, and is told once.
	write(t, filepath.Join(dir, "b.yaml"), "kind: Pod\nspec: [")
	read("web-n=web:1")
	read("web-n=web:1")
	if n := strings.Count(log.String(), "b.yaml"); n != 1 {
		t.Errorf("told %d times: %s", n, log.String())
	}
	write(t, filepath.Join(dir, "b.yaml"), strings.Replace(web, "web:1", "web:2", 1))
	read("web-n=web:2")
	// A second file with a pod of that name, and one that never was any good.
	write(t, filepath.Join(dir, "c.yaml"), web)
	write(t, filepath.Join(dir, "d.yaml"), "?")
	read("web-n=web:2")
	read("web-n=web:2")
	if n := strings.Count(log.String(), "another file has a pod of that name"); n != 1 {
		t.Errorf("told %d times: %s", n, log.String())
	}
	if err := os.Remove(filepath.Join(dir, "b.yaml")); err != nil {
		t.Fatal(err)
	}
	read("web-n=web:1")
	write(t, filepath.Join(dir, "c.yaml"), strings.Repeat("#", maxFile+1))
	read("web-n=web:1")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	read("")
}

// TestWatch changes a directory in the ways editors and configuration tools do.
func TestWatch(t *testing.T) {
	defer goleak.VerifyNone(t)
	dir := t.TempDir()
	d := NewDir(dir, "n", slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	told := make(chan string, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.Watch(ctx, func(p []*corev1.Pod) { told <- names(p) })
	}()
	until := func(want string) {
		t.Helper()
		limit := time.After(30 * time.Second)
		for {
			select {
			case got := <-told:
				if got == want {
					return
				}
			case <-limit:
				t.Fatalf("never told of %q", want)
			}
		}
	}
	until("")
	write(t, filepath.Join(dir, "a.yaml"), web)
	until("web-n=web:1")
	write(t, filepath.Join(dir, ".new"), strings.Replace(web, "web:1", "web:2", 1))
	if err := os.Rename(filepath.Join(dir, ".new"), filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	until("web-n=web:2")
	if err := os.Rename(filepath.Join(dir, "a.yaml"), filepath.Join(t.TempDir(), "a.yaml")); err != nil {
		t.Fatal(err)
	}
	until("")
	cancel()
	<-done
}
