// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"skep.io/skep/node/sandbox/cgroup"
)

// hostFacts are what a container's spec depends on besides the pod: read once, so that the spec is
// a pure function of its inputs.
type hostFacts struct {
	unified   bool  // cgroup v2 alone
	swapLimit bool  // cgroup v2 counts swap
	hugetlb   bool  // huge pages can be limited
	oomFloor  int64 // lowest oom_score_adj that this process may set
}

func readHost() (hostFacts, error) {
	all, err := cgroup.Hierarchies()
	if err != nil {
		return hostFacts{}, err
	}
	h := hostFacts{unified: true, oomFloor: -1000}
	for _, c := range all {
		if !c.Unified && len(c.Controllers) > 0 && !strings.HasPrefix(c.Controllers[0], "name=") {
			h.unified = false
		}
		if c.Has("hugetlb") {
			h.hugetlb = true
		}
		if c.Unified {
			data, _ := os.ReadFile(filepath.Join(c.Mount, "cgroup.controllers"))
			h.hugetlb = h.hugetlb || strings.Contains(string(data), "hugetlb")
		}
	}
	if h.unified {
		_, err := os.Stat("/proc/swaps")
		h.swapLimit = err == nil
	}
	if !mayRaise() {
		data, err := os.ReadFile("/proc/self/oom_score_adj")
		if err != nil {
			return hostFacts{}, err
		}
		if h.oomFloor, err = strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64); err != nil {
			return hostFacts{}, fmt.Errorf("oom_score_adj: %w", err)
		}
	}
	return h, nil
}

// mayRaise says whether the process has CAP_SYS_RESOURCE, without which the kernel refuses to lower
// oom_score_adj.
func mayRaise() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}
