// SPDX-License-Identifier: Apache-2.0

package shimio

import (
	"encoding/json"
	"os"
	"time"
)

// Exit says how a container's process ended. The shim writes it before the task is deleted: a containerd
// that starts deletes the tasks that have ended without telling anybody how.
type Exit struct {
	Status   uint32
	At       time.Time
	OOMKills uint64 // processes of its cgroup that the kernel killed for want of memory
}

func (e Exit) write(path string) error {
	data, err := json.Marshal(e)
	if err != nil {
		return err
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// ReadExit reads the file that a shim wrote.
func ReadExit(path string) (Exit, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Exit{}, err
	}
	var e Exit
	return e, json.Unmarshal(data, &e)
}
