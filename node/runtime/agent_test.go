// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// agentEnv makes the test binary a process that runs a Runtime in the directory it names, so that a
// test can kill it.
const agentEnv = "SKEP_TEST_AGENT"

// agent imports the image that lies in its directory, starts one container that writes lines for ever,
// one that ends when its stdin does, and sleeps until it is killed.
func agent() int {
	if err := startAgent(os.Getenv(agentEnv)); err != nil {
		fmt.Println("agent:", err)
		return 1
	}
	fmt.Println("started")
	select {}
}

func startAgent(dir string) error {
	ctx := context.Background()
	r, err := New(ctx, testConfig(dir))
	if err != nil {
		return err
	}
	boxes, err := testSandboxes(dir)
	if err != nil {
		return err
	}
	images, err := r.Images().ImportDir(ctx, filepath.Join(dir, "images"))
	if err != nil {
		return err
	}
	n := &node{Runtime: r, dir: dir, sandboxes: boxes, image: images[0]}
	for _, args := range [][]string{{"tick"}, {"copy"}, {"wait"}} {
		box, err := boxes.Create(ctx, n.sandboxSpec("adopted"))
		if err != nil {
			return err
		}
		spec := n.containerSpec("adopted", box, args...)
		spec.Name, spec.Stdin = args[0], args[0] == "copy"
		spec.LogPath = filepath.Join(dir, "logs", args[0]+".log")
		id, err := r.Create(ctx, spec)
		if err != nil {
			return err
		}
		if err := r.Start(ctx, id); err != nil {
			return err
		}
	}
	return nil
}
