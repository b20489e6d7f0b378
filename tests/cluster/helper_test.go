// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"os"
	"strings"
	"testing"
)

// TestForgottenHelper is a program that calls itself for help and runs its tests in place of helping:
// without an end to it, each would call itself again.
func TestForgottenHelper(t *testing.T) {
	args := os.Args
	defer func() { os.Args = args }()
	os.Args = self("join", "{}")
	if _, err := newMachine("forgotten", setup{}, true); err == nil || !strings.Contains(err.Error(), "cluster.Helper()") {
		t.Errorf("got %v", err)
	}
}
