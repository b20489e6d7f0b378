// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/cmd/containerd/server"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"k8s.io/apimachinery/pkg/types"
)

// namespace is containerd's, which keeps skep apart from other users of a host's containerd.
const namespace = "skep"

// shimName is the shim's file name; it lies beside the skep binary.
const shimName = "containerd-shim-runc-v2"

// Defaults of Config.
const (
	DefaultLogSize  = 10 << 20
	DefaultLogFiles = 5
)

// Errors that callers tell apart.
var (
	ErrImageNotFound     = errors.New("image is not on this node")
	ErrPull              = errors.New("image cannot be pulled")
	ErrContainerNotFound = errors.New("no such container")
	ErrNotRunning        = errors.New("container is not running")
	ErrTimeout           = errors.New("command timed out")
	// ErrStart wraps what runc said when a container's process could not be started: the command
	// does not exist, the user is unknown, a mount failed.
	ErrStart = errors.New("container cannot be started")
	// ErrNotReady wraps the error of a ContainerSpec's Ready. The container is still there, never started.
	ErrNotReady = errors.New("container must not start")
)

// Config of a Runtime.
type Config struct {
	DataDir           string // images and containers, under DataDir/containerd and DataDir/containers
	RunDir            string // sockets and state, under RunDir/containerd
	ShimPath          string // empty: beside the running executable
	RuncPath          string // empty: runc of $PATH
	ContainerdAddress string // socket of the host's containerd; empty: embedded
	SeccompDir        string // profiles of type Localhost
	RegistryConfigDir string // mirrors and certificates of registries, in containerd's layout; empty: none
	LogSize           int64  // bytes after which a container's log is rotated; 0: 10 MiB
	LogFiles          int    // log files kept a container; 0: 5
	// PullProgress, when set, hears about running pulls, bytes done and known so far.
	PullProgress func(ref string, done, total int64)
	Log          *slog.Logger
}

// Runtime implements Containers and Sessions; its method Images gives the image store.
type Runtime struct {
	cfg    Config
	log    *slog.Logger
	server *server.Server // nil with the host's containerd
	client *client.Client
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	host   hostFacts
	clog   *log.Entry // containerd's way to cfg.Log

	snapshotter string
	images      imageIndex
	exits       *exitQueue

	mu         sync.Mutex
	containers map[string]*container
}

var (
	_ Containers = (*Runtime)(nil)
	_ Sessions   = (*Runtime)(nil)
)

// New starts or connects to containerd and adopts its containers: those that run go on running.
func New(ctx context.Context, cfg Config) (_ *Runtime, err error) {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.LogSize == 0 {
		cfg.LogSize = DefaultLogSize
	}
	if cfg.LogFiles == 0 {
		cfg.LogFiles = DefaultLogFiles
	}
	if cfg.ShimPath == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		cfg.ShimPath = filepath.Join(filepath.Dir(self), shimName)
	}
	if _, err := os.Stat(cfg.ShimPath); err != nil {
		return nil, fmt.Errorf("containerd's shim: %w: `make build` puts it beside skep", err)
	}
	if cfg.RuncPath == "" {
		if cfg.RuncPath, err = exec.LookPath("runc"); err != nil {
			return nil, fmt.Errorf("%w: install the package runc", err)
		}
	}
	r := &Runtime{cfg: cfg, log: cfg.Log, containers: map[string]*container{}}
	r.images.byID = map[string]*imageInfo{}
	if r.host, err = readHost(); err != nil {
		return nil, err
	}
	// The runtime outlives the call: ctx bounds only the start.
	r.clog = containerdLog(cfg.Log)
	r.ctx, r.cancel = context.WithCancel(r.in(context.WithoutCancel(ctx)))
	defer func() {
		if err != nil {
			r.cancel()
			r.stopServer()
		}
	}()
	if err := passable(cfg.RunDir); err != nil {
		return nil, err
	}
	for _, dir := range []string{r.statusDir(), filepath.Join(cfg.RunDir, "attach"), filepath.Join(cfg.RunDir, "exec")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	r.exits = newExitQueue()
	if cfg.ContainerdAddress != "" {
		r.client, err = client.New(cfg.ContainerdAddress, client.WithDefaultNamespace(namespace), client.WithTimeout(5*time.Second))
	} else {
		r.server, r.client, err = embed(r.ctx, filepath.Join(cfg.DataDir, "containerd"), filepath.Join(cfg.RunDir, "containerd"))
	}
	if err != nil {
		return nil, err
	}
	if err := r.pickSnapshotter(); err != nil {
		return nil, err
	}
	events := r.subscribe()
	if err := r.loadImages(r.ctx); err != nil {
		return nil, err
	}
	r.images.pin(r.readImports())
	if err := r.adopt(r.ctx); err != nil {
		return nil, err
	}
	r.wg.Add(2)
	go func() { defer r.wg.Done(); r.watch(events) }()
	go func() { defer r.wg.Done(); r.exits.run(r.ctx) }()
	return r, nil
}

// Close ends this process's part. Containers go on running, with their logs. The embedded containerd keeps its
// connections to shims until the process ends, so another Runtime for the same directories belongs into another process.
func (r *Runtime) Close() error {
	r.cancel()
	r.wg.Wait()
	err := r.client.Close()
	r.stopServer()
	return err
}

func (r *Runtime) stopServer() {
	if r.server != nil {
		r.server.Stop()
	}
}

// in carries the caller's cancellation into containerd's namespace and to its logger.
func (r *Runtime) in(ctx context.Context) context.Context {
	return log.WithLogger(namespaces.WithNamespace(ctx, namespace), r.clog)
}

// pickSnapshotter takes overlayfs where its file system can carry it, else plain copies.
func (r *Runtime) pickSnapshotter() error {
	for _, name := range []string{"overlayfs", "native"} {
		if r.server == nil {
			// The host's containerd may not know a name; asking is free.
			if _, err := r.client.GetSnapshotterSupportedPlatforms(r.ctx, name); err != nil {
				continue
			}
		} else if r.client.SnapshotService(name) == nil {
			r.log.Warn("snapshotter does not work on this host", "snapshotter", name)
			continue
		}
		r.snapshotter = name
		return nil
	}
	return errors.New("containerd has no snapshotter that works under " + r.cfg.DataDir)
}

// Exits implements Containers.
func (r *Runtime) Exits() <-chan types.UID { return r.exits.out }

// exitQueue passes pods on without ever blocking who adds them; a pod that waits already is not
// added twice.
type exitQueue struct {
	out  chan types.UID
	wake chan struct{}

	mu      sync.Mutex
	pending []types.UID
	queued  map[types.UID]bool
}

func newExitQueue() *exitQueue {
	return &exitQueue{out: make(chan types.UID), wake: make(chan struct{}, 1), queued: map[types.UID]bool{}}
}

func (q *exitQueue) add(uid types.UID) {
	q.mu.Lock()
	if !q.queued[uid] {
		q.queued[uid] = true
		q.pending = append(q.pending, uid)
	}
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *exitQueue) run(ctx context.Context) {
	for {
		q.mu.Lock()
		var next types.UID
		have := len(q.pending) > 0
		if have {
			next = q.pending[0]
			q.pending = q.pending[1:]
			delete(q.queued, next)
		}
		q.mu.Unlock()
		if !have {
			select {
			case <-ctx.Done():
				return
			case <-q.wake:
			}
			continue
		}
		select {
		case <-ctx.Done():
			return
		case q.out <- next:
		}
	}
}
