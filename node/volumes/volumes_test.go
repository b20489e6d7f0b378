// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"skep.io/skep/node/sandbox/isolate"
)

func TestMain(m *testing.M) { os.Exit(isolate.Run(m)) }

// bench is volumes in a directory, with a fake API server.
type bench struct {
	*Volumes
	client  *fake.Clientset
	objects *Objects
	changed chan types.UID
	dir     string
}

func newBench(t *testing.T, objects ...runtime.Object) *bench {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	b := &bench{client: fake.NewClientset(objects...), changed: make(chan types.UID, 100), dir: t.TempDir()}
	b.objects = NewObjects(ctx, b.client, slog.New(slog.DiscardHandler), func(u types.UID) { b.changed <- u })
	var err error
	b.Volumes, err = New(Config{Dir: b.dir, Client: b.client, Objects: b.objects, Log: slog.New(slog.DiscardHandler),
		Allocatable: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("2"), corev1.ResourceMemory: resource.MustParse("1Gi")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		b.objects.Wait()
		if err := Cleanup(context.Background(), b.dir); err != nil {
			t.Error(err)
		}
		left, err := os.ReadDir(b.dir)
		if err != nil || len(left) > 0 {
			t.Errorf("left over: %v, %v", left, err)
		}
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(b.dir))
		if err != nil || len(mounts) > 0 {
			t.Errorf("mounts left over: %v, %v", mounts, err)
		}
	})
	return b
}

func podWith(vols ...corev1.Volume) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "uid", Labels: map[string]string{"app": "x"}},
		Spec:       corev1.PodSpec{Volumes: vols, Containers: []corev1.Container{{Name: "c"}}},
	}
}

func volume(name string, source corev1.VolumeSource) corev1.Volume {
	return corev1.Volume{Name: name, VolumeSource: source}
}

func configMap(name string, data ...string) *corev1.ConfigMap {
	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}, Data: map[string]string{}}
	for i := 0; i < len(data); i += 2 {
		cm.Data[data[i]] = data[i+1]
	}
	return cm
}

func fromConfigMap(name string, items ...corev1.KeyToPath) corev1.VolumeSource {
	return corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: name}, Items: items}}
}

