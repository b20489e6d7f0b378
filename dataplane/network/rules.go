// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/coreos/go-iptables/iptables"
)

// chain is one of skep's own chains, reached from a built-in one.
type chain struct {
	table, from, name string
	rules             [][]string
}

// Chains lists skep's chains for one family. It is pure.
func chains(cfg Config, podCIDRs []netip.Prefix, v6 bool) []chain {
	same := func(in []netip.Prefix) []string {
		var out []string
		for _, p := range in {
			if p.Addr().Is6() == v6 {
				out = append(out, p.Masked().String())
			}
		}
		return out
	}
	pods, cluster, services := same(podCIDRs), same(cfg.ClusterCIDRs), same(cfg.ServiceCIDRs)
	inside := append(slices.Clone(cluster), services...)

	forward := chain{table: "filter", from: "FORWARD", name: "SKEP-FORWARD"}
	for _, c := range cluster {
		forward.rules = append(forward.rules, []string{"-s", c, "-j", "ACCEPT"}, []string{"-d", c, "-j", "ACCEPT"})
	}
	masquerade := chain{table: "nat", from: "POSTROUTING", name: "SKEP-POSTROUTING"}
	for _, c := range inside {
		masquerade.rules = append(masquerade.rules, []string{"-d", c, "-j", "RETURN"})
	}
	for _, p := range pods {
		masquerade.rules = append(masquerade.rules, []string{"-s", p, "-j", "MASQUERADE", "--random-fully"})
	}
	// Connections inside the cluster need no tracking by netfilter: nothing of it translates them, and
	// looking them up costs more than skep's own work.
	untracked := chain{table: "raw", from: "PREROUTING", name: "SKEP-UNTRACKED"}
	answers := chain{table: "raw", from: "OUTPUT", name: "SKEP-UNTRACKED-OUT"}
	for _, s := range cluster {
		for _, d := range inside {
			rule := []string{"-s", s, "-d", d, "-j", "CT", "--notrack"}
			untracked.rules = append(untracked.rules, rule)
		}
	}
	for _, s := range inside {
		for _, d := range cluster {
			answers.rules = append(answers.rules, []string{"-s", s, "-d", d, "-j", "CT", "--notrack"})
		}
	}
	return []chain{forward, masquerade, untracked, answers}
}

// families are the iptables commands that exist on this host.
func families(ctx context.Context) (map[iptables.Protocol]*iptables.IPTables, error) {
	out := map[iptables.Protocol]*iptables.IPTables{}
	var errs []error
	for _, p := range []iptables.Protocol{iptables.ProtocolIPv4, iptables.ProtocolIPv6} {
		t, err := iptables.New(iptables.IPFamily(p), iptables.Timeout(5))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out[p] = t
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no iptables on this host (install the package iptables): %w", errors.Join(errs...))
	}
	return out, ctx.Err()
}

func ensureRules(ctx context.Context, cfg Config, podCIDRs []netip.Prefix) error {
	commands, err := families(ctx)
	if err != nil {
		return err
	}
	if _, ok := commands[iptables.ProtocolIPv6]; !ok && HasIPv6() {
		cfg.Log.Warn("no ip6tables on this host: IPv6 traffic of pods that leaves the cluster is not masqueraded")
	}
	errs := make([]error, 2)
	var wg sync.WaitGroup
	for p, t := range commands {
		v6 := p == iptables.ProtocolIPv6
		if v6 && !HasIPv6() {
			continue
		}
		i := 0
		if v6 {
			i = 1
		}
		wg.Go(func() {
			for _, c := range chains(cfg, podCIDRs, v6) {
				if err := c.ensure(t); err != nil {
					errs[i] = errors.Join(errs[i], fmt.Errorf("%s chain %s in table %s: %w", familyName(v6), c.name, c.table, err))
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// ensure makes chain and jump if they are not there, or not as they should be.
func (c chain) ensure(t *iptables.IPTables) error {
	exists, err := t.ChainExists(c.table, c.name)
	if err != nil {
		return err
	}
	if !exists {
		if err := t.NewChain(c.table, c.name); err != nil {
			return err
		}
	}
	have, err := t.List(c.table, c.name) // its first line is the chain itself
	if err != nil {
		return err
	}
	if !sameRules(have, c.rules) {
		if err := t.ClearChain(c.table, c.name); err != nil {
			return err
		}
		for _, r := range c.rules {
			if err := t.Append(c.table, c.name, r...); err != nil {
				return err
			}
		}
	}
	return t.InsertUnique(c.table, c.from, 1, c.jump()...)
}

func (c chain) jump() []string {
	return []string{"-m", "comment", "--comment", "skep", "-j", c.name}
}

// sameRules compares what iptables lists ("-A CHAIN -s ... -j ...") with what is wanted.
func sameRules(have []string, want [][]string) bool {
	if len(have) != len(want)+1 {
		return false
	}
	for i, rule := range want {
		listed := strings.Fields(have[i+1])
		if len(listed) < 2 || !slices.Equal(listed[2:], rule) {
			return false
		}
	}
	return true
}

func removeRules(ctx context.Context) error {
	commands, err := families(ctx)
	if err != nil {
		return nil // no iptables, no rules
	}
	var errs []error
	for p, t := range commands {
		for _, c := range chains(Config{}, nil, p == iptables.ProtocolIPv6) {
			exists, err := t.ChainExists(c.table, c.name)
			if err != nil || !exists {
				continue
			}
			errs = append(errs, t.DeleteIfExists(c.table, c.from, c.jump()...), t.ClearAndDeleteChain(c.table, c.name))
		}
	}
	return errors.Join(errs...)
}

func familyName(v6 bool) string {
	if v6 {
		return "ip6tables"
	}
	return "iptables"
}
