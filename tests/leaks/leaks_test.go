// SPDX-License-Identifier: Apache-2.0

package leaks_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"skep.io/skep/tests/leaks"
)

func TestNew(t *testing.T) {
	for _, c := range []struct {
		name          string
		before, after leaks.State
		want          []string
	}{
		{"nothing", nil, nil, nil},
		{"the same", leaks.State{"a", "b"}, leaks.State{"b", "a"}, nil},
		{"one more", leaks.State{"a"}, leaks.State{"a", "b"}, []string{"b"}},
		{"one fewer", leaks.State{"a", "b"}, leaks.State{"a"}, nil},
		{"one twice", leaks.State{"a"}, leaks.State{"a", "a"}, []string{"a"}},
		{"one for another", leaks.State{"a"}, leaks.State{"b"}, []string{"b"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := leaks.New(c.before, c.after); !slices.Equal(got, c.want) {
				t.Errorf("New = %q, want %q", got, c.want)
			}
		})
	}
}

func TestNewFindsWhatWasAdded(t *testing.T) {
	line := rapid.SampledFrom([]string{"a", "b", "c"})
	rapid.Check(t, func(t *rapid.T) {
		before := leaks.State(rapid.SliceOf(line).Draw(t, "before"))
		added := rapid.SliceOf(line).Draw(t, "added")
		got := leaks.New(before, append(slices.Clone(before), added...))
		if !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(added))) {
			t.Fatalf("New = %q, added were %q", got, added)
		}
	})
}

func TestDescriptors(t *testing.T) {
	before, err := leaks.Descriptors()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "left-open")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	after, err := leaks.Descriptors()
	if err != nil {
		t.Fatal(err)
	}
	if got := leaks.New(before, after); !slices.Equal(got, []string{"descriptor " + path}) {
		t.Errorf("leaked %q", got)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if after, err = leaks.Descriptors(); err != nil {
		t.Fatal(err)
	}
	if got := leaks.New(before, after); len(got) > 0 {
		t.Errorf("leaked %q after closing", got)
	}
}

func TestTakeIsSteady(t *testing.T) {
	scope := leaks.Scope{Files: []string{t.TempDir()}}
	first, err := leaks.Take(t.Context(), scope)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(first, func(line string) bool { return line == "link lo (loopback)" || strings.HasPrefix(line, "link lo ") }) {
		t.Errorf("no loopback device in %q", first)
	}
	if !slices.ContainsFunc(first, func(line string) bool { return strings.HasPrefix(line, "mount / (") }) {
		t.Error("no root mount")
	}
}

func TestProcessesIn(t *testing.T) {
	id, err := os.Readlink("/proc/self/ns/uts")
	if err != nil {
		t.Fatal(err)
	}
	found, err := leaks.ProcessesIn(id)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(found, func(line string) bool { return strings.Contains(line, "leaks.test") }) {
		t.Errorf("this process is not in its own namespace: %q", found)
	}
	if found, err = leaks.ProcessesIn("uts:[1]"); err != nil || len(found) > 0 {
		t.Errorf("nobody's namespace holds %q, %v", found, err)
	}
}
