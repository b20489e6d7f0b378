// SPDX-License-Identifier: Apache-2.0

package encryption

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"pgregory.net/rapid"
)

// Whatever is done to a ring: while it is on the first key writes, and that is the newest after Promote, no name is used for two keys, what was written with
// a key is readable until that key has been retired, and the file says all of it.
func TestRingHistories(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var r Ring
		known := map[string]string{} // every key there ever was since the ring was last empty
		for _, step := range rapid.SliceOf(rapid.SampledFrom([]string{"on", "off", "new", "promote", "retire"})).Draw(t, "steps") {
			before := r
			var err error
			switch step {
			case "on", "off":
				r, err = r.Switch(step == "on")
			case "new":
				if r, err = r.WithNewKey(); before.On && r.Active() != before.Active() {
					t.Fatalf("a new key writes at once, instead of %s", before.Active())
				}
			case "promote":
				if r = r.Promote(); r.Spare() {
					t.Fatalf("a newer key than the one that writes: %+v", r)
				}
			case "retire":
				r = r.Retire()
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Keys) == 0 {
				clear(known)
			}
			for _, k := range r.Keys {
				if secret, ok := known[k.Name]; ok && secret != k.Secret {
					t.Fatalf("%s are two keys", k.Name)
				}
				known[k.Name] = k.Secret
			}
			if step != "retire" {
				for _, k := range before.Keys {
					if !slices.Contains(r.Keys, k) {
						t.Fatalf("%s lost %s", step, k.Name)
					}
				}
			}
			if r.On && (len(r.Keys) == 0 || r.Active().Key != r.Keys[0].Name) || !r.On && r.Active() != Plain {
				t.Fatalf("%s: active is %s of %+v", step, r.Active(), r)
			}
			back, err := ringOf(r.configuration())
			if err != nil || back.On != r.On || len(back.Keys) != len(r.Keys) || len(r.Keys) > 0 && !reflect.DeepEqual(back.Keys, r.Keys) {
				t.Fatalf("%+v is read as %+v: %v", r, back, err)
			}
		}
	})
}

func TestPrepare(t *testing.T) {
	file := File(filepath.Join(t.TempDir(), "encryption.key"))
	if path, err := file.Prepare(false); err != nil || path != "" {
		t.Fatalf("%q, %v", path, err)
	}
	if _, err := file.Read(); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("off makes a file: %v", err)
	}
	var keys []apiserverv1.Key
	for _, on := range []bool{true, true, false, false, true} {
		path, err := file.Prepare(on)
		if err != nil || path != string(file) {
			t.Fatalf("%q, %v", path, err)
		}
		r, err := file.Read()
		if err != nil || r.On != on || len(r.Keys) != 1 {
			t.Fatalf("%+v, %v", r, err)
		}
		if keys != nil && !reflect.DeepEqual(keys, r.Keys) {
			t.Fatal("the key has changed")
		}
		keys = r.Keys
	}
	for content, says := range map[string]string{
		"{": "restore it from a snapshot",
		"resources: [{resources: [secrets, configmaps], providers: [{identity: {}}]}]":                              "other things than Secrets",
		"resources: [{resources: [secrets], providers: [{kms: {apiVersion: v2, name: a, endpoint: 'unix:///a'}}]}]": "does not put there",
	} {
		if err := os.WriteFile(string(file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := file.Prepare(true); err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), string(file)) {
			t.Errorf("%s: %v", content, err)
		}
		if left, err := os.ReadFile(string(file)); err != nil || string(left) != content {
			t.Errorf("the file was changed: %v", err)
		}
	}
}

func TestStoredAs(t *testing.T) {
	for value, want := range map[string]string{
		"k8s:enc:secretbox:v1:key-3:\x00\x01:\x02": "secretbox key-3",
		"k8s:enc:kms:v2:vault:\x0a":                "kms vault",
		"k8s\x00\x0a\x0c":                          "not encrypted",
		"k8s:enc:odd":                              "not encrypted",
		"":                                         "not encrypted",
	} {
		if got := storedAs([]byte(value)).String(); got != want {
			t.Errorf("%q is %q, want %q", value, got, want)
		}
	}
}
