// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"skep.io/skep/node/eviction"
)

func TestParseDevices(t *testing.T) {
	const text = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:    1000      10    0    0    0     0          0         0     1000      10    0    0    0     0       0          0
  eth0:  123456     100    3    0    0     0          0         0   654321     200    4    0    0     0       0          0
skep01234567:  1     1    1    1    1     1          1         1        1      1    1    1    1     1       1          1
broken: x 1 2 3 4 5 6 7 8 9 10 11
`
	var got []string
	for _, d := range parseDevices(text) {
		got = append(got, fmt.Sprint(d.Name, " ", *d.RxBytes, " ", *d.RxErrors, " ", *d.TxBytes, " ", *d.TxErrors))
	}
	if diff := cmp.Diff([]string{"eth0 123456 3 654321 4"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestSummaryOfDisk(t *testing.T) {
	var measured int
	var fail error
	s := newServer(t, func(c *Config) {
		c.DataDir = t.TempDir()
		c.Disk = func(_ context.Context, p *corev1.Pod) (eviction.PodDisk, error) {
			measured++
			return eviction.PodDisk{
				Containers: map[string]eviction.ContainerDisk{"main": {Writable: eviction.Tree{Bytes: 100, Inodes: 1}, Logs: eviction.Tree{Bytes: 20, Inodes: 2}}},
				Volumes:    map[string]eviction.Tree{"v": {Bytes: 3, Inodes: 3}, "memory": {Bytes: 50, Inodes: 5}},
			}, fail
		}
	})
	s.node.pod.Spec.Volumes = []corev1.Volume{
		{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		{Name: "memory", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory}}},
		{Name: "host", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}},
	}
	s.node.containers[0].Cgroup, s.node.containers[0].PID = "/", uint32(os.Getpid())
	get := func(query string) (out stats.Summary) {
		t.Helper()
		code, body := s.get(s.client("admin", "system:masters"), "/stats/summary"+query)
		if code != 200 {
			t.Fatalf("%d: %s", code, body)
		}
		if err := json.Unmarshal([]byte(body), &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	got := get("")
	if n := got.Node; n.Fs == nil || *n.Fs.CapacityBytes == 0 || n.Runtime == nil || n.Network == nil || n.Rlimit == nil || *n.Rlimit.MaxPID == 0 {
		t.Errorf("node %+v", n)
	}
	p := got.Pods[0]
	if len(p.Containers) != 1 || *p.Containers[0].Rootfs.UsedBytes != 100 || *p.Containers[0].Logs.UsedBytes != 20 || *p.Containers[0].Logs.InodesUsed != 2 {
		t.Errorf("containers %+v", p.Containers)
	}
	if len(p.VolumeStats) != 2 || p.VolumeStats[0].Name != "v" || *p.VolumeStats[0].UsedBytes != 3 || *p.EphemeralStorage.UsedBytes != 123 || p.Network == nil {
		t.Errorf("volumes %+v, in all %v, network %v", p.VolumeStats, p.EphemeralStorage, p.Network)
	}
	if got := get("?only_cpu_and_memory=true"); got.Node.Fs != nil || got.Pods[0].EphemeralStorage != nil || got.Pods[0].Network != nil || measured != 1 {
		t.Errorf("measured %d times: %+v", measured, got.Node)
	}
	fail = errors.New("gone")
	if got := get(""); got.Pods[0].EphemeralStorage != nil || got.Node.Fs == nil {
		t.Errorf("with an error: %+v", got.Pods[0])
	}
}
