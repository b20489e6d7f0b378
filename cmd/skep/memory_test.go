// SPDX-License-Identifier: Apache-2.0

package main

import (
	"debug/elf"
	"reflect"
	"strings"
	"testing"
)

func TestReadOnlyMappings(t *testing.T) {
	const maps = `00400000-03f1b000 r-xp 00000000 fe:00 1234 /usr/local/bin/skep
03f1b000-07a00000 r--p 03b1b000 fe:00 1234 /usr/local/bin/skep
07a00000-07c00000 rw-p 07600000 fe:00 1234 /usr/local/bin/skep
07c00000-07d00000 rw-p 00000000 00:00 0
7f0000000000-7f0000100000 r--s 00000000 fe:00 1234 /usr/local/bin/skep
7f1000000000-7f1000100000 r-xp 00000000 fe:00 99 /lib/other.so
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
`
	got, err := readOnlyMappings(strings.NewReader(maps), "/usr/local/bin/skep")
	if err != nil {
		t.Fatal(err)
	}
	if want := []addressRange{{0x400000, 0x3f1b000}, {0x3f1b000, 0x7a00000}}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
}

// TestDropBinaryPages runs the code whose pages were dropped.
func TestDropBinaryPages(t *testing.T) {
	for range 3 {
		if err := dropBinaryPages(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRelocated: this test's binary is relocated where cgo is on, and then dropping pages would end it.
func TestRelocated(t *testing.T) {
	relocated, err := isRelocated("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if dynamic := f.Section(".dynamic") != nil; relocated != dynamic {
		t.Errorf("got %v, but a dynamic section: %v", relocated, dynamic)
	}
}
