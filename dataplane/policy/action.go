// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"skep.io/skep/dataplane/maps"
)

// Peer says which peer an address is.
type Peer struct {
	Key  maps.IdentityKey
	Peer uint32
}

// Action is one step towards what is wanted. Steps are done in order, so that what leads to something is
// written after it; repeating a step does no harm. Most have one member set.
type Action struct {
	Allow    []maps.PolicyEntry // to write
	Peers    []Peer             // to write
	Count    uint32             // the set whose drops are to be counted
	Switch   *Switch
	State    *maps.PolicyState
	Forget   []maps.IdentityKey // to delete
	Disallow []maps.PolicyKey   // to delete
	Uncount  uint32             // the set whose drops need no counting any more
	Wait     bool               // for programs that run to end
}

// Switch gives a slot its sets, both as one.
type Switch struct {
	Slot uint32
	Sets maps.PolicySets
}

// Store is what actions are done to; *maps.Maps is the real one. Deleting what is not there is no error.
type Store interface {
	PutPolicy([]maps.PolicyEntry) error
	DeletePolicy([]maps.PolicyKey) error
	PutIdentity(maps.IdentityKey, uint32) error
	DeleteIdentity(maps.IdentityKey) error
	PutPolicySets(slot uint32, s maps.PolicySets) error
	PutPolicyState(maps.PolicyState) error
	CountPolicyDrops(set uint32) error
	PolicyDrops(set uint32) (uint64, error)
	ForgetPolicyDrops(set uint32) error
	WaitReaders() error
}

func (a *Action) do(s Store) error {
	if err := s.PutPolicy(a.Allow); err != nil {
		return err
	}
	for _, p := range a.Peers {
		if err := s.PutIdentity(p.Key, p.Peer); err != nil {
			return err
		}
	}
	for _, k := range a.Forget {
		if err := s.DeleteIdentity(k); err != nil {
			return err
		}
	}
	if err := s.DeletePolicy(a.Disallow); err != nil {
		return err
	}
	switch {
	case a.Wait:
		return s.WaitReaders()
	case a.Count != 0:
		return s.CountPolicyDrops(a.Count)
	case a.Uncount != 0:
		return s.ForgetPolicyDrops(a.Uncount)
	case a.Switch != nil:
		return s.PutPolicySets(a.Switch.Slot, a.Switch.Sets)
	case a.State != nil:
		return s.PutPolicyState(*a.State)
	}
	return nil
}

// log is what is still to be done. What fails stays first, so that order holds.
type log struct {
	actions []Action
	// What nothing leads to once actions are done and all readers that run then have ended.
	garbage []Action
	discard map[maps.IdentityKey]bool // addresses of pods, unless they get an identity again before
}

func newLog() *log { return &log{discard: map[maps.IdentityKey]bool{}} }

// flush does what it can.
func (l *log) flush(s Store) error {
	for len(l.actions) > 0 {
		if err := l.actions[0].do(s); err != nil {
			return err
		}
		l.actions = l.actions[1:]
	}
	l.actions = nil
	return nil
}

// collect does nothing while there is something to flush. gone is told a set whose drops go with it.
func (l *log) collect(s Store, gone func(set uint32) error) error {
	if len(l.actions) > 0 || len(l.garbage) == 0 && len(l.discard) == 0 {
		return nil
	}
	if err := s.WaitReaders(); err != nil {
		return err
	}
	for len(l.garbage) > 0 {
		a := &l.garbage[0]
		if a.Uncount != 0 {
			if err := gone(a.Uncount); err != nil {
				return err
			}
		}
		if err := a.do(s); err != nil {
			return err
		}
		l.garbage = l.garbage[1:]
	}
	l.garbage = nil
	for k := range l.discard {
		if err := s.DeleteIdentity(k); err != nil {
			return err
		}
		delete(l.discard, k)
	}
	return nil
}