func (b *bench) mount(t *testing.T, p *corev1.Pod) time.Time {
	t.Helper()
	at, err := b.Mount(context.Background(), p)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func (b *bench) read(t *testing.T, p *corev1.Pod, vol, file string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(b.path(p.UID, Of(p, vol)), file))
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestKinds(t *testing.T) {
	mode, optional := int32(0o400), true
	b := newBench(t, configMap("cm", "a", "1", "b", "2"),
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "s"}, Data: map[string][]byte{"key": []byte("secret")}})
	p := podWith(
		volume("cm", fromConfigMap("cm")),
		volume("items", fromConfigMap("cm", corev1.KeyToPath{Key: "a", Path: "deep/er/a", Mode: &mode})),
		volume("none", corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "nope"}, Optional: &optional}}),
		volume("s", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "s", DefaultMode: &mode}}),
		volume("down", corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{
			{Path: "labels", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.labels"}},
			{Path: "cpu", ResourceFieldRef: &corev1.ResourceFieldSelector{ContainerName: "c", Resource: "limits.cpu"}},
		}}}),
		volume("all", corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "cm"}, Items: []corev1.KeyToPath{{Key: "b", Path: "b"}}}},
			{Secret: &corev1.SecretProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "s"}}},
			{DownwardAPI: &corev1.DownwardAPIProjection{Items: []corev1.DownwardAPIVolumeFile{{Path: "name", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}}}},
		}}}),
		volume("empty", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}),
		volume("memory", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory, SizeLimit: resource.NewQuantity(1<<20, resource.BinarySI)}}),
	)
	b.mount(t, p)
	for _, want := range [][3]string{
		{"cm", "a", "1"}, {"cm", "b", "2"}, {"items", "deep/er/a", "1"}, {"s", "key", "secret"}, {"down", "labels", `app="x"`},
		{"down", "cpu", "2"}, {"all", "b", "2"}, {"all", "key", "secret"}, {"all", "name", "p"},
	} {
		if got := b.read(t, p, want[0], want[1]); got != want[2] {
			t.Errorf("%s/%s: %q, want %q", want[0], want[1], got, want[2])
		}
	}
	perm := func(vol, file string) fs.FileMode {
		st, err := os.Stat(filepath.Join(b.path(p.UID, Of(p, vol)), file))
		if err != nil {
			t.Fatal(err)
		}
		return st.Mode().Perm()
	}
	if perm("items", "deep/er/a") != 0o400 || perm("s", "key") != 0o400 || perm("cm", "a") != 0o644 || perm("empty", ".") != 0o777 {
		t.Errorf("modes %v %v %v %v", perm("items", "deep/er/a"), perm("s", "key"), perm("cm", "a"), perm("empty", "."))
	}
	for vol, want := range map[string]bool{"s": true, "all": true, "memory": true, "cm": false, "empty": false} {
		if on, err := isMount(b.path(p.UID, Of(p, vol))); err != nil || on != want {
			t.Errorf("%s is in memory: %v, %v", vol, on, err)
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(b.path(p.UID, Of(p, "memory")), &st); err != nil || int64(st.Blocks)*st.Bsize != 1<<20 {
		t.Errorf("size %d, %v", int64(st.Blocks)*st.Bsize, err)
	}

	// Again changes nothing, and what a container wrote stays.
	kept := filepath.Join(b.path(p.UID, Of(p, "empty")), "kept")
	if err := os.WriteFile(kept, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link, err := os.Readlink(filepath.Join(b.path(p.UID, Of(p, "cm")), "..data"))
	if err != nil {
		t.Fatal(err)
	}
	b.mount(t, p)
	if again, _ := os.Readlink(filepath.Join(b.path(p.UID, Of(p, "cm")), "..data")); again != link {
		t.Error("an unchanged volume was written again")
	}
	if _, err := os.Stat(kept); err != nil {
		t.Error(err)
	}
	mounts, err := b.ContainerMounts(p, &corev1.Container{Name: "c", VolumeMounts: []corev1.VolumeMount{{Name: "cm", MountPath: "/cm"}, {Name: "empty", MountPath: "/e"}}}, nil)
	if err != nil || !mounts[0].ReadOnly || mounts[1].ReadOnly || mounts[0].HostPath != b.path(p.UID, Of(p, "cm")) {
		t.Errorf("mounts %+v, %v", mounts, err)
	}

	if list, err := b.List(); err != nil || len(list) != 1 || !b.Present("uid") {
		t.Errorf("list %v, %v", list, err)
	}
	if err := b.Unmount(context.Background(), "uid"); err != nil || b.Present("uid") {
		t.Errorf("unmount: %v", err)
	}
}

func TestFailuresNameTheVolume(t *testing.T) {
	b := newBench(t, configMap("cm", "a", "1"))
	pvc := corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "x"}}
	p := podWith(
		volume("v1", fromConfigMap("nope")),
		volume("v2", fromConfigMap("cm", corev1.KeyToPath{Key: "zzz", Path: "z"})),
		volume("v3", pvc),
		volume("v4", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "gone"}}),
		volume("ok", fromConfigMap("cm")),
	)
	_, err := b.Mount(context.Background(), p)
	var list interface{ Unwrap() []error }
	if !errors.As(err, &list) || len(list.Unwrap()) != 4 {
		t.Fatalf("error %v", err)
	}
	for i, want := range []string{
		`MountVolume.SetUp failed for volume "v1" : configmap "nope" not found`,
		`MountVolume.SetUp failed for volume "v2" : ns/cm references non-existent configmap key: zzz`,
		`MountVolume.SetUp failed for volume "v3" : error processing PVC ns/x: failed to fetch PVC from API server: persistentvolumeclaims "x" not found`,
		`MountVolume.SetUp failed for volume "v4" : secret "gone" not found`,
	} {
		if got := list.Unwrap()[i].Error(); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
	if got := b.read(t, p, "ok", "a"); got != "1" {
		t.Errorf("the good volume has %q", got)
	}
}

func TestUpdatesWhileRunning(t *testing.T) {
	b := newBench(t, configMap("cm", "a", "1", "old", "x"))
	p := podWith(volume("cm", fromConfigMap("cm")), volume("later", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "later"}}))
	if _, err := b.Mount(context.Background(), p); err == nil {
		t.Fatal("a secret that does not exist was mounted")
	}
	ctx := context.Background()
	// The fake server tells of no change before its watch is on.
	wait(t, "the watches are on", func() bool {
		n := 0
		for _, a := range b.client.Actions() {
			if a.GetVerb() == "watch" {
				n++
			}
		}
		return n == 2
	})
	cm := configMap("cm", "a", "2")
	cm.ResourceVersion = "5"
	if _, err := b.client.CoreV1().ConfigMaps("ns").Update(ctx, cm, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if uid := <-b.changed; uid != "uid" {
		t.Errorf("changed: %s", uid)
	}
	if _, err := b.client.CoreV1().Secrets("ns").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "later", Namespace: "ns"}, Data: map[string][]byte{"k": []byte("v")}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	wait(t, "all is mounted anew", func() bool {
		<-b.changed // never without being told
		_, err := b.Mount(ctx, p)
		return err == nil && b.read(t, p, "cm", "a") == "2"
	})
	if _, err := os.Lstat(filepath.Join(b.path("uid", Of(p, "cm")), "old")); !os.IsNotExist(err) {
		t.Errorf("a key that is gone is still shown: %v", err)
	}
	// One that is deleted while in use is told of, too.
	if err := b.client.CoreV1().ConfigMaps("ns").Delete(ctx, "cm", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	wait(t, "the deletion is told of", func() bool {
		<-b.changed
		_, err := b.Mount(ctx, p)
		return err != nil
	})
	b.objects.Untrack("uid")
	if _, err := b.objects.ConfigMap(ctx, "ns", "cm"); err == nil || apierrors.IsNotFound(err) {
		t.Errorf("untracked: %v", err)
	}
}

