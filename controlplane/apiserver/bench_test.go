// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// BenchmarkStart reports what an empty control plane costs: milliseconds from opening the store to
// /readyz for a new and for an existing data directory, and what is resident once idle.
func BenchmarkStart(b *testing.B) {
	for b.Loop() {
		dir := b.TempDir()
		s := start(b, dir)
		b.ReportMetric(float64(s.toReady.Milliseconds()), "ms-to-ready-new")
		s.stop()
		s = start(b, dir)
		b.ReportMetric(float64(s.toReady.Milliseconds()), "ms-to-ready-again")
		s.stop()
	}
}

// BenchmarkIdle lets one server be for a while, gives memory back once and reports what stays.
func BenchmarkIdle(b *testing.B) {
	s := start(b, b.TempDir())
	for b.Loop() {
		time.Sleep(3 * time.Second)
		debug.FreeOSMemory()
		cpu, begin := cpuTime(b), time.Now()
		time.Sleep(10 * time.Second)
		b.ReportMetric(100*float64(cpuTime(b)-cpu)/float64(time.Since(begin)), "%CPU")
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		b.ReportMetric(float64(m.HeapAlloc)/(1<<20), "MiB-heap")
		b.ReportMetric(status(b, "VmRSS:")/1024, "MiB-rss")
		b.ReportMetric(status(b, "RssAnon:")/1024, "MiB-private")
		b.ReportMetric(float64(runtime.NumGoroutine()), "goroutines")
	}
	s.stop()
}

// BenchmarkCreate is the cost of one write through the whole API, from inside the process.
func BenchmarkCreate(b *testing.B) {
	s := start(b, b.TempDir())
	n := 0
	for b.Loop() {
		n++
		_, err := s.client.CoreV1().ConfigMaps("default").Create(b.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "c" + strconv.Itoa(n)}}, metav1.CreateOptions{})
		if err != nil {
			b.Fatal(err)
		}
	}
	s.stop()
}

// BenchmarkGet is the cost of one read through the whole API, from inside the process.
func BenchmarkGet(b *testing.B) {
	s := start(b, b.TempDir())
	for b.Loop() {
		if _, err := s.client.CoreV1().Namespaces().Get(b.Context(), "default", metav1.GetOptions{}); err != nil {
			b.Fatal(err)
		}
	}
	s.stop()
}

// status reads a number of kilobytes from /proc/self/status.
func status(b *testing.B, key string) float64 {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == key {
			n, _ := strconv.ParseFloat(f[1], 64)
			return n
		}
	}
	b.Fatalf("no %s in /proc/self/status", key)
	return 0
}

// cpuTime is what this process has used so far.
func cpuTime(b *testing.B) time.Duration {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}
