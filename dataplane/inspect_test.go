// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"skep.io/skep/dataplane/inspect"
)

// TestInspect: what the maps hold, with names.
func TestInspect(t *testing.T) {
	n := newNode(t)
	pods := n.servingPods("a", "b")
	a, b := pods[0], pods[1]
	web := n.service("web", nil, b)
	n.answers(a.ns, "tcp", web.v4, "b")
	n.answers(a.ns, "udp", web.v6, "b")
	n.policy(in("b", podPeer("a"), blockPeer("192.0.2.0/24")))

	frontends, err := n.dp.Frontends()
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, f := range frontends {
		if f.Service != "web" || f.Namespace != "default" || len(f.Backends) != 1 {
			t.Errorf("frontend %+v", f)
		}
		switch {
		case f.Address == web.v4 && f.Protocol == "TCP" && f.Scope == "internal" && f.Backends[0] == at(b.v4(), 8080),
			f.Address == web.v6 && f.Protocol == "UDP" && f.Scope == "internal" && f.Backends[0] == at(b.v6(), 8080),
			f.Address == netip.AddrPortFrom(netip.IPv4Unspecified(), web.node) && f.Scope == "external" && f.Protocol == "TCP":
			found++
		}
	}
	if found != 3 || len(frontends) != 12 { // two families, two protocols, ClusterIP and two scopes of the NodePort
		t.Errorf("%d of 3 found among %d: %+v", found, len(frontends), frontends)
	}
	backends, err := n.dp.Backends()
	if err != nil || len(backends) != 4 {
		t.Errorf("%d backends, %v", len(backends), err)
	}
	for _, x := range backends {
		if x.Pod != "b" || x.Service != "web" || x.Port != 8080 || x.State != "active" {
			t.Errorf("backend %+v", x)
		}
	}

	var sets []inspect.PolicySet
	eventually(t, "the policy", func() error {
		if sets, err = n.dp.PolicySets(); err == nil && sets[2].State != inspect.Judged {
			err = errors.New("it is not in force")
		}
		return err
	})
	if len(sets) != 4 || sets[0].Pod != "a" || sets[0].State != inspect.Open || sets[3].State != inspect.Open {
		t.Fatalf("sets %+v", sets)
	}
	in := sets[2]
	if in.Pod != "b" || in.Direction != "ingress" || !slices.Equal(in.Policies, []string{"default/in-b"}) || len(in.Rules) != 6 {
		t.Fatalf("set %+v", in)
	}
	rules := map[string]bool{}
	for _, r := range in.Rules {
		if r.First != 8080 || r.Last != 8080 || r.Anybody {
			t.Errorf("rule %+v", r)
		}
		if len(r.Peers) == 2 && r.Peers[0].Pod == "a" && r.Peers[0].Address == a.v4() && r.Peers[1].Address == a.v6() {
			rules["pod "+r.Protocol] = true
		}
		if fmt.Sprint(r.Blocks) == "[192.0.2.0/24]" {
			rules["block "+r.Protocol] = true
		}
	}
	if len(rules) != 6 {
		t.Errorf("rules %v of %+v", rules, in.Rules)
	}
	endpoints, err := n.dp.Endpoints()
	if err != nil || len(endpoints) != 4 || endpoints[0].Pod != "a" || endpoints[0].Address != a.v4() || endpoints[2].Ingress != inspect.Judged ||
		endpoints[2].Egress != inspect.Open || int(endpoints[0].Ifindex) != a.Ifindex || endpoints[0].PodMAC != a.PodMAC.String() {
		t.Errorf("endpoints %+v, %v", endpoints, err)
	}

	defer n.hold(a.ns, web.v4).Close()
	connections, err := n.dp.Connections()
	if err != nil {
		t.Fatal(err)
	}
	found = 0
	for _, c := range connections {
		if c.Source.Pod == "a" && c.Destination.Pod == "b" && c.Destination.Port == 8080 && c.Service == "web" && c.To == nil {
			found++
			if c.State != "established" {
				t.Errorf("connection %+v", c)
			}
		}
	}
	if found != 2 {
		t.Errorf("%d connections: %+v", found, connections)
	}
	if _, _, err := n.askAs(n.outside, "tcp", web.at(nodeV4)); err != nil {
		t.Fatal(err)
	}
	if connections, err = n.dp.Connections(); err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(connections, func(c inspect.Connection) bool {
		return c.Source.Address == outsideV4 && c.Destination.Node == "node-1" && c.To != nil && c.To.Pod == "b" && c.From != nil && c.From.Node == "node-1" && c.Service == "web"
	}) {
		t.Errorf("no NodePort connection among %+v", connections)
	}
}
