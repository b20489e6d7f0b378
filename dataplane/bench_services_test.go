// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bufio"
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kruntime "k8s.io/apimachinery/pkg/runtime"

	"skep.io/skep/dataplane/loader"
	"skep.io/skep/dataplane/services"
)

// BenchmarkManyServices has 1, 1,000, 10,000 and 50,000 services, and measures at each size new connections through one of
// them, one after another, beside two clean namespaces on a veth pair, a router without rules, the pod itself, and
// (up to 1,000) kube-proxy's rules in nftables and iptables; and at the end how long an agent that starts with nothing needs
// until 50,000 services are in the kernel (of which some is the API's list), how long writing them takes by itself, and
// what one of them takes of memory (the process's with the informer's copies of Service and EndpointSlice). -benchtime=5x or more.
func BenchmarkManyServices(b *testing.B) {
	if testing.Short() {
		b.Skip("a minute")
	}
	n := newNode(b)
	client, server := n.pod("client"), n.pod("server")
	acceptAll(b, server.ns)
	web := n.service("web", nil, server)
	cleanClient, cleanServer := cleanPair(b)
	acceptAll(b, cleanServer)
	plain := newRouter(b)
	acceptAll(b, plain.server)
	alone := n.usage(b)
	have := 1
	for _, size := range []int{1, 1_000, 10_000, 50_000} {
		lines := []line{
			{"clean", cleanClient, netip.MustParseAddrPort("198.51.100.2:8080")},
			{"routed", plain.client, routedServer},
			{"direct", client.ns, at(server.v4(), 8080)},
			{"clusterip", client.ns, web.v4},
		}
		if size <= 1_000 {
			services := proxiedServices(size, proxied{peerService, 0, "tcp", routedServer})
			for name, rules := range map[string]string{"nftables": kubeProxyNFT(services), "iptables": kubeProxyIPTables(services)} {
				r := newRouter(b)
				acceptAll(b, r.server)
				r.feed(b, rules, map[string][]string{"nftables": {"nft", "-f", "-"}, "iptables": {"iptables-restore"}}[name]...)
				lines = append(lines, line{name, r.client, peerService})
			}
		}
		n.stop()
		for ; have < size; have++ {
			svc, eps := manyService(have, server.v4())
			for _, o := range []kruntime.Object{svc, eps} {
				if err := n.client.Tracker().Add(o); err != nil { // no informer runs
					b.Fatal(err)
				}
			}
		}
		n.start()
		connectInTurn(b, fmt.Sprintf("%d-", size), lines)
	}

	n.stop()
	if err := Cleanup(b.Context(), n.cfg.BPFDir); err != nil {
		b.Fatal(err)
	}
	n.dp, n.cfg.Informers = nil, nil
	before := heap()
	n.start()
	b.ReportMetric(n.synced.Seconds(), "s-to-sync-50000")
	b.ReportMetric(float64(heap()-before)/50_000, "process-bytes/service")
	used := n.usage(b)
	b.ReportMetric(float64(used-alone)/50_000, "kernel-bytes/service")
	b.ReportMetric(float64(alone), "kernel-bytes-at-1")
	n.stop()
	b.ReportMetric(program(b, 50_000).Seconds(), "s-to-program-50000")
	b.ReportMetric(0, "ns/op")
}

// line is one of the ways that are compared.
type line struct {
	name string
	from namespace
	to   netip.AddrPort
}

// connectInTurn reports connections a second of each line, and its median ratio to the first.
func connectInTurn(b *testing.B, prefix string, lines []line) {
	b.Helper()
	const connections = 2000
	took := make([][]float64, len(lines))
	for _, l := range lines {
		eventually(b, l.name, func() error { return l.from.try(func() error { return connectTimes(l.to, 10) }) })
	}
	for round := range b.N {
		for i := range lines {
			k := (i + round) % len(lines) // no line always comes first
			l := lines[k]
			l.from.do(b, func() error {
				begin := time.Now()
				err := connectTimes(l.to, connections)
				took[k] = append(took[k], time.Since(begin).Seconds())
				return err
			})
		}
	}
	for k, l := range lines {
		rates, ratios := make([]float64, b.N), make([]float64, b.N)
		for r := range b.N {
			rates[r] = connections / took[k][r]
			ratios[r] = took[0][r] / took[k][r]
		}
		b.ReportMetric(median(rates), prefix+l.name+"/s")
		if k > 0 {
			b.ReportMetric(median(ratios), prefix+l.name+":"+lines[0].name)
		}
	}
}

// manyService is the i-th of many, with one endpoint.
func manyService(i int, backend netip.Addr) (*corev1.Service, *discoveryv1.EndpointSlice) {
	name := fmt.Sprint("many-", i)
	address := netip.AddrFrom4([4]byte{10, 143, byte(32 + i>>8), byte(i)}).String()
	eps := slice(name, 0, discoveryv1.AddressTypeIPv4, 8080)
	eps.Ports = eps.Ports[:1]
	eps.Endpoints = []discoveryv1.Endpoint{{Addresses: []string{backend.String()}, NodeName: ptr("node-1")}}
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: address, ClusterIPs: []string{address}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{{Name: "tcp", Protocol: corev1.ProtocolTCP, Port: 80}},
		},
	}, eps
}

// program writes so many services into empty maps, from objects to the kernel, and says how long it took.
func program(b *testing.B, many int) time.Duration {
	b.Helper()
	dir := filepath.Join("/sys/fs/bpf", fmt.Sprint("program-", time.Now().UnixNano()))
	l, err := loader.Load(loader.Config{Dir: dir, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	defer func() { _ = loader.Cleanup(dir) }()
	r, err := services.NewReconciler(l.Maps())
	if err != nil {
		b.Fatal(err)
	}
	svcs, slices := make([]*corev1.Service, many), make([][]*discoveryv1.EndpointSlice, many)
	for i := range many {
		svc, eps := manyService(i, podB[0])
		svcs[i], slices[i] = svc, []*discoveryv1.EndpointSlice{eps}
	}
	runtime.GC()
	begin := time.Now()
	for i, svc := range svcs {
		if err := r.Apply(svc.Name, services.Build(svc, slices[i], services.Place{Node: "node-1"}).Sets); err != nil {
			b.Fatal(err)
		}
	}
	return time.Since(begin)
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// usage is what the pinned maps take of the kernel's memory, in bytes.
func (n *testNode) usage(b *testing.B) (bytes uint64) {
	b.Helper()
	pins, err := filepath.Glob(filepath.Join(n.cfg.BPFDir, "maps-*", "*"))
	if err != nil || len(pins) == 0 {
		b.Fatalf("pinned maps: %v, %v", pins, err)
	}
	for _, pin := range pins {
		m, err := ebpf.LoadPinnedMap(pin, nil)
		if err != nil {
			b.Fatal(err)
		}
		bytes += memlock(b, m.FD())
		m.Close()
	}
	return bytes
}

// memlock is what the kernel says of a map's memory.
func memlock(b *testing.B, fd int) uint64 {
	b.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		b.Fatal(err)
	}
	for s := bufio.NewScanner(bytes.NewReader(raw)); s.Scan(); {
		if value, ok := bytes.CutPrefix(s.Bytes(), []byte("memlock:\t")); ok {
			n, err := strconv.ParseUint(string(value), 10, 64)
			if err != nil {
				b.Fatal(err)
			}
			return n
		}
	}
	b.Fatal("the kernel does not tell what a map takes")
	return 0
}
