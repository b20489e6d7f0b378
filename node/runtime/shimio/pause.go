// SPDX-License-Identifier: Apache-2.0

package shimio

import (
	"os/signal"

	"golang.org/x/sys/unix"
)

// PauseArgument makes the shim's binary the first process of a PID namespace, and nothing else.
const PauseArgument = "pause"

// Pause never returns. Orphans of the namespace become its children; since it ignores SIGCHLD the kernel reaps them
// (sigaction(2), POSIX.1-2001). As process 1 it dies of nothing but SIGKILL from outside.
func Pause() {
	signal.Ignore(unix.SIGCHLD, unix.SIGTERM, unix.SIGINT)
	for {
		_, _ = unix.Ppoll(nil, nil, nil)
	}
}
