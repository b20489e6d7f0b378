// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"
	"testing"

	"skep.io/skep/controlplane/pki"
)

// A step waits for the nodes that it would lock out, and for no others.
func TestAuthorityStepsWait(t *testing.T) {
	server := authorityNode{name: "s", server: true}
	node := func(trusts, signedBy string) authorityNode {
		return authorityNode{name: "n", trusts: trusts, signedBy: signedBy}
	}
	for what, c := range map[string]struct {
		stage pki.Stage
		node  authorityNode
		waits bool
		shows string
	}{
		"nothing to wait for":     {stage: pki.Settled, node: node("", ""), shows: "skep ca prepare"},
		"does not trust the next": {stage: pki.Prepared, node: node("aa", "aa"), waits: true, shows: "skep ca switch"},
		"trusts the next":         {stage: pki.Prepared, node: node("aa,bb", "aa")},
		"is of an older version":  {stage: pki.Prepared, node: node("", ""), waits: true},
		"has the old certificate": {stage: pki.Switched, node: node("aa,cc", "cc"), waits: true, shows: "cc came before"},
		"has a new certificate":   {stage: pki.Switched, node: node("aa,cc", "aa"), shows: "skep ca finish"},
	} {
		s := authorityStatus{stage: c.stage, signs: "aa", next: "bb", left: "cc", nodes: []authorityNode{server, c.node}}
		if waits := slices.Contains(s.waiting(), "n"); waits != c.waits || slices.Contains(s.waiting(), "s") {
			t.Errorf("%s: waits for %v", what, s.waiting())
		}
		var out strings.Builder
		if err := s.print(&out); err != nil || !strings.Contains(out.String(), c.shows) {
			t.Errorf("%s: %v\n%s", what, err, out.String())
		}
	}
}

// Of several servers each has to have taken the step before; one that is no node at the moment, too.
func TestAuthorityStepsWaitForServers(t *testing.T) {
	nodes := []authorityNode{{name: "a"}, {name: "b"}, {name: "n", trusts: "aa,bb"}}
	s := authorityStatus{stage: pki.Prepared, several: true, signs: "aa", next: "bb", nodes: withServers(nodes, []string{"a", "b", "c"}, []string{"b", "c"})}
	if got := s.waiting(); !slices.Equal(got, []string{"b", "c"}) {
		t.Errorf("waits for %v", got)
	}
	var out strings.Builder
	if err := s.print(&out); err != nil || strings.Count(out.String(), "restart it") != 2 {
		t.Errorf("%v\n%s", err, out.String())
	}
}
