// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

// From step to step what is signed by one authority is trusted in the stage before and after, and in no other.
func TestThreeSteps(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	var leafs []*x509.Certificate
	look := func(at Stage, trusts ...bool) {
		t.Helper()
		a := mustOpen(t, dir, now)
		if stage, err := StageOf(dir); err != nil || stage != at {
			t.Fatalf("stage %s, want %s, %v", stage, at, err)
		}
		pem, _, err := a.IssueClient("anna", nil)
		if err != nil {
			t.Fatal(err)
		}
		leafs = append(leafs, leaf(t, pem))
		for i, want := range trusts {
			_, err := leafs[i].Verify(x509.VerifyOptions{Roots: a.CAPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
			if (err == nil) != want {
				t.Errorf("%s: a certificate of stage %d: %v", at, i, err)
			}
		}
		if kept, err := os.ReadFile(a.TrustedFile()); err != nil || string(kept) != string(a.CAPEM()) {
			t.Errorf("%s: the file of those that are trusted: %v", at, err)
		}
	}
	refused := func(steps ...func(string) error) {
		t.Helper()
		for i, step := range steps {
			if err := step(dir); !errors.Is(err, ErrStage) {
				t.Errorf("step %d: %v", i, err)
			}
		}
	}
	do := func(step func(string) error) {
		t.Helper()
		if err := step(dir); err != nil {
			t.Fatal(err)
		}
	}
	look(Settled, true)
	refused(Switch, Finish)
	serving := func() []byte {
		files, err := mustOpen(t, dir, now).ServerFiles("s", "s", nil)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(files.Cert)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	first := serving()
	do(Prepare)
	look(Prepared, true, true)
	refused(Prepare, Finish)
	if string(serving()) != string(first) {
		t.Error("a certificate was made anew before the other authority signs")
	}
	do(Switch)
	look(Switched, true, true, true)
	refused(Prepare, Switch)
	if string(serving()) == string(first) {
		t.Error("the serving certificate is still of the authority before")
	}
	do(Finish)
	look(Settled, false, false, true, true)
	if left, err := filepath.Glob(filepath.Join(dir, "ca-*")); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

// A crash in the middle of the second step is made good by doing it again.
func TestSwitchAfterACrash(t *testing.T) {
	for name, crash := range map[string]func(dir string) error{
		"the one before is copied": func(dir string) error {
			raw, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
			if err != nil {
				return err
			}
			return WriteFile(filepath.Join(dir, "ca-previous.crt"), raw)
		},
		"the key is moved": func(dir string) error {
			return os.Rename(filepath.Join(dir, "ca-next.key"), filepath.Join(dir, "ca.key"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			before := mustOpen(t, dir, time.Now()).ca.cert
			if err := Prepare(dir); err != nil {
				t.Fatal(err)
			}
			if err := crash(dir); err != nil {
				t.Fatal(err)
			}
			mustOpen(t, dir, time.Now()) // a server that starts in between finds a pair that belongs together
			if err := Switch(dir); err != nil && !errors.Is(err, ErrStage) {
				t.Fatal(err)
			}
			a := mustOpen(t, dir, time.Now())
			if stage, err := StageOf(dir); err != nil || stage != Switched {
				t.Errorf("stage %s, %v", stage, err)
			}
			if len(a.trusted) != 2 || !a.trusted[1].Equal(before) || a.ca.cert.Equal(before) {
				t.Errorf("trusted are %d", len(a.trusted))
			}
		})
	}
}

// Whatever a server has when it learns how far the others are, it has the same afterwards; also if it was away for whole
// changes, or was cut off while it took a step.
func TestAdopt(t *testing.T) {
	dir := t.TempDir()
	mustOpen(t, dir, time.Now())
	c, err := ReadChange(dir)
	if err != nil {
		t.Fatal(err)
	}
	history := []Change{c}
	for range 2 {
		for _, to := range []Stage{Prepared, Switched, Settled} {
			if c, err = c.Step(to); err != nil || c.Stage() != to {
				t.Fatalf("%s, %v", c.Stage(), err)
			}
			if _, err := c.Step(to); !errors.Is(err, ErrStage) {
				t.Errorf("%s twice: %v", to, err)
			}
			history = append(history, c)
		}
	}
	cuts := map[string]func(t *testing.T, dir string, to Change){
		"whole": func(*testing.T, string, Change) {},
		"the next is written": func(t *testing.T, dir string, to Change) {
			if err := writeNext(dir, to.CA); err != nil {
				t.Fatal(err)
			}
		},
		"and its key moved": func(t *testing.T, dir string, to Change) {
			if err := writeNext(dir, to.CA); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(dir, "ca-next.key"), filepath.Join(dir, "ca.key")); err != nil {
				t.Fatal(err)
			}
		},
	}
	for from := range history {
		for to := range history {
			for name, cut := range cuts {
				dir := t.TempDir()
				mustOpen(t, dir, time.Now())
				for _, c := range []Change{history[from], history[to]} {
					cut(t, dir, c)
					mustOpen(t, dir, time.Now())
					if _, err := c.Adopt(dir); err != nil {
						t.Fatalf("%s, %d to %d: %v", name, from, to, err)
					}
					if have, err := ReadChange(dir); err != nil || !reflect.DeepEqual(have, c) {
						t.Errorf("%s, %d to %d: %s instead of %s, %v", name, from, to, have.Stage(), c.Stage(), err)
					}
					if changed, err := c.Adopt(dir); err != nil || changed {
						t.Errorf("%s, %d to %d: twice: %v, %v", name, from, to, changed, err)
					}
					mustOpen(t, dir, time.Now())
				}
			}
		}
	}
	if _, err := (Change{CA: Pair{Cert: history[0].CA.Cert, Key: history[3].CA.Key}}).Adopt(dir); err == nil {
		t.Error("a pair that does not belong together is adopted")
	}
}