func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("timed out waiting until %s", what)
}

func tokenVolume(ps ...corev1.ServiceAccountTokenProjection) corev1.VolumeSource {
	v := corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{}}
	for i := range ps {
		v.Projected.Sources = append(v.Projected.Sources, corev1.VolumeProjection{ServiceAccountToken: &ps[i]})
	}
	return v
}

func TestTokens(t *testing.T) {
	b := newBench(t)
	var asked atomic.Int32
	life := atomic.Int64{}
	life.Store(int64(time.Hour))
	b.client.PrependReactor("create", "serviceaccounts", func(a clienttesting.Action) (bool, runtime.Object, error) {
		n := asked.Add(1)
		if n == 1 {
			// The authorizer has not heard of the pod yet.
			return true, nil, apierrors.NewForbidden(corev1.Resource("serviceaccounts"), "sa", errors.New("no relationship found"))
		}
		r := a.(clienttesting.CreateAction).GetObject().(*authv1.TokenRequest)
		if ref := r.Spec.BoundObjectRef; ref == nil || ref.UID != "uid" || ref.Kind != "Pod" || r.Spec.Audiences[0] != "hive" {
			t.Errorf("request %+v", r.Spec)
		}
		r = r.DeepCopy()
		r.Status = authv1.TokenRequestStatus{Token: fmt.Sprintf("token-%d", n), ExpirationTimestamp: metav1.NewTime(time.Now().Add(time.Duration(life.Load())))}
		return true, r, nil
	})
	seconds, group := int64(3600), int64(4242)
	p := podWith(volume("t", tokenVolume(corev1.ServiceAccountTokenProjection{Path: "token", Audience: "hive", ExpirationSeconds: &seconds})))
	p.Spec.ServiceAccountName = "sa"
	p.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: &group}
	due := b.mount(t, p)
	if left := time.Until(due); left < 46*time.Minute || left > 48*time.Minute {
		t.Errorf("renewed in %v, want four fifths of an hour", left)
	}
	if got := b.read(t, p, "t", "token"); got != "token-2" {
		t.Errorf("token %q", got)
	}
	st, err := os.Stat(filepath.Join(b.path("uid", Of(p, "t")), "token"))
	if err != nil || st.Mode().Perm() != 0o640 || st.Sys().(*syscall.Stat_t).Gid != 4242 {
		t.Errorf("token file %v, %v", st, err)
	}
	b.mount(t, p)
	if asked.Load() != 2 {
		t.Error("a token with life in it was asked for again")
	}
	// One that is past its time is.
	b.mu.Lock()
	for _, tk := range b.tokens {
		tk.renew = time.Now()
	}
	b.mu.Unlock()
	b.mount(t, p)
	if got := b.read(t, p, "t", "token"); got != "token-3" {
		t.Errorf("renewed token %q", got)
	}
}

func TestFSGroup(t *testing.T) {
	b := newBench(t, configMap("cm", "a", "1"))
	group := int64(4242)
	p := podWith(volume("e", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}), volume("cm", fromConfigMap("cm")))
	p.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: &group}
	b.mount(t, p)
	st, err := os.Stat(b.path("uid", Of(p, "e")))
	if err != nil || st.Sys().(*syscall.Stat_t).Gid != 4242 || st.Mode()&fs.ModeSetgid == 0 {
		t.Errorf("emptyDir %v, %v", st.Mode(), err)
	}
	st, err = os.Stat(filepath.Join(b.path("uid", Of(p, "cm")), "a"))
	if err != nil || st.Sys().(*syscall.Stat_t).Gid != 4242 {
		t.Errorf("config map %v, %v", st, err)
	}
}

