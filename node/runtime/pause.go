// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"skep.io/skep/node/runtime/shimio"
)

// pausePath is where the shim's binary is seen in the container that holds a PID namespace.
const pausePath = "/pause"

// pauseImage stands in for the image of that container: an empty root file system, and the shim's binary, which is on
// every node anyway, told to do nothing.
func (r *Runtime) pauseImage() *imageInfo {
	return &imageInfo{config: ocispec.ImageConfig{Entrypoint: []string{pausePath, shimio.PauseArgument}, Env: []string{"GOMAXPROCS=1"}}}
}
