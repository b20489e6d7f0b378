// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"time"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// maxExecOutput bounds each stream that ExecSync keeps; more is dropped.
	maxExecOutput = 4 << 20
	// execDrain is how long the output of an ended command is waited for: a process that it left behind may hold it open.
	execDrain = 2 * time.Second
)

// Exec runs a command in a running container. exitCode is valid if err is nil.
func (r *Runtime) Exec(ctx context.Context, id string, command []string, s Streams) (int, error) {
	return r.exec(r.in(ctx), id, command, s)
}

// ExecSync runs a command to its end; after timeout (0: none) it is killed and the error is ErrTimeout.
func (r *Runtime) ExecSync(ctx context.Context, id string, command []string, timeout time.Duration) (stdout, stderr []byte, exitCode int, err error) {
	ctx = r.in(ctx)
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, ErrTimeout)
		defer cancel()
	}
	out, errs := &bounded{limit: maxExecOutput}, &bounded{limit: maxExecOutput}
	exitCode, err = r.exec(ctx, id, command, Streams{Out: out, Err: errs})
	if err != nil && errors.Is(context.Cause(ctx), ErrTimeout) {
		err = fmt.Errorf("%w after %s: %q", ErrTimeout, timeout, command)
	}
	return out.bytes(), errs.bytes(), exitCode, err
}

func (r *Runtime) exec(ctx context.Context, id string, command []string, s Streams) (int, error) {
	c, err := r.find(id)
	if err != nil {
		return 0, err
	}
	if c.state().State != Running {
		return 0, fmt.Errorf("%w: %s", ErrNotRunning, id)
	}
	if len(command) == 0 {
		return 0, errors.New("exec: no command")
	}
	spec, err := r.processSpec(ctx, id)
	if err != nil {
		return 0, err
	}
	spec.Args, spec.Terminal = command, s.TTY
	if s.TTY {
		spec.Env = append(spec.Env, "TERM=xterm")
	}
	container, err := r.client.LoadContainer(ctx, id)
	if err != nil {
		return 0, err
	}
	task, err := container.Task(ctx, nil)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrNotRunning, err)
	}
	name := make([]byte, 16)
	if _, err := rand.Read(name); err != nil {
		return 0, err
	}
	stdin, closed := watchEOF(s.In)
	process, err := task.Exec(ctx, hex.EncodeToString(name), spec, r.execIO(stdin, s))
	if err != nil {
		return 0, err
	}
	// The process must not survive the session, whatever becomes of ctx.
	end := context.WithoutCancel(ctx)
	defer func() {
		_, err := process.Delete(end, client.WithProcessKill)
		if err != nil && !errdefs.IsNotFound(err) {
			r.log.Warn("exec process is not removed", "container", c.def.Name, "pod", c.def.PodName, "namespace", c.def.PodNamespace, "error", err)
		}
	}()
	exit, err := process.Wait(end)
	if err != nil {
		return 0, err
	}
	if err := process.Start(ctx); err != nil {
		return 0, fmt.Errorf("%w: %s", ErrStart, startMessage(err))
	}
	resize := s.Resize
	for {
		select {
		case size, ok := <-resize:
			if !ok {
				resize = nil
				continue
			}
			if err := process.Resize(ctx, uint32(size.Width), uint32(size.Height)); err != nil && !errdefs.IsNotFound(err) {
				r.log.Debug("terminal is not resized", "container", c.def.Name, "error", err)
			}
		case <-closed:
			closed = nil
			if err := process.CloseIO(ctx, client.WithStdinCloser); err != nil && !errdefs.IsNotFound(err) {
				r.log.Debug("stdin is not closed", "container", c.def.Name, "error", err)
			}
		case <-ctx.Done():
			_ = process.Kill(end, unix.SIGKILL)
			<-exit
			process.IO().Cancel()
			return 0, context.Cause(ctx)
		case status := <-exit:
			drain(process.IO())
			code, _, err := status.Result()
			return int(code), err
		}
	}
}

// execIO makes the FIFOs of one command under RunDir.
func (r *Runtime) execIO(stdin io.Reader, s Streams) cio.Creator {
	streams := []cio.Opt{cio.WithFIFODir(filepath.Join(r.cfg.RunDir, "exec"))}
	out, errs := s.Out, s.Err
	if out == nil {
		out = io.Discard
	}
	if errs == nil {
		errs = io.Discard
	}
	if s.TTY {
		errs = nil
		streams = append(streams, cio.WithTerminal)
	}
	return cio.NewCreator(append(streams, cio.WithStreams(stdin, out, errs))...)
}

// drain waits for the rest of the output, but not for ever.
func drain(i cio.IO) {
	done := make(chan struct{})
	go func() { i.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(execDrain):
		i.Cancel()
	}
}

// processSpec is the container's own process as a pattern for another one.
func (r *Runtime) processSpec(ctx context.Context, id string) (*specs.Process, error) {
	stored, err := r.client.ContainerService().Get(ctx, id)
	if err != nil {
		return nil, err
	}
	var spec specs.Spec
	if err := json.Unmarshal(stored.Spec.GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("spec of container %s: %w", id, err)
	}
	return spec.Process, nil
}

// watchEOF tells when in has ended, so that the process's stdin can be closed.
func watchEOF(in io.Reader) (io.Reader, <-chan struct{}) {
	if in == nil {
		return nil, nil
	}
	closed := make(chan struct{})
	return &eofReader{Reader: in, closed: closed}, closed
}

type eofReader struct {
	io.Reader
	once   sync.Once
	closed chan struct{}
}

func (e *eofReader) Read(p []byte) (int, error) {
	n, err := e.Reader.Read(p)
	if err != nil {
		e.once.Do(func() { close(e.closed) })
	}
	return n, err
}

// bounded keeps the first bytes written to it.
type bounded struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	limit int
}

func (b *bounded) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if room := b.limit - b.buf.Len(); room > 0 {
		b.buf.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func (b *bounded) bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.buf.Bytes())
}
