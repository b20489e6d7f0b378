// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	containerdtypes "github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/moby/sys/signal"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/node/runtime/crilog"
	"skep.io/skep/node/runtime/shimio"
	"skep.io/skep/node/steps"
)

// Exit codes that Kubernetes' users know: of a container whose process was never there, and of one whose end
// nobody saw.
const (
	startErrorCode = 128
	unknownCode    = 137
)

// startLimit bounds a start; runc needs a tenth of a second.
const startLimit = 2 * time.Minute

// killPatience is how long Stop waits after SIGKILL: longer means a process that the kernel cannot end.
const killPatience = 30 * time.Second

func (r *Runtime) runcRoot() string { return filepath.Join(r.cfg.RunDir, "containerd", "runc") }

func (r *Runtime) attachSocket(id string) string {
	return filepath.Join(r.cfg.RunDir, "attach", id[:32])
}

// Start runs the container's process. After an error that wraps ErrStart the container is Exited.
func (r *Runtime) Start(ctx context.Context, id string) error {
	ctx = r.in(ctx)
	c, err := r.find(id)
	if err != nil {
		return err
	}
	c.op.Lock()
	defer c.op.Unlock()
	if s := c.state(); s.State != Created {
		return fmt.Errorf("container %s is %s and cannot be started", id, s.State)
	}
	// Begun is finished: a start that is broken off would leave a process that nobody knows of.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startLimit)
	defer cancel()
	pid, err := r.startTask(ctx, c)
	if errors.Is(err, ErrNotReady) {
		return err
	}
	if err != nil {
		message := startMessage(err)
		now := time.Now()
		r.save(c, status{State: Exited, ExitCode: startErrorCode, Reason: "StartError", Message: message, StartedAt: now, FinishedAt: now})
		close(c.done)
		r.exits.add(c.def.PodUID)
		return fmt.Errorf("%w: %s", ErrStart, message)
	}
	// An exit may have been told meanwhile; harvest waits for op.
	r.save(c, status{State: Running, PID: pid, StartedAt: time.Now()})
	r.exits.add(c.def.PodUID)
	return nil
}

