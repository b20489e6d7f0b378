// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestHealth(t *testing.T) {
	well := NewHealth([]Fill{
		{Map: "conntrack_tcp", Used: 7, Fits: 100}, {Map: "conntrack_udp", Used: 89, Fits: 100}, {Map: "services", Used: 0, Fits: 10},
	}, nil)
	if got := well.Troubles(); len(got) != 0 {
		t.Errorf("%q", got)
	}
	if got, want := well.Connections(), "entries in use: 7 of 100 TCP, 89 of 100 UDP; for want of room: 0 TCP driven out, 0 not noted, 0 UDP driven out, 0 not noted"; got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
	var problems []string
	for i := range 23 {
		problems = append(problems, fmt.Sprintf("service default/s%02d", 22-i))
	}
	ill := NewHealth([]Fill{
		{Map: "conntrack_tcp", Used: 90, Fits: 100, Evicted: 3}, {Map: "conntrack_udp", Used: 1, Fits: 100, Failed: 2}, {Map: "services", Used: 10, Fits: 10},
	}, problems)
	got := ill.Troubles()
	if len(got) != 4+20+1 {
		t.Fatalf("%d troubles: %q", len(got), got)
	}
	for _, want := range []string{
		"map conntrack_tcp holds 90 of 100", "3 TCP connections were driven out of map conntrack_tcp", "2 UDP connections could not be noted",
		"map services holds 10 of 10", "service default/s00", "and 3 more",
	} {
		if !slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, want) }) {
			t.Errorf("nothing says %q: %q", want, got)
		}
	}
}
