// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs/pkg/errgrpc"
)

// adopt fills the table from what containerd, the shims and the status files say.
func (r *Runtime) adopt(ctx context.Context) error {
	stored, err := r.client.ContainerService().List(ctx)
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	tasks, err := r.tasks(ctx)
	if err != nil {
		return err
	}
	for _, s := range stored {
		ext, ok := s.Extensions[extensionKey]
		if !ok {
			r.log.Warn("a container in containerd's namespace skep is not skep's and is left alone", "id", s.ID)
			continue
		}
		c := &container{id: s.ID, done: make(chan struct{})}
		if err := json.Unmarshal(ext.GetValue(), &c.def); err != nil {
			return fmt.Errorf("container %s: its definition: %w", s.ID, err)
		}
		st, err := r.loadStatus(s.ID)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			r.log.Warn("container status is unreadable", "id", s.ID, "error", err)
		}
		if st.State == "" {
			st.State = Created
		}
		c.status = st
		r.containers[s.ID] = c
		r.settle(ctx, c, tasks[s.ID])
	}
	return r.sweep(ctx)
}

// settle makes a container's state agree with its task.
func (r *Runtime) settle(ctx context.Context, c *container, task *tasktypes.Process) {
	st := c.state()
	switch {
	case st.State == Exited:
		if task != nil {
			// Its end was taken, the task's deletion was not.
			_, _ = r.client.TaskService().Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: c.id})
		}
		close(c.done)
	case task == nil && st.State == Running:
		// It ended while no agent ran, and containerd has deleted its task at start.
		r.ended(c)
	case task == nil:
		// Created and never started.
	case task.Status == tasktypes.Status_STOPPED:
		st.State = Running
		c.set(st)
		r.reap(ctx, c)
	case task.Status == tasktypes.Status_CREATED:
		// The agent ended between runc's create and start: as if nothing had happened.
		_, _ = r.client.TaskService().Kill(ctx, &tasksapi.KillRequest{ContainerID: c.id, Signal: 9, All: true})
		_, _ = r.client.TaskService().Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: c.id})
		st.State = Created
		c.set(st)
	default:
		st.PID = task.Pid
		if st.State != Running {
			st.State, st.StartedAt = Running, time.Now()
		}
		r.save(c, st)
	}
}

func (r *Runtime) tasks(ctx context.Context) (map[string]*tasktypes.Process, error) {
	resp, err := r.client.TaskService().List(ctx, &tasksapi.ListTasksRequest{})
	if err != nil {
		return nil, fmt.Errorf("list tasks: %w", errgrpc.ToNative(err))
	}
	tasks := map[string]*tasktypes.Process{}
	for _, t := range resp.Tasks {
		tasks[t.ID] = t
	}
	return tasks, nil
}

// refresh looks at the tasks of running containers after events were missed.
func (r *Runtime) refresh() {
	tasks, err := r.tasks(r.ctx)
	if err != nil {
		r.log.Warn("containers are not refreshed", "error", err)
		return
	}
	r.mu.Lock()
	all := make([]*container, 0, len(r.containers))
	for _, c := range r.containers {
		all = append(all, c)
	}
	r.mu.Unlock()
	for _, c := range all {
		if c.state().State != Running {
			continue
		}
		if t := tasks[c.id]; t == nil || t.Status == tasktypes.Status_STOPPED {
			r.harvest(c)
		}
	}
}

// sweep removes what a crash left without a container: snapshots that only our root label keeps, and status files.
func (r *Runtime) sweep(ctx context.Context) error {
	if err := removeAllMapped(r.mappedRoot()); err != nil {
		return err
	}
	sn := r.client.SnapshotService(r.snapshotter)
	var strays []string
	err := sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if _, ours := info.Labels[rootLabel]; ours && info.Kind == snapshots.KindActive && r.containers[info.Name] == nil {
			strays = append(strays, info.Name)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	for _, key := range strays {
		if err := sn.Remove(ctx, key); err != nil {
			r.log.Warn("a snapshot without a container is not removed", "key", key, "error", err)
		}
	}
	files, err := os.ReadDir(r.statusDir())
	if err != nil {
		return err
	}
	for _, f := range files {
		id := strings.TrimSuffix(f.Name(), filepath.Ext(f.Name()))
		if r.containers[id] == nil {
			if err := r.removeStatus(id); err != nil {
				return err
			}
		}
	}
	return nil
}
