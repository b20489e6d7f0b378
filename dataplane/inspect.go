// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/inspect"
	"skep.io/skep/dataplane/maps"
)

// Flows gives the last drops and new connections of this node to each, oldest first, and with follow those to
// come until ctx ends.
func (d *Dataplane) Flows(ctx context.Context, follow bool, each func(flows.Flow) error) error {
	return d.log.Recent(ctx, follow, each)
}

// Frontends are the addresses at which the kernel finds Services.
func (d *Dataplane) Frontends() ([]inspect.Frontend, error) {
	s, err := d.maps.ReadServices()
	return inspect.Frontends(s, flowNames{d}), err
}

// Backends are what frontends lead to.
func (d *Dataplane) Backends() ([]inspect.Backend, error) {
	s, err := d.maps.ReadServices()
	return inspect.Backends(s, flowNames{d}, d.cfg.NodeName), err
}

// slots are the policy sets of the node's pods.
func (d *Dataplane) slots() (map[netip.Addr]maps.Endpoint, map[uint32]maps.PolicySets, error) {
	all, err := d.maps.Endpoints()
	if err != nil {
		return nil, nil, err
	}
	sets := map[uint32]maps.PolicySets{}
	for _, e := range all {
		if sets[e.Slot], err = d.maps.PolicySets(e.Slot); err != nil {
			return nil, nil, err
		}
	}
	return all, sets, nil
}

// Endpoints are the addresses of the node's pods.
func (d *Dataplane) Endpoints() ([]inspect.Endpoint, error) {
	all, sets, err := d.slots()
	return inspect.Endpoints(all, sets, flowNames{d}), err
}

// PolicySets are what both directions of the node's pods must satisfy.
func (d *Dataplane) PolicySets() ([]inspect.PolicySet, error) {
	all, sets, err := d.slots()
	if err != nil {
		return nil, err
	}
	policy, identities, err := d.maps.ReadPolicy()
	if err != nil {
		return nil, err
	}
	drops := map[uint32]uint64{}
	for _, s := range sets {
		for _, set := range []uint32{s.Ingress, s.Egress} {
			if drops[set], err = d.maps.PolicyDrops(set); err != nil {
				return nil, err
			}
		}
	}
	return inspect.PolicySets(all, sets, policy, identities, drops, flowNames{d}), nil
}

// Connections are the tracked flows, those that were used last first.
func (d *Dataplane) Connections() ([]inspect.Connection, error) {
	all, err := d.maps.Flows()
	return inspect.Connections(all, flowNames{d}, d.cfg.NodeName, flows.Now().Monotonic), err
}

// Health is how full the maps are, and what could not be put into them.
func (d *Dataplane) Health() (inspect.Health, error) {
	all, err := d.maps.Flows()
	if err != nil {
		return inspect.Health{}, err
	}
	tally, err := d.loader.Tally()
	if err != nil {
		return inspect.Health{}, err
	}
	evicted, fits := d.tracked().Evicted, d.maps.Capacity()
	tcp := inspect.Fill{Map: "conntrack_tcp", Evicted: evicted.TCP, Failed: tally.Failed.TCP}
	udp := inspect.Fill{Map: "conntrack_udp", Evicted: evicted.UDP, Failed: tally.Failed.UDP}
	for t := range all {
		if t.Proto == maps.TCP {
			tcp.Used++
		} else {
			udp.Used++
		}
	}
	fills := []inspect.Fill{tcp, udp, {Map: "endpoints", Used: uint64(d.names.addresses())}}
	for name, used := range d.services.Sizes() {
		fills = append(fills, inspect.Fill{Map: name, Used: uint64(used)})
	}
	for _, name := range maps.Counted {
		n, err := d.maps.Count(name)
		if err != nil {
			return inspect.Health{}, err
		}
		fills = append(fills, inspect.Fill{Map: name, Used: uint64(n)})
	}
	for i := range fills {
		fills[i].Fits = uint64(fits[fills[i].Map])
	}
	for name, s := range d.policies.Sizes() {
		fills = append(fills, inspect.Fill{Map: name, Used: uint64(s.Used), Fits: uint64(s.Fits)})
	}
	slices.SortFunc(fills, func(a, b inspect.Fill) int { return strings.Compare(a.Map, b.Map) })
	var problems []string
	for name, err := range d.FailedServices() {
		problems = append(problems, fmt.Sprintf("service %s is not what it should be: %v", name, err))
	}
	for name, why := range d.PolicyProblems() {
		problems = append(problems, fmt.Sprintf("policy %s: %s", strings.TrimPrefix(name.String(), "/"), why))
	}
	if err := d.policies.Stuck(); err != nil {
		problems = append(problems, fmt.Sprintf("changes of policies and of the pods they name wait: %v", err))
	}
	return inspect.NewHealth(fills, problems), nil
}

// Trace says what would become of a connection, by the tables that the programs read.
func (d *Dataplane) Trace(q inspect.Question) (inspect.Trace, error) {
	q.Self, q.Now = d.cfg.NodeIPs, flows.Now().Monotonic
	return inspect.Explain(q, d.cfg.NodeName, d.maps, flowNames{d}, route)
}

// route asks the node's routing table.
func route(to netip.Addr) (string, error) {
	routes, err := netlink.RouteGet(net.IP(to.AsSlice()))
	if err != nil {
		return "", fmt.Errorf("the routing table refuses it (%w)", err)
	}
	if len(routes) == 0 {
		return "", fmt.Errorf("there is no route")
	}
	r := routes[0]
	if r.Type == unix.RTN_UNREACHABLE || r.Type == unix.RTN_BLACKHOLE || r.Type == unix.RTN_PROHIBIT {
		return "", fmt.Errorf("a route of skep's makes it unreachable")
	}
	name := fmt.Sprint("device ", r.LinkIndex)
	if l, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
		name = l.Attrs().Name
	}
	if r.Gw != nil {
		return fmt.Sprintf("routed by %s to %s", r.Gw, name), nil
	}
	return "routed to " + name, nil
}
