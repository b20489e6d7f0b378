// SPDX-License-Identifier: Apache-2.0

package eviction

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/apis/scheduling"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		"":                     "",
		Defaults:               "memory.available=100Mi nodefs.available=15% nodefs.inodesFree=5%",
		"memory.available<1Gi": "memory.available=1Gi",
		" pid.available<10% , memory.available<5%":   "memory.available=5% pid.available=10%",
		"memory.available<0,pid.available<0%":        "",
		"nodefs.available<2Gi,imagefs.available<1Gi": "nodefs.available=2Gi",
		"imagefs.available<20%":                      "nodefs.available=20%",
		// What is wrong, and the word that says so.
		"memory.available":                          "!SIGNAL<QUANTITY",
		"memory.available>5%":                       "!SIGNAL<QUANTITY",
		"cpu.available<5%":                          "!is not a signal",
		"memory.available<5%,memory.available<6%":   "!given twice",
		"memory.available<-5%":                      "!percentage",
		"memory.available<101%":                     "!percentage",
		"memory.available<lots":                     "!neither",
		"memory.available<-1Gi":                     "!neither",
		"nodefs.available<1Gi,imagefs.available<5%": "!one file system",
	} {
		got, err := Parse(text)
		if msg, bad := strings.CutPrefix(want, "!"); bad {
			if err == nil || !strings.Contains(err.Error(), msg) {
				t.Errorf("%q: error %v, want %q", text, err, msg)
			}
			continue
		}
		var list []string
		for _, s := range slices.Sorted(maps.Keys(got)) {
			v := got[s].Quantity.String()
			if got[s].Quantity == nil {
				v = resource.NewQuantity(int64(got[s].Percent), resource.DecimalSI).String() + "%"
			}
			list = append(list, string(s)+"="+v)
		}
		if s := strings.Join(list, " "); err != nil || s != want {
			t.Errorf("%q: %q, %v; want %q", text, s, err, want)
		}
	}
}

type change func(*Pod)

func pod(name string, changes ...change) *Pod {
	p := &Pod{Pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name)}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c"}}}}}
	for _, c := range changes {
		c(p)
	}
	return p
}

func asks(name corev1.ResourceName, q string) change {
	return func(p *Pod) {
		p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{name: resource.MustParse(q)}
	}
}

func priority(n int32) change { return func(p *Pod) { p.Spec.Priority = &n } }

func uses(memory, disk int64) change {
	return func(p *Pod) {
		p.Usage.Memory, p.Usage.Disk = memory<<20, disk<<20
		p.Usage.Containers = map[string]ContainerUsage{"c": {Memory: memory << 20, Disk: disk << 20}}
	}
}

func counts(inodes, pids int64) change {
	return func(p *Pod) { p.Usage.Inodes, p.Usage.Pids = inodes, pids }
}

// The documented order: over the request first, then by priority, then by how much over.
func TestRank(t *testing.T) {
	memory := asks(corev1.ResourceMemory, "100Mi")
	disk := asks(corev1.ResourceEphemeralStorage, "100Mi")
	for _, c := range []struct {
		signal Signal
		want   string
		pods   []*Pod
	}{
		{Memory, "best guaranteed", []*Pod{pod("guaranteed", memory, uses(90, 0)), pod("best", uses(10, 0))}},
		{Memory, "over under", []*Pod{pod("under", memory, uses(99, 0)), pod("over", memory, uses(101, 0), priority(1000))}},
		{Memory, "low high", []*Pod{pod("high", uses(500, 0), priority(10)), pod("low", uses(1, 0), priority(1))}},
		{Memory, "more less", []*Pod{pod("less", uses(5, 0)), pod("more", uses(50, 0))}},
		{Memory, "near far", []*Pod{pod("far", memory, uses(10, 0)), pod("near", memory, uses(90, 0))}},
		{Disk, "over under", []*Pod{pod("under", disk, uses(900, 50)), pod("over", disk, uses(0, 150))}},
		{Disk, "full empty", []*Pod{pod("empty", uses(900, 0)), pod("full", uses(0, 10))}},
		{Inodes, "many few", []*Pod{pod("few", counts(10, 900)), pod("many", counts(1000, 1))}},
		{Inodes, "low high", []*Pod{pod("high", counts(1000, 1), priority(5)), pod("low", counts(1, 1))}},
		{Pids, "many few", []*Pod{pod("few", counts(900, 3)), pod("many", counts(1, 300))}},
	} {
		rank(c.pods, c.signal)
		var got []string
		for _, p := range c.pods {
			got = append(got, p.Name)
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%s: %s, want %s", c.signal, s, c.want)
		}
	}
}

