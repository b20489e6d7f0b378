// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"skep.io/skep/bpf"
	"skep.io/skep/dataplane/loader"
)

// BenchmarkPrograms says how long one run of each program takes on average, by the kernel's own clock, while a client
// connects to a pod and through a ClusterIP, over both families and protocols, and datagrams come to a NodePort from
// outside at XDP and at tc. The clock itself costs some 20 ns a run.
func BenchmarkPrograms(b *testing.B) {
	n := newNodeOf(b, func(c *Config) { c.XDP = loader.XDPNative })
	client, server := n.pod("client"), n.pod("server")
	serve(b, server.ns, "server", 8080)
	pod, other := n.elsewhere(1500)
	far := n.service("far", nil)
	n.endpointsAt("far", 8080, pod)
	web := n.service("web", nil, server)
	flood := newFlood(b, n.outside, 0, other, netip.AddrPortFrom(nodeV4, far.node))
	flood.warm(b)
	eventually(b, "service", func() error { _, _, err := ask(client.ns, "tcp", web.v4); return err })
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close() // which ends the count
	var names []string
	for _, load := range []func() (*ebpf.CollectionSpec, error){bpf.LoadSocket, bpf.LoadPod, bpf.LoadHost, bpf.LoadIngress, bpf.LoadXdp} {
		spec, err := load()
		if err != nil {
			b.Fatal(err)
		}
		names = append(names, slices.Collect(maps.Keys(spec.Programs))...)
	}
	total := map[string]*ebpf.ProgramStats{}
	count := func() {
		for _, name := range names {
			p := n.dp.loader.Program(name)
			if p == nil {
				continue // that for XDP, while it is off
			}
			s, err := p.Stats()
			if err != nil {
				b.Fatal(err)
			}
			if total[name] == nil {
				total[name] = &ebpf.ProgramStats{}
			}
			total[name].RunCount += s.RunCount
			total[name].Runtime += s.Runtime
		}
	}
	for range b.N {
		for _, to := range []netip.AddrPort{web.v4, web.v6, at(server.v4(), 8080), at(server.v6(), 8080)} {
			for _, network := range []string{"tcp", "udp"} {
				for range 100 {
					if _, _, err := ask(client.ns, network, to); err != nil {
						b.Fatal(err)
					}
				}
			}
		}
		flood.warm(b)
	}
	count()
	n.stop()
	n.cfg.XDP = loader.XDPOff
	n.start()
	for range b.N {
		flood.warm(b)
	}
	count()
	b.ReportMetric(0, "ns/op")
	for name, s := range total {
		if s.RunCount >= 100 {
			b.ReportMetric(float64(s.Runtime.Nanoseconds())/float64(s.RunCount), name+"-ns")
		}
	}
}
