// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// setSysctl writes one setting; key has slashes, since interface names may have dots. The kernel
// takes the namespaces of the calling thread.
func setSysctl(key, value string) error {
	f, err := os.OpenFile(filepath.Join("/proc/sys", filepath.Clean("/"+key)), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// checkSysctl says why a pod may not have a setting: only what its own namespaces hold is its own.
func checkSysctl(name string, spec Spec) error {
	key := sysctlKey(name)
	switch {
	case strings.Contains(key, ".."):
		return fmt.Errorf("sysctl %q is not a name", name)
	case strings.HasPrefix(key, "net/"):
		if spec.HostNetwork {
			return fmt.Errorf("sysctl %q is not allowed with hostNetwork", name)
		}
		return nil
	case strings.HasPrefix(key, "kernel/shm"), strings.HasPrefix(key, "kernel/msg"), key == "kernel/sem", strings.HasPrefix(key, "fs/mqueue/"):
		if spec.HostIPC {
			return fmt.Errorf("sysctl %q is not allowed with hostIPC", name)
		}
		return nil
	}
	return fmt.Errorf("sysctl %q belongs to the node, not to a pod's namespace", name)
}

// sysctlKey accepts both notations, kernel.shm_rmid_forced and kernel/shm_rmid_forced: whichever separator
// comes first is the separator.
func sysctlKey(name string) string {
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		return strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}
	return name
}
