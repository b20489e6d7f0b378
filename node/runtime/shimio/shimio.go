// SPDX-License-Identifier: Apache-2.0

// Package shimio runs inside the shim. It stands before containerd's task service and gives the
// containers that ask for it (their stdout is a URI of Stdio) a log file in the CRI format, a stdin
// that stays open, and a socket to attach to.
//
// The shim is the right place: it lives exactly as long as its containers, is there already, and
// survives the death of skep's process. A kill -9 of the server therefore neither loses a line nor
// blocks a container, and costs no process per container.
package shimio

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"skep.io/skep/node/sandbox/cgroup"
)

// Registration is the shim's task plugin: containerd's own, wrapped.
func Registration() *plugin.Registration {
	return &plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "task",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			publisher, err := ic.GetByID(plugins.EventPlugin, "publisher")
			if err != nil {
				return nil, err
			}
			stop, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			inner, err := task.NewTaskService(ic.Context, publisher.(shim.Publisher), stop.(shutdown.Service))
			if err != nil {
				return nil, err
			}
			removeSocket(stop.(shutdown.Service))
			return &service{TTRPCTaskService: inner, stdio: map[string]*containerIO{}}, nil
		},
	}
}

// listenerFD is where the parent of a shim puts the socket that it serves.
const listenerFD = 3

// removeSocket removes the shim's socket when it ends. containerd's code takes the socket's name to be that of
// the shim's first container, which is wrong for a shim that serves a group.
func removeSocket(stop shutdown.Service) {
	name, err := unix.Getsockname(listenerFD)
	if err != nil {
		return
	}
	if addr, ok := name.(*unix.SockaddrUnix); ok && filepath.IsAbs(addr.Name) {
		stop.RegisterCallback(func(context.Context) error { return shim.RemoveSocket("unix://" + addr.Name) })
	}
}

// service is containerd's task service with the creation and deletion of containers intercepted.
type service struct {
	taskapi.TTRPCTaskService

	mu    sync.Mutex
	stdio map[string]*containerIO
}

// RegisterTTRPC puts the wrapped service, not the inner one, on the shim's socket.
func (s *service) RegisterTTRPC(server *ttrpc.Server) error {
	taskapi.RegisterTTRPCTaskService(server, s)
	return nil
}

// Create gives the container FIFOs in its bundle and reads them in this process.
func (s *service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	want, ok, err := Parse(r.Stdout)
	if err != nil {
		return nil, err
	}
	if !ok {
		return s.TTRPCTaskService.Create(ctx, r)
	}
	cio, err := openIO(r.Bundle, r.Terminal, want)
	if err != nil {
		return nil, fmt.Errorf("standard streams of container %s: %w", r.ID, err)
	}
	r.Stdin, r.Stdout, r.Stderr = cio.paths()
	resp, err := s.TTRPCTaskService.Create(ctx, r)
	if err != nil {
		cio.abandon()
		return nil, err
	}
	cio.closeStdin = func() {
		// It holds a writer of its own, against the end of file between two who attach.
		_, _ = s.CloseIO(context.WithoutCancel(ctx), &taskapi.CloseIORequest{ID: r.ID, Stdin: true})
	}
	cio.run(log.G(ctx).WithField("id", r.ID))
	s.mu.Lock()
	s.stdio[r.ID] = cio
	s.mu.Unlock()
	return resp, nil
}

// Delete returns once the container's last line is in its log file, and how it ended is on disk: who sees
// the exit sees the log.
func (s *service) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	if r.ExecID != "" {
		return s.TTRPCTaskService.Delete(ctx, r)
	}
	s.mu.Lock()
	cio := s.stdio[r.ID]
	s.mu.Unlock()
	var kills uint64
	if cio != nil && cio.want.Cgroup != "" {
		// The deletion takes the cgroup with it.
		if stats, err := cgroup.Read(cio.want.Cgroup); err == nil {
			kills = stats.OOMKills
		}
	}
	resp, err := s.TTRPCTaskService.Delete(ctx, r)
	if err != nil || cio == nil {
		return resp, err
	}
	s.mu.Lock()
	delete(s.stdio, r.ID)
	s.mu.Unlock()
	cio.finish()
	if cio.want.ExitPath != "" {
		if err := (Exit{Status: resp.ExitStatus, At: resp.ExitedAt.AsTime(), OOMKills: kills}).write(cio.want.ExitPath); err != nil {
			log.G(ctx).WithError(err).WithField("id", r.ID).Error("exit status is not written")
		}
	}
	return resp, nil
}

// fifo makes a FIFO and opens both ends, so that neither side waits for the other and no writer
// ever gets SIGPIPE. hold is the end that is only kept open.
func fifo(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	if err := syscall.Mkfifo(path, 0o600); err != nil && !os.IsExist(err) {
		return nil, &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	return os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
}
