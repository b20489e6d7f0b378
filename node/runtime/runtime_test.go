// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"testing"
	"time"
)

func TestRunLogsExecStop(t *testing.T) {
	n, ctx := newNode(t), context.Background()
	spec := n.spec("pod1")
	id := n.run(spec)
	n.logs(spec, "ready\n")
	c := n.container(id)
	if c.State != Running || c.PID == 0 || c.Annotations["hash"] != "1234" || c.PodName != "pod1" {
		t.Errorf("container %+v", c)
	}
	out, errs, code, err := n.ExecSync(ctx, id, []string{"/prog", "id"}, time.Minute)
	if err != nil || code != 0 {
		t.Fatalf("exec: %d, %v, %s %s", code, err, out, errs)
	}
	t.Logf("%s", out)
	out, errs, code, err = n.ExecSync(ctx, id, []string{"/prog", "exit", "7"}, time.Minute)
	if err != nil || code != 7 || string(out) != "to stdout\n" || string(errs) != "to stderr\n" {
		t.Fatalf("exec: %d, %v, %q %q", code, err, out, errs)
	}
	if err := n.Stop(ctx, id, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	n.logs(spec, "bye\n")
	if c := n.container(id); c.State != Exited || c.ExitCode != 0 {
		t.Errorf("stopped: %+v", c)
	}
}
