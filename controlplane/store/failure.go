// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"syscall"

	etcderrors "go.etcd.io/etcd/server/v3/etcdserver/errors"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// failure records the first thing that etcd cannot survive.
type failure struct {
	dir  string
	once sync.Once
	err  error
	ch   chan struct{}
}

func newFailure(dir string) *failure { return &failure{dir: dir, ch: make(chan struct{})} }

// OnWrite is called by zap in place of os.Exit and panic. The goroutine ends with its deferred
// calls, as if etcd had returned; everything that waits for it sees ch closed.
func (f *failure) OnWrite(entry *zapcore.CheckedEntry, fields []zapcore.Field) {
	f.set(classify(f.dir, entry.Message, fields))
	runtime.Goexit()
}

func (f *failure) set(err error) {
	f.once.Do(func() {
		f.err = err
		close(f.ch)
	})
}

// classify gives etcd's last words a sentinel and a remedy.
func classify(dir, message string, fields []zapcore.Field) error {
	cause := causeOf(fields)
	switch {
	case errors.Is(cause, syscall.ENOSPC):
		return fmt.Errorf("%w: %s: %s: %w; free some space and start again", ErrNoSpace, dir, message, cause)
	case errors.Is(cause, syscall.EIO), errors.Is(cause, syscall.EROFS), errors.Is(cause, syscall.EACCES):
		return fmt.Errorf("%w: %s: %s: %w; look at the disk", ErrFailed, dir, message, cause)
	case cause != nil:
		return fmt.Errorf("%w: %s: %s: %w; restore the directory from a backup, or move it away to start an empty cluster", ErrCorrupt, dir, message, cause)
	}
	return fmt.Errorf("%w: %s: %s", ErrFailed, dir, message)
}

// causeOf is the last error among fields.
func causeOf(fields []zapcore.Field) (cause error) {
	for _, field := range fields {
		if err, ok := field.Interface.(error); ok && field.Type == zapcore.ErrorType {
			cause = err
		}
	}
	return cause
}

// newLogger gives etcd a zap logger that writes to log from level warn on (its own start is told
// in thirty lines at level info, which here is debug), and that ends goroutines through f.
func newLogger(log *slog.Logger, f *failure) *zap.Logger {
	return zap.New(&slogCore{log: log.With("component", "etcd")}, zap.WithFatalHook(f), zap.WithPanicHook(f))
}

// expected are warnings and errors that etcd logs at every start of a member like this one: it has
// no listeners, knows no users, and looks for its schema's version before it has applied an entry.
var expected = map[string]bool{
	"Running http and grpc server on single port. This is not recommended for production.": true,
	"simple token is not cryptographically signed":                                         true,
	"Failed to detect schema version":                                                      true,
	"failed to update storage version":                                                     true,
}

// unpublished is what etcd says when it cannot tell the others its name. After the start of a member with more than 5,000
// entries in its log it refuses itself for as long as it applies the latest again, since it counts from none of them
// (etcdserver's maxGapBetweenApplyAndCommitIndex), and tries again without a pause: thousands of lines. Another reason is
// worth one.
const unpublished = "failed to publish local member to cluster through raft"

type slogCore struct{ log *slog.Logger }

func slogLevel(l zapcore.Level) slog.Level {
	switch {
	case l >= zapcore.ErrorLevel:
		return slog.LevelError
	case l == zapcore.WarnLevel:
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

func (c *slogCore) Enabled(l zapcore.Level) bool {
	return c.log.Enabled(context.Background(), slogLevel(l))
}

func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{log: c.log.With(attrs(fields)...)}
}

func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if expected[e.Message] {
		e.Level = zapcore.DebugLevel
	}
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	if e.Message == unpublished && errors.Is(causeOf(fields), etcderrors.ErrTooManyRequests) {
		e.Level = zapcore.DebugLevel
	}
	c.log.Log(context.Background(), slogLevel(e.Level), e.Message, attrs(fields)...)
	return nil
}

func (c *slogCore) Sync() error { return nil }

func attrs(fields []zapcore.Field) []any {
	enc := zapcore.NewMapObjectEncoder()
	out := make([]any, 0, len(fields))
	for _, f := range fields {
		f.AddTo(enc)
		if v, ok := enc.Fields[f.Key]; ok {
			out = append(out, slog.Any(f.Key, v))
		}
	}
	return out
}
