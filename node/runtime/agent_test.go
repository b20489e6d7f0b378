// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"fmt"
	"os"
)

// agentEnv makes the test binary a process that runs a Runtime in the directory it names, so that a
// test can kill it.
const agentEnv = "SKEP_TEST_AGENT"

// agent starts one container for each of its arguments' pods and then sleeps until it is killed.
func agent() int {
	r, err := New(context.Background(), testConfig(os.Getenv(agentEnv)))
	if err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		return 1
	}
	_ = r
	select {}
}
