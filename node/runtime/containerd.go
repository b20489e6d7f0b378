// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/cmd/containerd/server"
	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/sirupsen/logrus"

	// The plugins of the embedded server: this list is what it can do. containerd's own list
	// (cmd/containerd/builtins) has a CRI server too, which skep has no use for.
	_ "github.com/containerd/containerd/v2/core/runtime/v2"
	_ "github.com/containerd/containerd/v2/plugins/content/local/plugin"
	_ "github.com/containerd/containerd/v2/plugins/diff/walking/plugin"
	_ "github.com/containerd/containerd/v2/plugins/events"
	_ "github.com/containerd/containerd/v2/plugins/gc"
	_ "github.com/containerd/containerd/v2/plugins/imageverifier"
	_ "github.com/containerd/containerd/v2/plugins/leases"
	_ "github.com/containerd/containerd/v2/plugins/metadata"
	_ "github.com/containerd/containerd/v2/plugins/mount"
	_ "github.com/containerd/containerd/v2/plugins/sandbox"
	_ "github.com/containerd/containerd/v2/plugins/server/ttrpc"
	_ "github.com/containerd/containerd/v2/plugins/services/containers"
	_ "github.com/containerd/containerd/v2/plugins/services/content"
	_ "github.com/containerd/containerd/v2/plugins/services/diff"
	_ "github.com/containerd/containerd/v2/plugins/services/events"
	_ "github.com/containerd/containerd/v2/plugins/services/images"
	_ "github.com/containerd/containerd/v2/plugins/services/introspection"
	_ "github.com/containerd/containerd/v2/plugins/services/leases"
	_ "github.com/containerd/containerd/v2/plugins/services/namespaces"
	_ "github.com/containerd/containerd/v2/plugins/services/sandbox"
	_ "github.com/containerd/containerd/v2/plugins/services/snapshots"
	_ "github.com/containerd/containerd/v2/plugins/services/tasks"
	_ "github.com/containerd/containerd/v2/plugins/services/warning"
	_ "github.com/containerd/containerd/v2/plugins/snapshots/native/plugin"
	_ "github.com/containerd/containerd/v2/plugins/snapshots/overlay/plugin"
	_ "github.com/containerd/containerd/v2/plugins/transfer"
)

// taps is the type of the plugin below.
const taps plugin.Type = "io.skep.client.v1"

// tapKey is the context key under which a start of the server finds where to put its client's
// plugin context.
type tapKey struct{}

// tap is a plugin without services: it only hands the plugin set of the server that is being
// started to whoever starts it, so that the client calls containerd's services directly.
func tap() *plugin.Registration {
	return &plugin.Registration{
		Type: taps,
		ID:   "tap",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.LeasePlugin, plugins.SandboxStorePlugin,
			plugins.TransferPlugin, plugins.MountManagerPlugin, plugins.ServicePlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			if set, ok := ic.Context.Value(tapKey{}).(func(*plugin.InitContext)); ok {
				set(ic)
			}
			return struct{}{}, nil
		},
	}
}

// embed starts containerd in this process and returns a client of it. Its only socket is the one
// by which shims report events, which root alone can open.
func embed(ctx context.Context, root, state string) (*server.Server, *client.Client, error) {
	if !slices.ContainsFunc(registry.Graph(func(*plugin.Registration) bool { return false }), func(r plugin.Registration) bool { return r.Type == taps }) {
		registry.Register(tap())
	}
	if err := passable(state); err != nil {
		return nil, nil, fmt.Errorf("containerd's state: %w", err)
	}
	config := &srvconfig.Config{
		Version: 4,
		Root:    root,
		State:   state,
		Plugins: map[string]any{
			"io.containerd.server.v1.grpc":  map[string]any{"address": filepath.Join(state, "containerd.sock")},
			"io.containerd.server.v1.ttrpc": map[string]any{"address": filepath.Join(state, "events.sock")},
			"io.containerd.shim.v1.manager": map[string]any{"socket_dir": filepath.Join(state, "s")},
			// No pause between an image's removal and that of its content.
			"io.containerd.gc.v1.scheduler": map[string]any{"startup_delay": "10s"},
		},
	}
	if err := server.CreateTopLevelDirectories(config); err != nil {
		return nil, nil, fmt.Errorf("containerd's directories: %w", err)
	}
	if err := ownTempMounts(ctx, config.Root); err != nil {
		return nil, nil, err
	}
	var ic *plugin.InitContext
	set := func(c *plugin.InitContext) { ic = c }
	srv, err := server.New(context.WithValue(ctx, tapKey{}, set), config)
	if err != nil {
		return nil, nil, fmt.Errorf("containerd: %w", err)
	}
	if ic == nil {
		srv.Stop()
		return nil, nil, errors.New("containerd: its plugins did not start")
	}
	if err := srv.Start(ctx); err != nil {
		srv.Stop()
		return nil, nil, fmt.Errorf("containerd: %w", err)
	}
	c, err := client.New("", client.WithDefaultNamespace(namespace), client.WithInMemoryServices(ic))
	if err != nil {
		srv.Stop()
		return nil, nil, fmt.Errorf("containerd client: %w", err)
	}
	return srv, c, nil
}

// containerdLog sends containerd's log lines to l. Its progress reports are debug lines for skep.
func containerdLog(l *slog.Logger) *log.Entry {
	logger := logrus.New()
	logger.SetOutput(discard{})
	logger.SetLevel(logrus.InfoLevel)
	logger.AddHook(logHook{l: l.With("component", "containerd")})
	return logrus.NewEntry(logger)
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

type logHook struct{ l *slog.Logger }

func (logHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h logHook) Fire(e *logrus.Entry) error {
	level := slog.LevelDebug
	switch {
	case quiet(e.Message):
	case e.Level <= logrus.ErrorLevel:
		level = slog.LevelError
	case e.Level == logrus.WarnLevel:
		level = slog.LevelWarn
	}
	if !h.l.Enabled(e.Context, level) {
		return nil
	}
	attrs := make([]slog.Attr, 0, len(e.Data))
	for k, v := range e.Data {
		attrs = append(attrs, slog.Any(k, v))
	}
	ctx := e.Context
	if ctx == nil {
		ctx = context.Background()
	}
	h.l.LogAttrs(ctx, level, e.Message, attrs...)
	return nil
}

// quiet are messages about what is ordinary here: a shim that has ended, and the clean-up after a container that
// could not be started, which has its own event.
func quiet(message string) bool {
	switch message {
	case "copy shim log", "failed to delete task", "warnings while cleaning up dead shim", "failed check for fsverity support":
		return true
	}
	return false
}

// ownTempMounts lets containerd mount what it unpacks below its own directory, as its own command does, and removes what
// a process that was killed meanwhile left there. Otherwise it would stay in /tmp.
func ownTempMounts(ctx context.Context, root string) error {
	if err := mount.SetTempMountLocation(filepath.Join(root, "tmpmounts")); err != nil {
		return fmt.Errorf("containerd's temporary mounts: %w", err)
	}
	warnings, err := mount.CleanupTempMounts(0)
	if err != nil {
		return fmt.Errorf("containerd's temporary mounts: %w", err)
	}
	for _, warning := range warnings {
		log.G(ctx).WithError(warning).Warn("a temporary mount of before stays")
	}
	return nil
}
