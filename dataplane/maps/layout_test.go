// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"reflect"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"skep.io/skep/bpf"
)

// TestLayout compares the Go types with what the compiler made of the C ones, member by member.
func TestLayout(t *testing.T) {
	types := map[string][2]any{
		"services":       {ServiceKey{}, Service{}},
		"slots":          {SlotKey{}, uint32(0)},
		"tables":         {SlotKey{}, TableBlock{}},
		"backends":       {uint32(0), Backend{}},
		"affinity":       {AffinityKey{}, Affinity{}},
		"endpoints":      {Address{}, Endpoint{}},
		"node_addresses": {Address{}, uint32(0)},
		"node":           {uint32(0), Node{}},
		"ranges":         {RangeKey{}, uint32(0)},
		"source_ranges":  {SourceRangeKey{}, uint32(0)},
		"node_ports":     {uint32(0), uint64(0)},
		"clients":        {uint64(0), Client{}},
		"announced":      {AnnouncedKey{}, Announced{}},
		"conntrack_tcp":  {Tuple{}, Flow{}},
		"conntrack_udp":  {Tuple{}, Flow{}},
		"policy_slots":   {uint32(0), PolicySets{}},
		"policy_state":   {uint32(0), PolicyState{}},
		"identities":     {IdentityKey{}, uint32(0)},
		"policy":         {PolicyKey{}, uint32(0)},
		"policy_drops":   {uint32(0), uint64(0)},
	}
	seen := map[string]bool{}
	for _, load := range []func() (*ebpf.CollectionSpec, error){bpf.LoadSocket, bpf.LoadPod, bpf.LoadHost, bpf.LoadIngress} {
		spec, err := load()
		if err != nil {
			t.Fatal(err)
		}
		for name, m := range spec.Maps {
			want, ok := types[name]
			if !ok {
				continue
			}
			seen[name] = true
			for i, c := range []btf.Type{m.Key, m.Value} {
				compare(t, name, reflect.TypeOf(want[i]), c)
			}
		}
	}
	if len(seen) != len(types) {
		t.Errorf("only %v of the maps are in the objects", seen)
	}
}

func compare(t *testing.T, at string, g reflect.Type, c btf.Type) {
	t.Helper()
	size, err := btf.Sizeof(c)
	if err != nil {
		t.Fatal(err)
	}
	if int(g.Size()) != size {
		t.Errorf("%s: %s has %d bytes, C has %d", at, g, g.Size(), size)
		return
	}
	s, ok := btf.UnderlyingType(c).(*btf.Struct)
	if !ok || g.Kind() != reflect.Struct {
		return
	}
	// Service's generation and count are one word in C.
	offsets := map[int]int{}
	for i := range g.NumField() {
		f := g.Field(i)
		if f.Name == "Count" {
			continue
		}
		size := int(f.Type.Size())
		if f.Name == "Generation" && g == reflect.TypeFor[Service]() {
			size = 8
		}
		offsets[int(f.Offset)] = size
	}
	for _, m := range s.Members {
		size, err := btf.Sizeof(m.Type)
		if err != nil {
			t.Fatal(err)
		}
		got, ok := offsets[int(m.Offset.Bytes())]
		if !ok || got != size {
			t.Errorf("%s.%s: C has %d bytes at %d, Go has %d", at, m.Name, size, m.Offset.Bytes(), got)
		}
		delete(offsets, int(m.Offset.Bytes()))
	}
	for o := range offsets {
		t.Errorf("%s: Go has a member at %d that C has not", at, o)
	}
}
