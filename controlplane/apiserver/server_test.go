// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"strings"
	"testing"
)

func TestKubectl(t *testing.T) {
	s := start(t, t.TempDir())
	t.Logf("ready after %v", s.toReady)
	out := s.mustKubectl(t, "", "version")
	if !strings.Contains(out, "Server Version: v1.36.3+skep") {
		t.Errorf("version says %q", out)
	}
	t.Log(s.mustKubectl(t, "", "get", "ns,svc,endpoints,clusterroles,priorityclasses", "-A"))
	t.Log(s.mustKubectl(t, "", "api-resources"))
}
