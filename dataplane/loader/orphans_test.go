// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"testing"

	"skep.io/skep/bpf"
)

// TestOrphans: the iterators pass the verifier, and find nothing where nothing was translated; and so does the one that
// destroys, alone, on kernels that refuse the other.
func TestOrphans(t *testing.T) {
	l := load(t, alone(t))
	defer l.Close()
	for _, alone := range []bool{false, true} {
		spec, err := bpf.LoadOrphans()
		if err != nil {
			t.Fatal(err)
		}
		if alone {
			delete(spec.Programs, findOrphans)
		}
		o, err := l.loadOrphans(spec)
		if err != nil {
			t.Fatal(err)
		}
		if o.Finds() {
			found, err := o.Find()
			if err != nil || len(found) != 0 {
				t.Errorf("found %v, %v", found, err)
			}
		}
		n, err := o.Destroy()
		if err != nil || n != 0 {
			t.Errorf("destroyed %d, %v", n, err)
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
		if alone && o.Finds() {
			t.Error("it says that it finds what it cannot")
		}
	}
}
