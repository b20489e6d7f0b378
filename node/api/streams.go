// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"skep.io/skep/node/runtime"
)

func (s *Server) exec(w http.ResponseWriter, r *http.Request) {
	opts, err := remotecommand.NewOptions(r)
	if err != nil {
		writeError(w, fail(http.StatusBadRequest, "%v", err))
		return
	}
	command := r.URL.Query()["command"]
	if len(command) == 0 {
		writeError(w, fail(http.StatusBadRequest, "you must specify at least 1 command"))
		return
	}
	c, err := s.running(r)
	if err != nil {
		writeError(w, err)
		return
	}
	remotecommand.ServeExec(w, r, sessions{s.cfg.Sessions}, c.PodName, string(c.PodUID), c.ID, command, opts,
		sessionIdle, sessionCreation, remotecommand.SupportedStreamingProtocols)
}

func (s *Server) attach(w http.ResponseWriter, r *http.Request) {
	opts, err := remotecommand.NewOptions(r)
	if err != nil {
		writeError(w, fail(http.StatusBadRequest, "%v", err))
		return
	}
	c, err := s.running(r)
	if err != nil {
		writeError(w, err)
		return
	}
	remotecommand.ServeAttach(w, r, sessions{s.cfg.Sessions}, c.PodName, string(c.PodUID), c.ID, opts,
		sessionIdle, sessionCreation, remotecommand.SupportedStreamingProtocols)
}

func (s *Server) portForward(w http.ResponseWriter, r *http.Request) {
	opts, err := portforward.NewV4Options(r)
	if err != nil {
		writeError(w, fail(http.StatusBadRequest, "%v", err))
		return
	}
	pod, err := s.pod(r)
	if err != nil {
		writeError(w, err)
		return
	}
	portforward.ServePortForward(w, r, sessions{s.cfg.Sessions}, pod.Name, string(pod.UID), opts,
		sessionIdle, sessionCreation, portforward.SupportedProtocols)
}

// sessions joins the streaming library to the runtime. Its "container" is a container's id.
type sessions struct{ runtime.Sessions }

func (s sessions) ExecInContainer(ctx context.Context, _, _, id string, command []string, in io.Reader, out, errs io.WriteCloser,
	tty bool, resize <-chan remotecommand.TerminalSize, _ time.Duration,
) error {
	code, err := s.Exec(ctx, id, command, streams(ctx, in, out, errs, tty, resize))
	if err != nil {
		return err
	}
	if code != 0 {
		return utilexec.CodeExitError{Err: fmt.Errorf("command terminated with exit code %d", code), Code: code}
	}
	return nil
}

func (s sessions) AttachContainer(ctx context.Context, _, _, id string, in io.Reader, out, errs io.WriteCloser,
	tty bool, resize <-chan remotecommand.TerminalSize,
) error {
	return s.Attach(ctx, id, streams(ctx, in, out, errs, tty, resize))
}

func (s sessions) PortForward(ctx context.Context, _ string, uid string, port int32, stream io.ReadWriteCloser) error {
	if port < 1 || port > 65535 {
		return fail(http.StatusBadRequest, "port %d is out of range", port)
	}
	return s.Sessions.PortForward(ctx, types.UID(uid), uint16(port), stream)
}

// streams leaves out those that the client did not ask for: an interface with a nil inside is not nil.
func streams(ctx context.Context, in io.Reader, out, errs io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) runtime.Streams {
	s := runtime.Streams{TTY: tty}
	if in != nil {
		s.In = in
	}
	if out != nil {
		s.Out = out
	}
	if errs != nil {
		s.Err = errs
	}
	if resize != nil {
		sizes := make(chan runtime.Size)
		go func() {
			defer close(sizes)
			for size := range resize {
				select {
				case sizes <- runtime.Size{Width: size.Width, Height: size.Height}:
				case <-ctx.Done():
					return
				}
			}
		}()
		s.Resize = sizes
	}
	return s
}
