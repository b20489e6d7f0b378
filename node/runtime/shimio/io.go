// SPDX-License-Identifier: Apache-2.0

package shimio

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/log"

	"skep.io/skep/node/runtime/crilog"
)

const (
	readBuffer = 32 << 10
	// drainLimit bounds the wait for output after a container's end: a process that outlived it
	// in a shared PID namespace may hold its stdout for ever.
	drainLimit = 2 * time.Second
)

// containerIO is one container's log writer, stdin and attach socket.
type containerIO struct {
	want     Stdio
	terminal bool
	dir      string

	writer     *crilog.Writer
	clients    *clients
	closeStdin func()      // closes containerd's side of stdin
	out        [2]*os.File // stdout and stderr, read ends
	keep       [2]*os.File // held open until containerd's side has its writers
	stdin      *os.File
	socket     *net.UnixListener

	readers sync.WaitGroup
}

func openIO(bundle string, terminal bool, want Stdio) (_ *containerIO, err error) {
	c := &containerIO{want: want, terminal: terminal, dir: filepath.Join(bundle, "stdio"), clients: newClients()}
	defer func() {
		if err != nil {
			c.abandon()
		}
	}()
	if want.LogPath != "" {
		if c.writer, err = crilog.Open(want.LogPath, crilog.Limits{Size: want.MaxSize, Files: want.MaxFiles}); err != nil {
			return nil, err
		}
	}
	for i, name := range c.streams() {
		if c.keep[i], err = fifo(filepath.Join(c.dir, name)); err != nil {
			return nil, err
		}
		if c.out[i], err = os.OpenFile(filepath.Join(c.dir, name), os.O_RDONLY|syscall.O_NONBLOCK, 0); err != nil {
			return nil, err
		}
	}
	if want.Stdin {
		if c.stdin, err = fifo(filepath.Join(c.dir, "stdin")); err != nil {
			return nil, err
		}
	}
	if want.Socket != "" {
		if err = os.MkdirAll(filepath.Dir(want.Socket), 0o700); err != nil {
			return nil, err
		}
		if err = os.Remove(want.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if c.socket, err = net.ListenUnix("unix", &net.UnixAddr{Name: want.Socket, Net: "unix"}); err != nil {
			return nil, err
		}
		if err = os.Chmod(want.Socket, 0o600); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// streams names the FIFOs; a terminal has no stderr of its own.
func (c *containerIO) streams() []string {
	if c.terminal {
		return []string{"stdout"}
	}
	return []string{"stdout", "stderr"}
}

// paths are what containerd's code shall use.
func (c *containerIO) paths() (stdin, stdout, stderr string) {
	stdout = filepath.Join(c.dir, "stdout")
	if !c.terminal {
		stderr = filepath.Join(c.dir, "stderr")
	}
	if c.stdin != nil {
		stdin = filepath.Join(c.dir, "stdin")
	}
	return stdin, stdout, stderr
}

// run starts reading. containerd's side holds its writers now, so the end of the container's
// output shows as end of file once the ends kept here are closed.
func (c *containerIO) run(l *log.Entry) {
	for i, name := range c.streams() {
		c.keep[i].Close()
		c.readers.Add(1)
		go func() {
			defer c.readers.Done()
			c.read(name, i, l)
		}()
	}
	if c.socket != nil {
		go c.accept()
	}
	go func() {
		c.readers.Wait()
		c.close()
	}()
}

func (c *containerIO) read(name string, stream int, l *log.Entry) {
	defer c.out[stream].Close()
	var lines *crilog.Stream
	if c.writer != nil {
		lines = c.writer.Stream(name)
		defer lines.Flush()
	}
	buf := make([]byte, readBuffer)
	failing := false
	for {
		n, err := c.out[stream].Read(buf)
		if n > 0 {
			if lines != nil {
				// A full disk must not stop the container: what cannot be written is dropped, and said once.
				_, werr := lines.Write(buf[:n])
				if werr != nil && !failing {
					l.WithError(werr).Error("container log is not written")
				}
				failing = werr != nil
			}
			c.clients.send(byte(stream+1), buf[:n])
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				l.WithError(err).Error("reading container output")
			}
			return
		}
	}
}

// accept serves those who attach until the socket is closed.
func (c *containerIO) accept() {
	for {
		conn, err := c.socket.AcceptUnix()
		if err != nil {
			return
		}
		if !c.clients.add(conn) {
			conn.Close()
			continue
		}
		go func() {
			// The client half-closes when its stdin ends; that alone does not end the session.
			if c.stdin != nil {
				_, err := io.Copy(c.stdin, conn)
				// A terminal has no end of file but the one that is typed: to close it would hang it up.
				if err == nil && c.want.StdinOnce && !c.terminal {
					c.stdin.Close()
					c.closeStdin()
				}
			} else {
				_, _ = io.Copy(io.Discard, conn)
			}
		}()
	}
}

// close ends what depends on the container's output.
func (c *containerIO) close() {
	if c.socket != nil {
		c.socket.Close() // removes the file
	}
	c.clients.close()
	if c.stdin != nil {
		c.stdin.Close()
	}
	if c.writer != nil {
		c.writer.Close()
	}
}

// finish waits until all output is written.
func (c *containerIO) finish() {
	done := make(chan struct{})
	go func() { c.readers.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(drainLimit):
		for _, f := range c.out {
			if f != nil {
				f.Close()
			}
		}
		<-done
	}
	c.close()
}

// abandon undoes openIO.
func (c *containerIO) abandon() {
	for _, f := range []*os.File{c.keep[0], c.keep[1], c.out[0], c.out[1]} {
		if f != nil {
			f.Close()
		}
	}
	c.close()
	os.RemoveAll(c.dir)
}
