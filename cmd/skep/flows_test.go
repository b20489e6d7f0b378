// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"skep.io/skep/dataplane/flows"
)

func TestFlowFilter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	f := flows.Flow{
		Time: now.Add(-time.Minute), Node: "n", Verdict: flows.Dropped, Reason: "policy-ingress", Direction: "ingress",
		Policies: []string{"shop/deny", "shop/other"}, Protocol: "TCP",
		Source:      flows.Peer{Address: netip.MustParseAddr("10.42.0.2"), Port: 40000, Namespace: "team", Pod: "client"},
		Destination: flows.Peer{Address: netip.MustParseAddr("fd00::3"), Port: 8080, Namespace: "shop", Pod: "web-0"},
		Service:     &flows.Service{Namespace: "shop", Name: "web", Address: netip.MustParseAddrPort("10.43.0.1:80")},
	}
	node := flows.Flow{Time: now, Verdict: flows.Forwarded, Source: flows.Peer{Node: "n1", Address: netip.MustParseAddr("192.0.2.1")}}
	for _, c := range []struct {
		name string
		with flowFlags
		want bool
		flow *flows.Flow
	}{
		{"nothing", flowFlags{}, true, &f},
		{"from", flowFlags{from: []string{"client"}}, true, &f},
		{"from the destination", flowFlags{from: []string{"web-0"}}, false, &f},
		{"from, of another namespace", flowFlags{from: []string{"shop/client"}}, false, &f},
		{"from, of its namespace", flowFlags{from: []string{"x", "team/client"}}, true, &f},
		{"from pod/", flowFlags{from: []string{"pod/client"}}, true, &f},
		{"from pod/ with a namespace", flowFlags{from: []string{"pod/team/client"}}, true, &f},
		{"from address", flowFlags{from: []string{"10.42.0.2"}}, true, &f},
		{"from range", flowFlags{from: []string{"10.42.0.0/24"}}, true, &f},
		{"from another range", flowFlags{from: []string{"10.43.0.0/24"}}, false, &f},
		{"from node", flowFlags{from: []string{"node/n1"}}, true, &node},
		{"from another node", flowFlags{from: []string{"node/n1"}}, false, &f},
		{"to", flowFlags{to: []string{"fd00::/64"}}, true, &f},
		{"pod as source", flowFlags{pods: []string{"client"}}, true, &f},
		{"pod as destination", flowFlags{pods: []string{"shop/web-0"}}, true, &f},
		{"pod and from", flowFlags{pods: []string{"web-0"}, from: []string{"client"}}, true, &f},
		{"service", flowFlags{services: []string{"web"}}, true, &f},
		{"service of another namespace", flowFlags{services: []string{"team/web"}}, false, &f},
		{"no service", flowFlags{services: []string{"web"}}, false, &node},
		{"namespace of the source", flowFlags{namespaces: []string{"team"}}, true, &f},
		{"namespace of the destination", flowFlags{namespaces: []string{"shop"}}, true, &f},
		{"another namespace", flowFlags{namespaces: []string{"other"}}, false, &f},
		{"verdict", flowFlags{verdicts: []string{"Dropped"}}, true, &f},
		{"another verdict", flowFlags{verdicts: []string{"forwarded", "refused"}}, false, &f},
		{"reason", flowFlags{reasons: []string{"policy-ingress"}}, true, &f},
		{"policy", flowFlags{policies: []string{"other"}}, true, &f},
		{"another policy", flowFlags{policies: []string{"team/deny"}}, false, &f},
		{"protocol", flowFlags{protocols: []string{"tcp"}}, true, &f},
		{"another protocol", flowFlags{protocols: []string{"udp"}}, false, &f},
		{"port", flowFlags{ports: []string{"8080"}}, true, &f},
		{"the service's port", flowFlags{ports: []string{"80"}}, true, &f},
		{"the source's port", flowFlags{ports: []string{"40000"}}, false, &f},
		{"since", flowFlags{since: 2 * time.Minute}, true, &f},
		{"too old", flowFlags{since: 30 * time.Second}, false, &f},
	} {
		filter, err := c.with.filter(now)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if got := filter.matches(c.flow); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
	for want, bad := range map[string]flowFlags{
		"--from":    {from: []string{""}},
		"--to":      {to: []string{"a/"}},
		"--port":    {ports: []string{"http"}},
		"--verdict": {verdicts: []string{"allowed"}},
	} {
		if _, err := bad.filter(now); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestFlowLine(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.Local)
	f := flows.Flow{
		Time: at, Node: "n", Verdict: flows.Dropped, Reason: "policy-ingress", Policies: []string{"shop/deny"}, Protocol: "TCP", Suppressed: 7,
		Source:      flows.Peer{Address: netip.MustParseAddr("fd00::2"), Port: 40000},
		Destination: flows.Peer{Address: netip.MustParseAddr("10.42.0.3"), Port: 8080, Namespace: "shop", Pod: "web-0"},
		Service:     &flows.Service{Namespace: "shop", Name: "web", Address: netip.MustParseAddrPort("10.43.0.1:80")},
	}
	want := "... 7 more on node n before this\n" +
		"03:04:05.006  [fd00::2]:40000 -> shop/web-0:8080  TCP  dropped  service shop/web  policy-ingress: shop/deny"
	if got := flowLine(&f, false); got != want {
		t.Errorf("%s", got)
	}
	want = "... 7 more on node n before this\n" +
		"03:04:05.006  [fd00::2]:40000 -> shop/web-0(10.42.0.3):8080  TCP  dropped  service shop/web (10.43.0.1:80)  policy-ingress: shop/deny  on node n"
	if got := flowLine(&f, true); got != want {
		t.Errorf("%s", got)
	}
	refused := flows.Flow{Time: at, Verdict: flows.Refused, Reason: "no-backend", Protocol: "TCP",
		Source: flows.Peer{Node: "n"}, Destination: flows.Peer{Address: netip.MustParseAddr("10.43.0.1"), Port: 80}}
	if got := flowLine(&refused, false); got != "03:04:05.006  node/n -> 10.43.0.1:80  TCP  refused  no-backend" {
		t.Errorf("%s", got)
	}
}
