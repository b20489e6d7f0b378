// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/node/runtime/shimio"
	"skep.io/skep/node/sandbox"
)

const dialTimeout = 10 * time.Second

// Attach joins the streams of a container's main process from now on, until its output ends, the
// caller's stdin and output break, or ctx ends.
func (r *Runtime) Attach(ctx context.Context, id string, s Streams) error {
	c, err := r.find(id)
	if err != nil {
		return err
	}
	if c.state().State != Running {
		return fmt.Errorf("%w: %s", ErrNotRunning, id)
	}
	conn, err := net.DialTimeout("unix", r.attachSocket(id), dialTimeout)
	if err != nil {
		return fmt.Errorf("attach to container %s: %w", c.def.Name, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if s.Resize != nil {
		go r.resize(r.in(ctx), id, s.Resize)
	}
	if s.In != nil && c.def.Stdin {
		go func() {
			if _, err := io.Copy(conn, s.In); err == nil {
				_ = conn.(*net.UnixConn).CloseWrite()
			}
		}()
	}
	errs := s.Err
	if c.def.TTY {
		errs = nil
	}
	err = shimio.ReadFrames(conn, s.Out, errs)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func (r *Runtime) resize(ctx context.Context, id string, sizes <-chan Size) {
	for {
		select {
		case <-ctx.Done():
			return
		case size, ok := <-sizes:
			if !ok {
				return
			}
			_, err := r.client.TaskService().ResizePty(ctx, &tasksapi.ResizePtyRequest{ContainerID: id, Width: uint32(size.Width), Height: uint32(size.Height)})
			if err != nil {
				r.log.Debug("terminal is not resized", "id", id, "error", err)
			}
		}
	}
}

// PortForward joins stream to a port of the pod, on its loopback.
func (r *Runtime) PortForward(ctx context.Context, pod types.UID, port uint16, stream io.ReadWriteCloser) error {
	defer stream.Close()
	all := r.list(func(c *container) bool { return c.def.PodUID == pod && c.state().State == Running })
	if len(all) == 0 {
		return fmt.Errorf("%w: no container of the pod runs", ErrNotRunning)
	}
	c := r.lookup(all[0].ID)
	if c == nil {
		return fmt.Errorf("%w: %s", ErrContainerNotFound, all[0].ID)
	}
	conn, err := dialLoopback(c.def.NetNS, port)
	if err != nil {
		return fmt.Errorf("failed to connect to localhost:%d inside the pod: %w", port, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close(); stream.Close() })
	defer stop()
	// Each direction ends by itself: a client that has sent everything may still read.
	out := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, stream)
		_ = conn.(*net.TCPConn).CloseWrite()
		out <- err
	}()
	_, err = io.Copy(stream, conn)
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return ctx.Err()
}

func dialLoopback(netNS string, port uint16) (conn net.Conn, err error) {
	ns := &sandbox.Sandbox{NetNS: netNS}
	err = ns.InNetNS(func() error {
		var errs []error
		for _, host := range []string{"127.0.0.1", "::1"} {
			// One literal address a call: the socket is made on this thread, in the pod's namespace.
			var derr error
			if conn, derr = net.DialTimeout("tcp", net.JoinHostPort(host, strconv.Itoa(int(port))), dialTimeout); derr == nil {
				return nil
			}
			errs = append(errs, derr)
		}
		return errors.Join(errs...)
	})
	return conn, err
}
