// SPDX-License-Identifier: Apache-2.0

package shimio

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestURI(t *testing.T) {
	for _, want := range []Stdio{
		{},
		{LogPath: "/var/log/pods/a_b_c/main/0.log", MaxSize: 10 << 20, MaxFiles: 5, Socket: "/run/skep/attach/x", ExitPath: "/x y?&=", Cgroup: "/kubepods/p", Stdin: true, StdinOnce: true},
	} {
		got, ok, err := Parse(want.URI())
		if err != nil || !ok || !cmp.Equal(got, want) {
			t.Errorf("%+v became %+v, %v, %v", want, got, ok, err)
		}
	}
	if _, ok, err := Parse("/run/some/fifo"); ok || err != nil {
		t.Errorf("a FIFO: %v, %v", ok, err)
	}
	if _, _, err := Parse("skep-log:/x?size=much"); err == nil {
		t.Error("bad size accepted")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Stdio{LogPath: "/a", MaxSize: 1}.URI())
	f.Fuzz(func(t *testing.T, s string) {
		v, ok, err := Parse(s)
		if err != nil || !ok {
			return
		}
		if again, ok, err := Parse(v.URI()); err != nil || !ok || !cmp.Equal(again, v) {
			t.Errorf("%q: %+v became %+v, %v", s, v, again, err)
		}
	})
}

func FuzzReadFrames(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 2, 'h', 'i', 2, 0, 0, 0, 1, '!'})
	f.Fuzz(func(t *testing.T, data []byte) {
		var out, errs bytes.Buffer
		_ = ReadFrames(bytes.NewReader(data), &out, &errs)
		if out.Len()+errs.Len() > len(data) {
			t.Errorf("%d bytes out of %d", out.Len()+errs.Len(), len(data))
		}
	})
}
