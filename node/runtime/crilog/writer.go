// SPDX-License-Identifier: Apache-2.0

// Package crilog writes container logs in the format and with the rotation that Kubernetes' log
// readers know: "TIME STREAM F|P TEXT" lines, NAME.log.YYYYMMDD-HHMMSS, older ones gzipped.
// It links into the shim, so it depends on the standard library alone.
package crilog

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// MaxLine is the longest text of one record; a longer line becomes several, all but the last marked P.
const MaxLine = 16 << 10

// Limits of a log on disk; the zero value never rotates.
type Limits struct {
	Size  int64 // bytes a file may reach
	Files int   // files kept, the current one included; at least 2 to rotate
}

// Writer owns one log file. Streams of the same container share it.
type Writer struct {
	path   string
	limits Limits
	now    func() time.Time

	mu      sync.Mutex
	file    *os.File
	size    int64
	rotated sync.WaitGroup
}

// Open creates the file with its directories, or continues it.
func Open(path string, limits Limits) (*Writer, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	w := &Writer{path: path, limits: limits, now: time.Now}
	if err := w.open(); err != nil {
		return nil, err
	}
	return w, nil
}

func (w *Writer) open() error {
	f, err := os.OpenFile(w.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	w.file, w.size = f, st.Size()
	return nil
}

// Close closes the file and waits for compression in the background. Streams must be flushed before.
func (w *Writer) Close() error {
	w.mu.Lock()
	f := w.file
	w.file = nil
	w.mu.Unlock()
	w.rotated.Wait()
	if f == nil {
		return nil
	}
	return f.Close()
}

var errClosed = errors.New("log is closed")

// write appends whole records; a write that the disk cut short is taken back, so that the file
// never holds half a record.
func (w *Writer) write(records []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.file == nil {
		return errClosed
	}
	if w.limits.Size > 0 && w.limits.Files > 1 && w.size >= w.limits.Size {
		if err := w.rotate(); err != nil {
			return fmt.Errorf("rotate %s: %w", w.path, err)
		}
	}
	n, err := w.file.Write(records)
	if err != nil {
		if n > 0 {
			if terr := w.file.Truncate(w.size); terr != nil {
				w.size += int64(n)
			}
		}
		return err
	}
	w.size += int64(n)
	return nil
}

// Stream is one of a container's outputs. It is used by one goroutine.
type Stream struct {
	w       *Writer
	name    []byte
	pending []byte // a line whose end has not come yet
	out     []byte
}

// Stream returns a writer for the named stream: stdout or stderr.
func (w *Writer) Stream(name string) *Stream {
	return &Stream{w: w, name: []byte(name)}
}

// Write turns data into records. It always consumes all of data; an error says that records were dropped.
func (s *Stream) Write(data []byte) (int, error) {
	total := len(data)
	s.out = s.out[:0]
	stamp := s.w.now().UTC()
	for len(data) > 0 {
		end := bytes.IndexByte(data, '\n')
		room := MaxLine - len(s.pending)
		switch {
		case end >= 0 && end <= room:
			s.pending = append(s.pending, data[:end]...)
			s.record(stamp, 'F')
			data = data[end+1:]
		case len(data) >= room:
			s.pending = append(s.pending, data[:room]...)
			s.record(stamp, 'P')
			data = data[room:]
		default:
			s.pending = append(s.pending, data...)
			data = nil
		}
	}
	if len(s.out) == 0 {
		return total, nil
	}
	return total, s.w.write(s.out)
}

// Flush writes what is left at the end of the stream, marked P since no newline followed.
func (s *Stream) Flush() error {
	if len(s.pending) == 0 {
		return nil
	}
	s.out = s.out[:0]
	s.record(s.w.now().UTC(), 'P')
	return s.w.write(s.out)
}

func (s *Stream) record(stamp time.Time, tag byte) {
	s.out = stamp.AppendFormat(s.out, time.RFC3339Nano)
	s.out = append(s.out, ' ')
	s.out = append(s.out, s.name...)
	s.out = append(s.out, ' ', tag, ' ')
	s.out = append(s.out, s.pending...)
	s.out = append(s.out, '\n')
	s.pending = s.pending[:0]
}
