// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// instructions is what the golden file holds.
type instructions struct {
	Kernel string // that counted: others verify differently
	// Instructions that the verifier looked at, by setting and program. It gives up at a million.
	Verified map[string]map[string]uint32
}

const goldenInstructions = "testdata/instructions.json"

// TestInstructions: the verifier takes every program with every load-time setting, and none has become much dearer to
// verify, or cheaper, unnoticed. `UPDATE_GOLDEN=1 go test ./dataplane/loader -run TestInstructions` writes the
// counts anew: look at the difference before committing it.
func TestInstructions(t *testing.T) {
	got := instructions{Kernel: release(t), Verified: map[string]map[string]uint32{}}
	dir := alone(t)
	for _, mode := range []NodePortMode{SNAT, DSR, Hybrid} {
		l, err := Load(Config{Dir: filepath.Join(dir, string(mode)), NodePortMode: mode, XDP: XDPGeneric, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatalf("%s: %v", mode, err)
		}
		counts := map[string]uint32{}
		for name, p := range l.programs {
			info, err := p.Info()
			if err != nil {
				t.Fatal(err)
			}
			n, ok := info.VerifiedInstructions()
			if !ok {
				t.Fatal("the kernel (5.16 or later) does not say how many instructions it verified")
			}
			counts[name] = n
		}
		l.Close()
		got.Verified["nodeport-mode="+string(mode)] = counts
	}
	if os.Getenv("UPDATE_GOLDEN") != "" {
		text, err := json.MarshalIndent(got, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(goldenInstructions, append(text, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(goldenInstructions)
	if err != nil {
		t.Fatal(err)
	}
	var want instructions
	if err := json.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	tolerance := 0.10
	if want.Kernel != got.Kernel {
		tolerance = 1.0
	}
	for setting, programs := range want.Verified {
		if len(got.Verified[setting]) != len(programs) {
			t.Errorf("%s: %d programs are loaded, %d are known", setting, len(got.Verified[setting]), len(programs))
		}
	}
	for setting, programs := range got.Verified {
		for name, n := range programs {
			known := want.Verified[setting][name]
			// Small programs may differ by some instructions more.
			if spread := tolerance*float64(known) + 50; float64(n) > float64(known)+spread || float64(n) < float64(known)-spread {
				t.Errorf("%s: %s took %d instructions to verify, %d before (UPDATE_GOLDEN=1 accepts it)", setting, name, n, known)
			}
			if n > 500_000 {
				t.Errorf("%s: %s took %d of the million instructions that the verifier allows", setting, name, n)
			}
		}
	}
}

// release is the kernel's major and minor version.
func release(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	parts := strings.SplitN(unix.ByteSliceToString(u.Release[:]), ".", 3)
	return strings.Join(parts[:min(2, len(parts))], ".")
}