func TestChoose(t *testing.T) {
	short := Shortage{Signal: Memory, Threshold: 100 << 20, Available: 60 << 20}
	static := pod("static", uses(900, 0), func(p *Pod) { p.Static = true })
	system := pod("system", uses(900, 0), priority(scheduling.SystemCriticalPriority))
	if got := Choose(short, []*Pod{static, system}); got != nil {
		t.Errorf("a critical pod is evicted: %+v", got)
	}
	got := Choose(short, []*Pod{static, system, pod("a", uses(20, 0)), pod("b", asks(corev1.ResourceMemory, "10Mi"), uses(200, 0))})
	want := "The node was low on resource: memory. Threshold quantity: 100Mi, available: 60Mi. Container c was using 200Mi, request is 10Mi, has larger consumption of memory. "
	if got == nil || got.Pod != "b" || got.Message != want {
		t.Errorf("%+v", got)
	}
	got = Choose(Shortage{Signal: Inodes, Threshold: 50000, Available: 100}, []*Pod{pod("a", counts(5, 5))})
	if want := "The node was low on resource: inodes. Threshold quantity: 50k, available: 100. "; got == nil || got.Message != want {
		t.Errorf("%+v", got)
	}
}

func TestLook(t *testing.T) {
	thresholds, err := Parse("memory.available<100,nodefs.available<10%,nodefs.inodesFree<5%,pid.available<10")
	if err != nil {
		t.Fatal(err)
	}
	start := time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC)
	state := NewState()
	look := func(after time.Duration, levels map[Signal]Level) (string, string) {
		short, conditions := Look(Observed{start.Add(after), levels}, Policy{Hard: thresholds, Transition: 5 * time.Minute}, state)
		var s, c []string
		for _, x := range short {
			s = append(s, string(x.Signal))
		}
		for x := range conditions {
			c = append(c, string(x))
		}
		slices.Sort(c)
		return strings.Join(s, " "), strings.Join(c, " ")
	}
	fine := map[Signal]Level{Memory: {100, 1000}, Disk: {10, 100}, Inodes: {5, 100}, Pids: {10, 100}}
	for _, c := range []struct {
		after             time.Duration
		levels            map[Signal]Level
		short, conditions string
	}{
		{0, fine, "", ""},
		{time.Second, map[Signal]Level{Memory: {99, 1000}, Disk: {9, 100}, Inodes: {4, 100}, Pids: {9, 100}},
			"memory.available nodefs.available nodefs.inodesFree pid.available", "DiskPressure MemoryPressure PIDPressure"},
		{2 * time.Second, fine, "", "DiskPressure MemoryPressure PIDPressure"},
		{time.Minute, map[Signal]Level{Inodes: {4, 100}}, "nodefs.inodesFree", "DiskPressure MemoryPressure PIDPressure"},
		{5*time.Minute + time.Second, fine, "", "DiskPressure"},
		{6 * time.Minute, fine, "", ""},
		{7 * time.Minute, nil, "", ""}, // nothing could be read: nothing is claimed
	} {
		if s, cs := look(c.after, c.levels); s != c.short || cs != c.conditions {
			t.Errorf("after %s: short of %q, conditions %q; want %q, %q", c.after, s, cs, c.short, c.conditions)
		}
	}
}

// A soft threshold counts once it has been passed for its grace on end, and its condition from the first moment.
func TestLookSoft(t *testing.T) {
	soft, err := Parse("memory.available<200,nodefs.available<20%")
	if err != nil {
		t.Fatal(err)
	}
	hard, err := Parse("memory.available<100")
	if err != nil {
		t.Fatal(err)
	}
	p := Policy{Hard: hard, Soft: soft, Grace: map[Signal]time.Duration{Memory: time.Minute, Disk: 0}, Transition: -1}
	start := time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC)
	state := NewState()
	for _, c := range []struct {
		after            time.Duration
		memory, disk     int64
		short, condition string
	}{
		{0, 200, 20, "", ""},
		{time.Second, 150, 20, "", "MemoryPressure"},
		{30 * time.Second, 199, 20, "", "MemoryPressure"},
		{31 * time.Second, 200, 20, "", ""}, // enough for a moment: it begins anew
		{32 * time.Second, 150, 20, "", "MemoryPressure"},
		{62 * time.Second, 150, 20, "", "MemoryPressure"},
		{92 * time.Second, 150, 20, "memory.available soft 200", "MemoryPressure"},
		{93 * time.Second, 99, 20, "memory.available hard 100", "MemoryPressure"},
		{94 * time.Second, 150, 19, "memory.available soft 200 nodefs.available soft 20", "DiskPressure MemoryPressure"},
	} {
		short, conditions := Look(Observed{start.Add(c.after), map[Signal]Level{Memory: {c.memory, 1000}, Disk: {c.disk, 100}}}, p, state)
		var s, cs []string
		for _, x := range short {
			kind := "hard"
			if x.Soft {
				kind = "soft"
			}
			s = append(s, fmt.Sprintf("%s %s %d", x.Signal, kind, x.Threshold))
		}
		for x := range conditions {
			cs = append(cs, string(x))
		}
		slices.Sort(cs)
		if got := strings.Join(s, " "); got != c.short || strings.Join(cs, " ") != c.condition {
			t.Errorf("after %s: short of %q, conditions %v", c.after, got, cs)
		}
	}
}

