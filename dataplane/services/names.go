// SPDX-License-Identifier: Apache-2.0

package services

import "sync"

// formerNames is how many ids are remembered after their services are gone: events about them may still
// be unread.
const formerNames = 1024

// names of the Services that the kernel knows by the ids of their backend sets.
type names struct {
	mu     sync.Mutex
	byID   map[uint32]string
	ids    map[string][]uint32
	former []uint32
}

// set says which ids a Service has now.
func (n *names) set(service string, ids []uint32) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.byID == nil {
		n.byID, n.ids = map[uint32]string{}, map[string][]uint32{}
	}
	has := map[uint32]bool{}
	for _, id := range ids {
		has[id] = true
		n.byID[id] = service
	}
	for _, id := range n.ids[service] {
		if !has[id] {
			n.former = append(n.former, id)
		}
	}
	for len(n.former) > formerNames {
		delete(n.byID, n.former[0])
		n.former = n.former[1:]
	}
	if len(ids) > 0 {
		n.ids[service] = ids
	} else {
		delete(n.ids, service)
	}
}

// Name is the Service, as namespace/name, whose backend set has the id in the kernel.
func (c *Controller) Name(id uint32) (string, bool) {
	c.names.mu.Lock()
	defer c.names.mu.Unlock()
	name, ok := c.names.byID[id]
	return name, ok
}

// name is called by the goroutine that applies.
func (c *Controller) name(service string, sets []Set) {
	var ids []uint32
	for i := range sets {
		if s, ok := c.reconciler.sets[sets[i].Name]; ok {
			ids = append(ids, s.id)
		}
	}
	c.names.set(service, ids)
}
