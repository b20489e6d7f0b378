// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"bytes"
	"testing"
	"unsafe"
)

// TestConverter: what is declared leads to the layouts of today, and nothing else is converted.
func TestConverter(t *testing.T) {
	now := Layout{LayoutVersion, uint32(unsafe.Sizeof(Tuple{})), uint32(unsafe.Sizeof(Flow{}))}
	for _, o := range older {
		for _, name := range o.maps {
			if Converter(name, o.from, now) == nil {
				t.Errorf("map %s: from %+v nothing leads to %+v", name, o.from, now)
			}
		}
	}
	key, value := bytes.Repeat([]byte{1}, int(now.Key)), bytes.Repeat([]byte{2}, 72)
	k, v := Converter("conntrack_udp", Layout{1, 40, 72}, now)(key, value)
	if !bytes.Equal(k, key) || !bytes.Equal(v, append(value, make([]byte, 8)...)) {
		t.Errorf("% x: % x", k, v)
	}
	if k, v := Converter("services", now, now)(key, value); !bytes.Equal(k, key) || !bytes.Equal(v, value) {
		t.Errorf("the same layout: % x: % x", k, v)
	}
	for name, from := range map[string]Layout{
		"conntrack_tcp": {1, 40, 64}, "conntrack_udp": {2, 40, 72}, "services": {1, 40, 72},
	} {
		if Converter(name, from, now) != nil {
			t.Errorf("map %s: %+v is converted", name, from)
		}
	}
}
