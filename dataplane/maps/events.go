// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf/ringbuf"
)

// Reasons of events about sockets, which sent no packet; packets' are indexes of counters.
const (
	EventNoBackend = 200
	EventNoAddress = 201
)

// FlowEvent is what the programs tell of: a packet dropped, a socket refused, a connection opened.
type FlowEvent struct {
	At           uint64 // ns of the kernel's monotonic clock
	Netns        uint64 // cookie of a refused socket's namespace
	Connection   Tuple  // of a service: from the client to the backend
	Frontend     Address
	FrontendPort Port
	Reason       uint8 // 0: a connection was opened
	Pad          uint8
	Service      uint32
	Set          uint32 // of policies that denied it
	Ifindex      uint32
	Suppressed   uint32 // events before it that were over budget
	Rule         uint32 // of an administrator, that denied it: see PolicyVerdict.Allows
}

// ErrFlushed ends what was in the ring when it was flushed.
var ErrFlushed = ringbuf.ErrFlushed

// Events reads the ring of events. There may be one reader.
type Events struct {
	ring   *ringbuf.Reader
	record ringbuf.Record
}

// OpenEvents starts reading. Events stay in the ring until it is half full, unless somebody follows.
func (m *Maps) OpenEvents() (*Events, error) {
	ring, err := ringbuf.NewReader(m.flowEvents)
	if err != nil {
		return nil, fmt.Errorf("ring of events: %w", err)
	}
	return &Events{ring: ring}, nil
}

// Next waits for an event. After Flush it gives all there are and then ErrFlushed; after Close, os.ErrClosed.
func (e *Events) Next() (out FlowEvent, err error) {
	if err := e.ring.ReadInto(&e.record); err != nil {
		return out, err
	}
	if _, err := binary.Decode(e.record.RawSample, binary.NativeEndian, &out); err != nil {
		return out, errors.Join(errors.New("an event is shorter than this version's"), err)
	}
	return out, nil
}

// Flush wakes Next.
func (e *Events) Flush() error { return e.ring.Flush() }

// Close ends Next.
func (e *Events) Close() error { return e.ring.Close() }

// SetFollowers says how many want to see each event at once.
func (m *Maps) SetFollowers(n uint32) error {
	if err := m.flowFollowers.Put(uint32(0), n); err != nil {
		return fmt.Errorf("followers of flows: %w", err)
	}
	return nil
}

// Followers reads it.
func (m *Maps) Followers() (n uint32, err error) {
	if err := m.flowFollowers.Lookup(uint32(0), &n); err != nil {
		return 0, fmt.Errorf("followers of flows: %w", err)
	}
	return n, nil
}
