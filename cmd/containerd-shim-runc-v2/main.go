// SPDX-License-Identifier: Apache-2.0

// Command containerd-shim-runc-v2 is containerd's shim for runc, from the same module as the server
// that skep embeds, with one addition: it writes the containers' log files itself (package shimio),
// so that logs do not depend on skep's process. One shim serves all containers of a pod. Called with the
// argument pause, it is the first process of a PID namespace that containers share.
//
// It is a binary of its own because a shim initialises every plugin that its process knows and
// executes itself anew.
package main

import (
	"context"
	"os"

	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/plugin/registry"

	"skep.io/skep/node/runtime/shimio"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == shimio.PauseArgument {
		shimio.Pause()
	}
	registry.Register(shimio.Registration())
	shim.RunShim(context.Background(), manager.NewShimManager("io.containerd.runc.v2"))
}
