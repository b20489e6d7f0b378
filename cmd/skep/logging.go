// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/containerd/log"
	"gopkg.in/natefinch/lumberjack.v2"
	"k8s.io/klog/v2"
)

// logFiles is how many rotated log files stay beside the current one.
const logFiles = 3

// logOutput is where the process logs to: standard error, or a file of mode 0600 that is rotated when it
// has maxSize megabytes. A file that cannot be written is an error now, not when there is something to say.
func logOutput(stderr io.Writer, path string, maxSize int) (io.Writer, error) {
	if path == "" {
		return stderr, nil
	}
	if maxSize <= 0 {
		return nil, fmt.Errorf("--log-file-max-size: %d is not a number of megabytes", maxSize)
	}
	file := &lumberjack.Logger{Filename: path, MaxSize: maxSize, MaxBackups: logFiles}
	if _, err := file.Write(nil); err != nil {
		return nil, fmt.Errorf("--log-file: %w", err)
	}
	return file, nil
}

// newLogger makes the process's one logger and sends klog's lines (upstream's libraries) through it.
func newLogger(out io.Writer, level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level: %q is not one of debug, info, warn, error", level)
	}
	options := &slog.HandlerOptions{Level: l}
	var handler slog.Handler
	switch format {
	case "text":
		handler = slog.NewTextHandler(out, options)
	case "json":
		handler = slog.NewJSONHandler(out, options)
	default:
		return nil, fmt.Errorf("--log-format: %q is not one of text, json", format)
	}
	// containerd says at warning which optional features of the file system are absent.
	if err := log.SetLevel("error"); err != nil {
		return nil, fmt.Errorf("containerd's log level: %w", err)
	}
	klog.SetSlogLogger(slog.New(upstream{Handler: handler, chatty: true}).With("from", "kubernetes"))
	return slog.New(upstream{Handler: handler}), nil
}

// upstream puts the libraries' records where an operator expects them.
type upstream struct {
	slog.Handler
	chatty bool // says at info what concerns its own workings, and klog its warnings too: debug here
}

// harmless are messages that upstream logs as errors or warnings although all is well, and why.
var harmless = []string{
	// The kubernetes Service is removed and written anew at each start; so says upstream of success.
	"Found stale data, removed previous endpoints on kubernetes service",
	// Upstream watches for manifests of admission configuration, which skep has none of.
	"The manifest file is empty, ignoring",
	// Mutating admission policies ask for OpenAPI before the server answers, and ask again.
	"failed to fetch openapi paths",
	// etcd: what it says of a new data directory, and of a member without peers and listeners.
	"Running http and grpc server on single port",
	"simple token is not cryptographically signed",
	"Failed to detect schema version",
	"failed to update storage version",
	// A session of exec or attach whose end the client closed first: every one of them.
	"use of closed network connection",
	// The repair of service addresses runs when its cache of Services is ahead of that of addresses.
	"is not allocated; repairing",
	// The token controllers start before the namespace that upstream makes, and try again.
	"Error while syncing ConfigMap namespaces \"kube-system\" not found",
}

func (u upstream) level(l slog.Level) slog.Level {
	if u.chatty && l == slog.LevelInfo {
		return slog.LevelDebug
	}
	return l
}

func (u upstream) Enabled(ctx context.Context, l slog.Level) bool {
	return u.Handler.Enabled(ctx, u.level(l))
}

func (u upstream) Handle(ctx context.Context, r slog.Record) error {
	r.Level = u.level(r.Level)
	if r.Level > slog.LevelDebug && isHarmless(r) {
		r.Level = slog.LevelDebug
	}
	if !u.Handler.Enabled(ctx, r.Level) {
		return nil
	}
	return u.Handler.Handle(ctx, r)
}

func (u upstream) WithAttrs(attrs []slog.Attr) slog.Handler {
	return upstream{u.Handler.WithAttrs(attrs), u.chatty}
}

func (u upstream) WithGroup(name string) slog.Handler {
	return upstream{u.Handler.WithGroup(name), u.chatty}
}

// isHarmless also covers watches that end because the process does.
func isHarmless(r slog.Record) bool {
	text := r.Message
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "err" || a.Key == "error" {
			text += " " + a.Value.String()
		}
		return true
	})
	for _, h := range harmless {
		if strings.Contains(text, h) {
			return true
		}
	}
	return strings.HasSuffix(text, context.Canceled.Error())
}
