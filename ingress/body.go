// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"
)

var errBodyTooLarge = errors.New("the request's body is too large")

// clientError is a failure to read from the client, as opposed to one of the backend's.
type clientError struct{ err error }

func (e *clientError) Error() string { return "reading the request's body: " + e.err.Error() }
func (e *clientError) Unwrap() error { return e.err }

// bodySender copies a request's body to the backend while the reply may already come back. A nil
// sender stands for a request without a body.
type bodySender struct {
	x       *exchange
	limit   int64
	started bool
	done    chan struct{}
	eof     atomic.Bool // the client's body was read to its end
	ending  atomic.Bool // the exchange is over: read no further
	failed  atomic.Bool // err is set; comes before the connection is closed for it
	err     error       // readable after failed or done
}

// run copies until the body ends. On failure it closes the connection, which wakes whoever waits
// for the reply.
func (s *bodySender) run(u *upstreamConn, timeout time.Duration) {
	defer close(s.done)
	if s.err = s.copy(u); s.err != nil {
		s.failed.Store(true)
		u.Close()
		return
	}
	u.extendRead(time.Now(), timeout)
}

func (s *bodySender) copy(u *upstreamConn) error {
	x := s.x
	stall := x.p.limits.ClientStall
	chunked := x.r.ContentLength < 0
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	var total int64
	for {
		_ = x.rc.SetReadDeadline(time.Now().Add(stall)) // unsupported only by test recorders
		if s.ending.Load() {
			return &clientError{http.ErrAbortHandler}
		}
		n, err := x.r.Body.Read(*buf)
		if err == io.EOF {
			// Before the last bytes go out, so that a reply to the whole body finds this set.
			s.eof.Store(true)
			_ = x.rc.SetReadDeadline(time.Time{})
		}
		if total += int64(n); total > s.limit {
			return errBodyTooLarge
		}
		if n > 0 {
			_ = u.Conn.SetWriteDeadline(time.Now().Add(stall))
			if werr := writeChunk(u.bw, (*buf)[:n], chunked); werr != nil {
				return werr
			}
		}
		if err == io.EOF {
			if chunked {
				writeTrailer(u.bw, x.r.Trailer)
			}
			werr := u.bw.Flush()
			_ = u.Conn.SetWriteDeadline(time.Time{})
			return werr
		}
		if err != nil {
			return &clientError{err}
		}
		if werr := u.bw.Flush(); werr != nil {
			return werr
		}
	}
}

func writeChunk(w *bufio.Writer, p []byte, chunked bool) error {
	if !chunked {
		_, err := w.Write(p)
		return err
	}
	_, _ = w.WriteString(strconv.FormatInt(int64(len(p)), 16)) // errors stay in w
	_, _ = w.WriteString("\r\n")
	_, _ = w.Write(p)
	_, err := w.WriteString("\r\n")
	return err
}

func writeTrailer(w *bufio.Writer, trailer http.Header) {
	_, _ = w.WriteString("0\r\n")
	for name, values := range trailer {
		if hopByHop(name) || ownField(name) {
			continue
		}
		for _, v := range values {
			_, _ = w.WriteString(name + ": " + v + "\r\n")
		}
	}
	_, _ = w.WriteString("\r\n")
}

// complete tells whether the backend has the whole body, so that its connection can be used again.
func (s *bodySender) complete() bool {
	if s == nil {
		return true
	}
	if !s.started {
		return false
	}
	<-s.done
	return s.err == nil
}

// failure returns why the body could not be read from the client, if that is why the exchange
// failed.
func (s *bodySender) failure() error {
	if s == nil || !s.started {
		return nil
	}
	if s.x.r.Context().Err() != nil {
		// net/http ends the context before the failed read returns. That read is over, or about to be.
		<-s.done
	}
	if !s.failed.Load() {
		return nil
	}
	var ce *clientError
	if errors.As(s.err, &ce) || errors.Is(s.err, errBodyTooLarge) {
		return s.err
	}
	return nil
}

// What is read of a body whose reply is already out, so that the client gets to see the reply
// before the connection is reset under its feet.
const (
	lingerBytes = 1 << 20
	lingerTime  = 2 * time.Second
)

// end stops the sender when the exchange is over. After it nothing reads the body any more.
func (s *bodySender) end(u *upstreamConn, protoMajor int) {
	if s == nil || !s.started {
		return
	}
	if s.eof.Load() {
		// All that remains is to hand the last bytes to the kernel; a backend that has replied but
		// does not read is not waited for.
		grace := time.NewTimer(100 * time.Millisecond)
		defer grace.Stop()
		select {
		case <-s.done:
		case <-grace.C:
			u.Close()
			<-s.done
		}
		return
	}
	s.ending.Store(true)
	u.Close()
	if protoMajor != 1 {
		_ = s.x.rc.SetReadDeadline(time.Unix(1, 0))
		<-s.done
		return
	}
	if s.x.status < 200 || s.x.status == statusClientGone {
		_ = s.x.rc.SetReadDeadline(time.Unix(1, 0)) // no reply, nothing to linger for
		<-s.done
		return
	}
	_ = s.x.rc.Flush()
	_ = s.x.rc.SetReadDeadline(time.Now().Add(lingerTime))
	<-s.done
	_, _ = io.CopyN(io.Discard, s.x.r.Body, lingerBytes)
}