func (r *Runtime) startTask(ctx context.Context, c *container) (pid uint32, err error) {
	mounts, err := r.client.SnapshotService(r.snapshotter).Mounts(ctx, c.id)
	if err != nil {
		return 0, fmt.Errorf("root file system: %w", err)
	}
	request := &tasksapi.CreateTaskRequest{
		ContainerID: c.id,
		Terminal:    c.def.TTY,
		Stdout: shimio.Stdio{
			LogPath: c.def.LogPath, MaxSize: r.cfg.LogSize, MaxFiles: r.cfg.LogFiles, Socket: r.attachSocket(c.id),
			ExitPath: r.exitPath(c.id), Cgroup: c.def.Cgroup, Stdin: c.def.Stdin, StdinOnce: c.def.StdinOnce,
		}.URI(),
	}
	for _, m := range rootMounts(mounts) {
		request.Rootfs = append(request.Rootfs, &containerdtypes.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	if c.taskLeft {
		if err := r.deleteTask(ctx, c); err != nil {
			return 0, err
		}
	}
	if err := mountMapped(r.mappedDir(c.id), c.def.UserNS, c.mapped); err != nil {
		return 0, errors.Join(err, removeMapped(r.mappedDir(c.id)))
	}
	if err := r.createTask(ctx, request); err != nil {
		return 0, errors.Join(err, removeMapped(r.mappedDir(c.id)))
	}
	tasks := r.client.TaskService()
	defer func() {
		if err != nil {
			end := context.WithoutCancel(ctx)
			_, _ = tasks.Kill(end, &tasksapi.KillRequest{ContainerID: c.id, Signal: uint32(unix.SIGKILL), All: true})
			r.deleteTaskOrTell(end, c)
		}
	}()
	// They are in the container now.
	if err := removeMapped(r.mappedDir(c.id)); err != nil {
		return 0, err
	}
	steps.Passed(ctx, "container: task created")
	if c.ready != nil {
		if err := c.ready(ctx); err != nil {
			return 0, fmt.Errorf("%w: %w", ErrNotReady, err)
		}
	}
	started, err := tasks.Start(ctx, &tasksapi.StartRequest{ContainerID: c.id})
	if err != nil {
		return 0, fmt.Errorf("failed to start containerd task %q: %w", c.id, errgrpc.ToNative(err))
	}
	steps.Passed(ctx, "container: task started")
	return started.Pid, nil
}

// createTask has the shim make the container's process, which does not run yet.
func (r *Runtime) createTask(ctx context.Context, request *tasksapi.CreateTaskRequest) error {
	for try := 0; ; try++ {
		_, err := r.client.TaskService().Create(ctx, request)
		if err == nil {
			return nil
		}
		if try < shimTries && shimEnding(err) {
			continue
		}
		return fmt.Errorf("failed to create containerd task: %w", errgrpc.ToNative(err))
	}
}

// shimTries is how often a start finds the pod's shim on its way out before that is an error.
const shimTries = 3

// shimEnding says whether a task was not created because the pod's shim, whose last container had ended, was just
// ending too.
func shimEnding(err error) bool {
	return errdefs.IsUnavailable(errgrpc.ToNative(err)) || strings.Contains(err.Error(), "ttrpc: closed")
}

// startMessage is the error as users of Kubernetes know it.
func startMessage(err error) string {
	return strings.TrimSuffix(strings.TrimPrefix(err.Error(), ErrStart.Error()+": "), ": unknown")
}

// harvest takes the end of a container's process: exit code, whether memory was the reason, and the task itself,
// whose deletion waits for the last line of its log.
func (r *Runtime) harvest(c *container) {
	c.op.Lock()
	defer c.op.Unlock()
	if s := c.state(); s.State != Running {
		return
	}
	r.reap(r.ctx, c)
	r.exits.add(c.def.PodUID)
}

// reap is harvest's work; c.op is held.
func (r *Runtime) reap(ctx context.Context, c *container) {
	r.deleteTaskOrTell(ctx, c)
	if ctx.Err() != nil {
		return
	}
	r.ended(c)
}

// deleteTries is how often a task is deleted before that waits for the container's removal. containerd gives a shim
// three seconds to end, in which one on a busy machine may not.
const deleteTries = 3

// deleteTask deletes the task of a container whose process has ended, and with the last of a pod its shim; one that does
// not exist is no error. c.op is held.
func (r *Runtime) deleteTask(ctx context.Context, c *container) error {
	var err error
	for range deleteTries {
		_, err = r.client.TaskService().Delete(ctx, &tasksapi.DeleteTaskRequest{ContainerID: c.id})
		err = errgrpc.ToNative(err)
		if err == nil || errdefs.IsNotFound(err) {
			c.taskLeft = false
			return nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	c.taskLeft = true
	return fmt.Errorf("delete the task of container %s of pod %s/%s: %w", c.def.Name, c.def.PodNamespace, c.def.PodName, err)
}

// deleteTaskOrTell is deleteTask for those whom a task that stays does not keep from going on: it goes with the container.
func (r *Runtime) deleteTaskOrTell(ctx context.Context, c *container) {
	if err := r.deleteTask(ctx, c); err != nil && ctx.Err() == nil {
		r.log.Warn("the task of an ended container stays until the container is removed", "error", err)
	}
}

// ended settles how a container ended: by what its shim wrote, if it could.
func (r *Runtime) ended(c *container) {
	s := c.state()
	s.State, s.PID = Exited, 0
	exit, err := shimio.ReadExit(r.exitPath(c.id))
	if err == nil {
		s.ExitCode, s.FinishedAt = int32(exit.Status), exit.At
		c.mu.Lock()
		oom := c.oom || exit.OOMKills > 0
		c.mu.Unlock()
		if oom && exit.Status != 0 {
			s.OOMKilled, s.Reason = true, "OOMKilled"
		}
	} else {
		// A reboot, or a shim that was killed itself.
		s.ExitCode, s.Reason, s.Message = unknownCode, "ContainerStatusUnknown", "How the container's process ended is not known: its shim is gone"
	}
	if s.FinishedAt.IsZero() || s.FinishedAt.Before(s.StartedAt) {
		s.FinishedAt = time.Now()
	}
	r.save(c, s)
	close(c.done)
}

// Stop sends the image's stop signal (SIGTERM if it names none), waits for grace, then kills.
func (r *Runtime) Stop(ctx context.Context, id string, grace time.Duration) error {
	ctx = r.in(ctx)
	c, err := r.find(id)
	if err != nil {
		return err
	}
	if c.state().State != Running {
		return nil
	}
	if grace > 0 {
		sig := unix.SIGTERM
		if c.def.StopSignal != "" {
			if parsed, err := signal.ParseSignal(c.def.StopSignal); err == nil {
				sig = parsed
			}
		}
		if err := r.kill(ctx, c, sig, false); err != nil {
			return err
		}
		steps.Passed(ctx, "container: told to end")
		if ended, err := c.wait(ctx, grace); ended || err != nil {
			return err
		}
	}
	if err := r.kill(ctx, c, unix.SIGKILL, true); err != nil {
		return err
	}
	ended, err := c.wait(ctx, killPatience)
	if err == nil && !ended {
		err = fmt.Errorf("container %s of pod %s/%s: process %d does not end after SIGKILL", c.def.Name, c.def.PodNamespace, c.def.PodName, c.state().PID)
	}
	return err
}

func (c *container) wait(ctx context.Context, limit time.Duration) (ended bool, err error) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-c.done:
		return true, nil
	case <-ctx.Done():
		return false, ctx.Err()
	case <-timer.C:
		return false, nil
	}
}

func (r *Runtime) kill(ctx context.Context, c *container, sig syscall.Signal, all bool) error {
	_, err := r.client.TaskService().Kill(ctx, &tasksapi.KillRequest{ContainerID: c.id, Signal: uint32(sig), All: all})
	err = errgrpc.ToNative(err)
	switch {
	case err == nil:
		return nil
	case errdefs.IsNotFound(err), errdefs.IsFailedPrecondition(err):
		// It has ended; the event may be on its way, or lost with an earlier process of ours.
		go r.harvest(c)
		return nil
	}
	return fmt.Errorf("signal %s to container %s of pod %s/%s: %w", sig, c.def.Name, c.def.PodNamespace, c.def.PodName, err)
}

// Remove takes away a container with its root file system and logs; a running one is killed first.
// One that does not exist is no error.
func (r *Runtime) Remove(ctx context.Context, id string) error {
	ctx = r.in(ctx)
	c := r.lookup(id)
	if c == nil {
		return nil
	}
	for {
		if err := r.Stop(ctx, id, 0); err != nil {
			return err
		}
		c.op.Lock()
		if c.state().State != Running {
			break
		}
		c.op.Unlock() // a start was under way
	}
	defer c.op.Unlock()
	if c.taskLeft {
		if err := r.deleteTask(ctx, c); err != nil {
			return err
		}
	}
	if err := r.erase(ctx, id); err != nil {
		return fmt.Errorf("remove container %s of pod %s/%s: %w", c.def.Name, c.def.PodNamespace, c.def.PodName, err)
	}
	steps.Passed(ctx, "container: status gone")
	if c.def.LogPath != "" {
		for _, f := range append(crilog.Rotated(c.def.LogPath), c.def.LogPath) {
			if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	r.mu.Lock()
	delete(r.containers, id)
	r.mu.Unlock()
	return nil
}

// erase removes what containerd and the host hold of a container that does not run.
func (r *Runtime) erase(ctx context.Context, id string) error {
	if err := r.client.ContainerService().Delete(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	steps.Passed(ctx, "container: record gone")
	if err := r.client.SnapshotService(r.snapshotter).Remove(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	steps.Passed(ctx, "container: root file system gone")
	if len(id) >= 32 {
		// Left only by a shim that was killed.
		if err := os.Remove(r.attachSocket(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return r.removeStatus(id)
}

// DiskUsage is what a container has written to its root file system, in bytes and files; zero for one that is gone.
func (r *Runtime) DiskUsage(ctx context.Context, id string) (bytes, inodes int64, err error) {
	u, err := r.client.SnapshotService(r.snapshotter).Usage(r.in(ctx), id)
	if errdefs.IsNotFound(err) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("disk usage of container %s: %w", id, err)
	}
	return u.Size, u.Inodes, nil
}

// List implements Containers.
func (r *Runtime) List(context.Context) ([]Container, error) {
	return r.list(func(*container) bool { return true }), nil
}

// ListPod implements Containers.
func (r *Runtime) ListPod(_ context.Context, pod types.UID) ([]Container, error) {
	return r.list(func(c *container) bool { return c.def.PodUID == pod }), nil
}

func (r *Runtime) list(want func(*container) bool) []Container {
	r.mu.Lock()
	var found []*container
	for _, c := range r.containers {
		if want(c) {
			found = append(found, c)
		}
	}
	r.mu.Unlock()
	all := make([]Container, 0, len(found))
	for _, c := range found {
		all = append(all, c.public())
	}
	slices.SortFunc(all, func(a, b Container) int {
		if d := a.CreatedAt.Compare(b.CreatedAt); d != 0 {
			return d
		}
		return strings.Compare(a.ID, b.ID)
	})
	return all
}
