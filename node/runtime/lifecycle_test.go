// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"io"
	"log/slog"
	"testing"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/client"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
)

// slowShims is a task service whose shims do not end in time when they are told so for the first times.
type slowShims struct {
	tasksapi.TasksClient
	late, calls int
}

func (s *slowShims) Delete(context.Context, *tasksapi.DeleteTaskRequest, ...grpc.CallOption) (*tasksapi.DeleteResponse, error) {
	s.calls++
	if s.calls <= s.late {
		return nil, grpcstatus.Error(codes.DeadlineExceeded, "failed to invoke shutdown")
	}
	return nil, grpcstatus.Error(codes.NotFound, "no running task found")
}

// A task that containerd could not delete in time is not forgotten: with it, the pod's shim would stay for good.
func TestTaskIsDeletedInTheEnd(t *testing.T) {
	for _, c := range []struct {
		name        string
		late, calls int
		left        bool
	}{
		{"at once", 0, 1, false},
		{"late", deleteTries - 1, deleteTries, false},
		{"very late", deleteTries, deleteTries, true},
	} {
		tasks := &slowShims{late: c.late}
		containerd, err := client.New("", client.WithServices(client.WithTaskClient(tasks)))
		if err != nil {
			t.Fatal(err)
		}
		r := &Runtime{client: containerd, log: slog.New(slog.NewTextHandler(io.Discard, nil))}
		box := &container{id: "c"}
		r.deleteTaskOrTell(t.Context(), box)
		if box.taskLeft != c.left || tasks.calls != c.calls {
			t.Errorf("%s: left %v after %d calls", c.name, box.taskLeft, tasks.calls)
		}
		if err := r.deleteTask(t.Context(), box); err != nil || box.taskLeft {
			t.Errorf("%s: deleted again: %v, left %v", c.name, err, box.taskLeft)
		}
	}
}