func TestParseGrace(t *testing.T) {
	soft, err := Parse("memory.available<200,imagefs.available<20%")
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseGrace("memory.available=1m30s,imagefs.available=2m,nodefs.available=1m", soft)
	if err != nil || got[Memory] != 90*time.Second || got[Disk] != time.Minute || len(got) != 2 {
		t.Errorf("%v, %v", got, err)
	}
	for text, want := range map[string]string{
		"memory.available=1m":                      "nodefs.available needs one",
		"memory.available":                         "write SIGNAL=DURATION",
		"pid.available=1m":                         "has no soft threshold",
		"memory.available=1,nodefs.available=1m":   "is not a duration",
		"memory.available=-1s,nodefs.available=1m": "is not a duration",
	} {
		if _, err := ParseGrace(text, soft); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	if got, err := ParseGrace("", nil); err != nil || len(got) != 0 {
		t.Errorf("nothing: %v, %v", got, err)
	}
}

func TestOverLimit(t *testing.T) {
	dir := func(limit string, medium corev1.StorageMedium) change {
		return func(p *Pod) {
			q := resource.MustParse(limit)
			p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{SizeLimit: &q, Medium: medium}}}}
		}
	}
	has := func(mb int64) change {
		return func(p *Pod) { p.Usage.EmptyDirs = map[string]int64{"v": mb << 20}; p.Usage.Disk += mb << 20 }
	}
	limit := func(q string) change {
		return func(p *Pod) {
			p.Spec.Containers[0].Resources.Limits = corev1.ResourceList{corev1.ResourceEphemeralStorage: resource.MustParse(q)}
		}
	}
	second := func(q string) change {
		return func(p *Pod) {
			p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "d", Resources: corev1.ResourceRequirements{Limits: corev1.ResourceList{corev1.ResourceEphemeralStorage: resource.MustParse(q)}}})
		}
	}
	for _, c := range []struct {
		pod     *Pod
		limited bool
		want    string
	}{
		{pod("none", uses(0, 1000)), false, ""},
		{pod("within", dir("10Mi", ""), has(10)), true, ""},
		{pod("beyond", dir("10Mi", ""), has(11)), true, `Usage of EmptyDir volume "v" exceeds the limit "10Mi". `},
		{pod("memory", dir("10Mi", corev1.StorageMediumMemory), has(11)), false, ""},
		{pod("all", limit("10Mi"), has(11)), true, "Pod ephemeral local storage usage exceeds the total limit of containers 10Mi. "},
		{pod("one", limit("10Mi"), second("50Mi"), uses(0, 20)), true, `Container c exceeded its local ephemeral storage limit "10Mi". `},
		{pod("fits", limit("30Mi"), uses(0, 20)), true, ""},
	} {
		if got := OverLimit(c.pod); got != c.want || Limited(c.pod.Pod) != c.limited {
			t.Errorf("%s: %q, limited %v", c.pod.Name, got, Limited(c.pod.Pod))
		}
	}
}

func TestDiskUsage(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	if got, err := DiskUsage(ctx, filepath.Join(dir, "none")); err != nil || got != (Tree{}) {
		t.Errorf("nothing: %+v, %v", got, err)
	}
	at := func(name string) string { return filepath.Join(dir, "tree", name) }
	if err := os.MkdirAll(at("sub/deeper"), 0o700); err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(dir, "outside")
	for _, f := range []string{at("a"), at("sub/b"), outside} {
		if err := os.WriteFile(f, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	before, err := DiskUsage(ctx, at(""))
	if err != nil || before.Bytes < 2<<20 || before.Bytes > 2<<20+64<<10 || before.Inodes != 5 {
		t.Errorf("%+v, %v", before, err)
	}
	// A second name costs nothing, a link leads nowhere, a pipe is not opened, holes take no space.
	for _, err := range []error{
		os.Link(at("a"), at("sub/again")), os.Symlink(outside, at("link")), os.Symlink(dir, at("sub/up")), unix.Mkfifo(at("pipe"), 0o600),
		os.WriteFile(at("hole"), nil, 0o600), os.Truncate(at("hole"), 1<<30),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	after, err := DiskUsage(ctx, at(""))
	if err != nil || after.Bytes > before.Bytes+64<<10 || after.Inodes != before.Inodes+4 {
		t.Errorf("%+v, then %+v, %v", before, after, err)
	}
	if _, err := DiskUsage(ctx, at("link")); err == nil {
		t.Error("a link is followed")
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := DiskUsage(ended, at("")); !errors.Is(err, context.Canceled) {
		t.Errorf("it goes on: %v", err)
	}
}