func TestHostPath(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	tests := []struct {
		path string
		kind corev1.HostPathType
		ok   bool
	}{
		{"new", corev1.HostPathUnset, true}, {"made", corev1.HostPathDirectoryOrCreate, true}, {".", corev1.HostPathDirectory, true},
		{"missing", corev1.HostPathDirectory, false}, {"file", corev1.HostPathDirectory, false}, {"file", corev1.HostPathFile, true},
		{"missing", corev1.HostPathFile, false}, {"touched", corev1.HostPathFileOrCreate, true}, {".", corev1.HostPathFileOrCreate, false},
		{"sock", corev1.HostPathSocket, true}, {"file", corev1.HostPathSocket, false}, {"/dev/null", corev1.HostPathCharDev, true},
		{"/dev/null", corev1.HostPathBlockDev, false}, {"file", "Bee", false},
	}
	for _, tt := range tests {
		path := tt.path
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		if err := hostPath(&corev1.HostPathVolumeSource{Path: path, Type: &tt.kind}); (err == nil) != tt.ok {
			t.Errorf("%s as %q: %v", tt.path, tt.kind, err)
		}
	}
}

func TestSubPath(t *testing.T) {
	b := newBench(t, configMap("cm", "a", "1"))
	p := podWith(volume("e", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}), volume("cm", fromConfigMap("cm")))
	b.mount(t, p)
	root := b.path("uid", Of(p, "e"))
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "treasure"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"inside": "real", "abs": outside, "up": "../../../../..", "abs-file": filepath.Join(outside, "treasure")} {
		if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(root, "real"), 0o755); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		vol, sub string
		ok       bool
	}{
		{"e", "new/deep/dir", true}, {"e", "real", true}, {"e", "inside", true}, {"e", "inside/more", true}, {"cm", "a", true},
		{"e", "abs", false}, {"e", "abs/x", false}, {"e", "up", false}, {"e", "up/etc", false}, {"e", "abs-file", false},
		{"e", "../x", false}, {"e", "/etc", false}, {"e", "real/../../..", false},
	}
	for i, tt := range tests {
		c := &corev1.Container{Name: fmt.Sprintf("c%d", i), VolumeMounts: []corev1.VolumeMount{{Name: tt.vol, MountPath: "/m", SubPath: tt.sub}}}
		mounts, err := b.ContainerMounts(p, c, nil)
		if (err == nil) != tt.ok {
			t.Errorf("%s %q: %v, %v", tt.vol, tt.sub, mounts, err)
			continue
		}
		if err != nil {
			continue
		}
		// What is bound stays what it was, even if the name is turned into a link.
		if tt.sub == "real" {
			if err := os.Remove(filepath.Join(root, "real")); err == nil {
				_ = os.Symlink(outside, filepath.Join(root, "real"))
			}
			if _, err := os.Stat(filepath.Join(mounts[0].HostPath, "treasure")); !os.IsNotExist(err) {
				t.Errorf("the sub-path leads outside: %v", err)
			}
			_ = os.Remove(filepath.Join(root, "real"))
			if err := os.Mkdir(filepath.Join(root, "real"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	if st, err := os.Stat(filepath.Join(root, "new", "deep", "dir")); err != nil || st.Mode().Perm() != 0o777 {
		t.Errorf("a directory made for a sub-path: %v, %v", st, err)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) != 1 {
		t.Errorf("outside: %v, %v", left, err)
	}
	// subPathExpr, and the next attempt of the same container.
	c := &corev1.Container{Name: "c", VolumeMounts: []corev1.VolumeMount{{Name: "e", MountPath: "/m", SubPathExpr: "$(X)"}}}
	for _, want := range []string{"one", "two"} {
		mounts, err := b.ContainerMounts(p, c, func(string) string { return want })
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(mounts[0].HostPath, "f"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(root, want, "f")); err != nil {
			t.Error(err)
		}
	}
	if _, err := b.ContainerMounts(p, c, func(s string) string { return s }); err == nil {
		t.Error("a variable that is not set was taken for a path")
	}
}

// What is mounted is never deleted through: a mount that cannot be undone keeps its files.
func TestUnmountLosesNothing(t *testing.T) {
	b := newBench(t)
	p := podWith(volume("e", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}))
	b.mount(t, p)
	precious := t.TempDir()
	file := filepath.Join(precious, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(b.path("uid", Of(p, "e")), "bound")
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(precious, at, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := removeHere(filepath.Join(b.podDir("uid"), "volumes")); err == nil {
		t.Error("a tree with a mount in it was removed")
	}
	// A process that still looks at it keeps nobody from cleaning up.
	held, err := os.Open(at)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := b.Unmount(context.Background(), "uid"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	if err := b.Unmount(context.Background(), ""); err == nil {
		t.Error("a pod without uid was unmounted")
	}
}
