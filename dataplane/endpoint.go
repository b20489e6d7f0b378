// SPDX-License-Identifier: Apache-2.0

// Package dataplane owns what the kernel programs of this node read and say.
package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/dataplane/maps"
	"skep.io/skep/dataplane/policy"
)

// Endpoint is one pod's attachment to this node's network.
type Endpoint struct {
	PodUID    types.UID
	Namespace string
	Name      string
	Addrs     []netip.Addr     // one a family, IPv4 first
	Ifindex   int              // of the veth's end in the node's namespace
	PodMAC    net.HardwareAddr // of the pod's end
	HostMAC   net.HardwareAddr // of the node's end
	// NetnsCookie is the kernel's name for the pod's network namespace; 0 if unknown. It tells whose socket
	// asks, for session affinity and source ranges, and whose was refused.
	NetnsCookie uint64
	// NetNS is the path of the pod's network namespace.
	NetNS string
}

func (e Endpoint) local() policy.Local {
	return policy.Local{NamespacedName: types.NamespacedName{Namespace: e.Namespace, Name: e.Name}, UID: e.PodUID}
}

// Half of what the maps of policies and of identities hold: an agent that starts writes its own beside those of the one
// before. IP blocks leave the identities of 150,000 pods, with an address of each family, more room than they take.
var policyLimits = policy.Limits{Entries: 1 << 19, Set: 1 << 16, Blocks: 1 << 17}

// newPolicies starts from what the pods have that an earlier process attached.
func (d *Dataplane) newPolicies() (*policy.Controller, error) {
	known, err := d.maps.Endpoints()
	if err != nil {
		return nil, err
	}
	var slots []uint32
	for _, e := range known {
		if e.Slot != 0 {
			slots = append(slots, e.Slot)
		}
	}
	c, err := policy.NewController(policy.Config{
		Informers: d.cfg.Informers, Dynamic: d.cfg.Dynamic, Kernel: d.maps, Limits: policyLimits, Capacity: d.maps.Capacity(), Slots: slots,
		Events: d.cfg.Events, Log: d.cfg.Log, Metrics: d.cfg.Metrics,
	})
	if err != nil {
		return nil, fmt.Errorf("policies: %w", err)
	}
	return c, nil
}

// slotOf is the policy slot that a pod has already, or 0.
func (d *Dataplane) slotOf(e Endpoint) (uint32, error) {
	for _, a := range e.Addrs {
		v, ok, err := d.maps.Endpoint(a.Unmap())
		if err != nil {
			return 0, err
		}
		if ok && v.Ifindex == uint32(e.Ifindex) {
			return v.Slot, nil
		}
	}
	return 0, nil
}

// AttachEndpoint connects a pod: its addresses become known and its veth gets the programs.
func (d *Dataplane) AttachEndpoint(_ context.Context, e Endpoint) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	slot, err := d.slotOf(e)
	if err == nil {
		slot, err = d.policies.Attach(e.local(), slot)
	}
	if err != nil {
		return fmt.Errorf("pod %s/%s: %w", e.Namespace, e.Name, err)
	}
	v := maps.Endpoint{Ifindex: uint32(e.Ifindex), Slot: slot}
	copy(v.PodMAC[:], e.PodMAC)
	copy(v.HostMAC[:], e.HostMAC)
	for _, a := range e.Addrs {
		if err := d.maps.SetEndpoint(a.Unmap(), v); err != nil {
			return fmt.Errorf("pod %s/%s: %w", e.Namespace, e.Name, err)
		}
	}
	d.names.add(e)
	if e.NetnsCookie != 0 {
		err = d.maps.SetClient(e.NetnsCookie, maps.ClientOf(e.Addrs))
	}
	if err == nil {
		err = d.loader.AttachPod(e.Ifindex)
	}
	if err != nil {
		return fmt.Errorf("pod %s/%s: %w", e.Namespace, e.Name, err)
	}
	return nil
}

// DetachEndpoint undoes AttachEndpoint, also when the device is already gone.
func (d *Dataplane) DetachEndpoint(_ context.Context, e Endpoint) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, a := range e.Addrs {
		errs = append(errs, d.maps.DeleteEndpoint(a.Unmap(), uint32(e.Ifindex)))
	}
	if e.NetnsCookie != 0 {
		errs = append(errs, d.maps.DeleteClient(e.NetnsCookie))
	}
	if e.Ifindex > 0 {
		errs = append(errs, d.loader.DetachPod(e.Ifindex))
	}
	d.names.remove(e)
	if errors.Join(errs...) == nil {
		d.policies.Detach(e.local())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("pod %s/%s: %w", e.Namespace, e.Name, err)
	}
	return nil
}

// PruneEndpoints detaches every pod but those to keep, and attaches what of them is missing.
func (d *Dataplane) PruneEndpoints(ctx context.Context, keep []Endpoint) error {
	var errs []error
	addrs, indexes := map[netip.Addr]int{}, map[int]bool{}
	for _, e := range keep {
		indexes[e.Ifindex] = true
		for _, a := range e.Addrs {
			addrs[a.Unmap()] = e.Ifindex
		}
		errs = append(errs, d.AttachEndpoint(ctx, e))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	known, err := d.maps.Endpoints()
	if err != nil {
		return err
	}
	gone, used := map[uint32]bool{}, map[uint32]bool{} // policy slots
	for a, e := range known {
		if index, ok := addrs[a]; !ok || uint32(index) != e.Ifindex {
			err := d.maps.DeleteEndpoint(a, e.Ifindex)
			if errs = append(errs, err); err == nil {
				gone[e.Slot] = true
			}
		} else {
			used[e.Slot] = true
		}
	}
	for slot := range gone {
		if !used[slot] {
			d.policies.Release(slot)
		}
	}
	errs = append(errs, d.pruneClients(keep))
	attached, err := d.loader.Pods()
	if err != nil {
		return err
	}
	for _, index := range attached {
		if !indexes[index] {
			errs = append(errs, d.loader.DetachPod(index))
		}
	}
	return errors.Join(errs...)
}

// pruneClients forgets the network namespaces of all pods but those to keep.
func (d *Dataplane) pruneClients(keep []Endpoint) error {
	known, err := d.maps.Clients()
	if err != nil {
		return err
	}
	delete(known, d.loader.NetnsCookie())
	for _, e := range keep {
		delete(known, e.NetnsCookie)
	}
	var errs []error
	for cookie := range known {
		errs = append(errs, d.maps.DeleteClient(cookie))
	}
	return errors.Join(errs...)
}
