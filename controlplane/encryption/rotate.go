// SPDX-License-Identifier: Apache-2.0

package encryption

import (
	"context"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Keys are those of all servers.
type Keys interface {
	Read(ctx context.Context) (Ring, error)
	// Put returns when every server reads and writes as the ring says. If it fails, some may.
	Put(ctx context.Context, r Ring) error
}

// OneServer are the keys of a server that is alone.
type OneServer struct {
	File File
	// Reload has the server read the file again.
	Reload func() error
}

// Read implements Keys.
func (o OneServer) Read(context.Context) (Ring, error) { return o.File.Read() }

// Put implements Keys.
func (o OneServer) Put(_ context.Context, r Ring) error {
	if err := o.File.Write(r); err != nil {
		return err
	}
	return o.Reload()
}

// Rotator replaces the key that Secrets are encrypted with.
type Rotator struct {
	Keys Keys
	// Rewrite writes all objects that are encrypted again, and returns how many there are.
	Rewrite func(ctx context.Context) (int, error)
	KV      clientv3.KV
}

// passes bounds how often Secrets are written again that somebody wrote at the moment of the change.
const passes = 3

// Rotate makes a new key, writes all Secrets again with it, and forgets the earlier keys once the store has no value
// that needs them. Where encryption is off it decrypts all Secrets and forgets all keys. No server writes with a key
// that another cannot read yet. It may be cut off anywhere: then every Secret stays readable, and another Rotate finishes.
func (r Rotator) Rotate(ctx context.Context) (Report, error) {
	ring, err := r.Keys.Read(ctx)
	if err != nil {
		return Report{}, err
	}
	if ring.On {
		if !ring.Spare() { // else one that was cut off has made it
			if ring, err = ring.WithNewKey(); err != nil {
				return Report{}, err
			}
		}
		for _, next := range []Ring{ring, ring.Promote()} { // first all read it, then they write it
			if err := r.Keys.Put(ctx, next); err != nil {
				return Report{}, fmt.Errorf("%w; all Secrets can be read: run it again", err)
			}
			ring = next
		}
	}
	var report Report
	for range passes {
		if _, err := r.Rewrite(ctx); err != nil {
			return report, fmt.Errorf("%w; earlier keys are kept: run it again", err)
		}
		if report, err = Look(ctx, r.KV, ring.Active()); err != nil {
			return report, fmt.Errorf("%w; earlier keys are kept: run it again", err)
		}
		if report.Others() == 0 {
			return report, r.Keys.Put(ctx, ring.Retire())
		}
	}
	return report, fmt.Errorf("%d Secrets are still not stored as %q: earlier keys are kept: run it again", report.Others(), ring.Active())
}

// Report says how Secrets are stored.
type Report struct {
	Active Stored  `json:"active"` // how they are written now
	Counts []Count `json:"counts"`
}

// Count is how many Secrets are stored in one way.
type Count struct {
	Stored
	Secrets int `json:"secrets"`
}

// Others is how many Secrets are stored in another way than the active one.
func (r Report) Others() int {
	n := 0
	for _, c := range r.Counts {
		if c.Stored != r.Active {
			n += c.Secrets
		}
	}
	return n
}

// Look reads from the store how Secrets are stored.
func Look(ctx context.Context, kv clientv3.KV, active Stored) (Report, error) {
	counts, err := count(ctx, kv)
	report := Report{Active: active}
	for _, way := range inOrder(counts) {
		report.Counts = append(report.Counts, Count{way, counts[way]})
	}
	return report, err
}
