// SPDX-License-Identifier: Apache-2.0

// Package csi runs the node's side of CSI drivers (https://github.com/container-storage-interface/spec): drivers that put
// a socket into the registration directory are told apart, shown in the node's CSINode, and asked to mount volumes.
package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/apimachinery/pkg/util/version"
	"k8s.io/client-go/kubernetes"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

const (
	// askLimit bounds a question about the driver itself.
	askLimit = 30 * time.Second
	// firstTry and tryLimit are the pauses between tries to register a driver.
	firstTry = time.Second
	tryLimit = time.Minute
	// rewatch is how long to wait before a directory that could not be watched is tried again.
	rewatch = 10 * time.Second
	// maxDrivers bounds how many sockets are looked at: each costs a goroutine.
	maxDrivers = 100
	// maxMessage bounds what a driver answers.
	maxMessage = 4 << 20
)

// ErrNoDriver means that no driver of that name is registered with this node.
var ErrNoDriver = errors.New("no such CSI driver on this node")

// Config of Drivers. All fields are needed.
type Config struct {
	Dir      string // of registration sockets: DATA/plugins_registry
	NodeName string
	Client   kubernetes.Interface
	Log      *slog.Logger
}

// Drivers are those that have registered with this node.
type Drivers struct {
	cfg   Config
	shown sync.Mutex // held while the API is told of a driver: one at a time

	mu      sync.Mutex
	drivers map[string]driver // by name
}

// driver is one that has registered.
type driver struct {
	name     string
	socket   string // by which it registered
	endpoint string
}

// New knows no driver yet.
func New(cfg Config) *Drivers { return &Drivers{cfg: cfg, drivers: map[string]driver{}} }

func (d *Drivers) find(name string) (driver, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f, ok := d.drivers[name]; ok {
		return f, nil
	}
	return driver{}, fmt.Errorf("driver name %s not found in the list of registered CSI drivers: %w", name, ErrNoDriver)
}

// registration is a socket that is being registered, or is.
type registration struct {
	identity string // of the file: another driver may take its name
	end      func() // gives up the registration, and waits until that is done
}

// Run registers drivers as their sockets come, and forgets them as these go, until ctx ends.
func (d *Drivers) Run(ctx context.Context) {
	known := map[string]registration{}
	defer func() {
		for _, r := range known {
			r.end()
		}
	}()
	for ctx.Err() == nil {
		if err := d.watch(ctx, known); err != nil && ctx.Err() == nil {
			d.cfg.Log.Error("directory of CSI drivers", "dir", d.cfg.Dir, "error", err)
			select {
			case <-time.After(rewatch):
			case <-ctx.Done():
			}
		}
	}
}

// watch looks at the directory whenever something changes in it.
func (d *Drivers) watch(ctx context.Context, known map[string]registration) error {
	if err := os.MkdirAll(d.cfg.Dir, 0o750); err != nil {
		return err
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer w.Close()
	if err := w.Add(d.cfg.Dir); err != nil {
		return err
	}
	for {
		sockets, err := socketsIn(d.cfg.Dir)
		if err != nil {
			return err
		}
		d.follow(ctx, known, sockets)
		select {
		case e, ok := <-w.Events:
			if !ok {
				return errors.New("its watch ended")
			}
			if e.Name == d.cfg.Dir && e.Has(fsnotify.Remove) {
				return errors.New("it was removed")
			}
		case err := <-w.Errors:
			return err
		case <-ctx.Done():
			return nil
		}
	}
}

// socketsIn lists the sockets of a directory with what tells one from another of the same name.
func socketsIn(dir string) (map[string]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, e := range entries {
		if e.Type() != fs.ModeSocket || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			continue // it has gone
		}
		if len(out) == maxDrivers {
			return nil, fmt.Errorf("it has more than %d sockets", maxDrivers)
		}
		out[path] = fmt.Sprint(st.Dev, st.Ino, st.Mtim)
	}
	return out, nil
}

// follow begins and ends registrations so that there is one for each socket.
func (d *Drivers) follow(ctx context.Context, known map[string]registration, sockets map[string]string) {
	for path, r := range known {
		if sockets[path] != r.identity {
			r.end()
			delete(known, path)
		}
	}
	for path, identity := range sockets {
		if _, ok := known[path]; ok {
			continue
		}
		ctx, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		known[path] = registration{identity: identity, end: func() { cancel(); <-done }}
		go func() {
			defer close(done)
			d.keep(ctx, path)
		}()
	}
}

// keep registers the driver behind a socket, and forgets it when ctx ends.
func (d *Drivers) keep(ctx context.Context, socket string) {
	log := d.cfg.Log.With("socket", socket)
	pause := firstTry
	var mine driver
	for {
		var err error
		if mine, err = d.register(ctx, socket); err == nil {
			break
		}
		if ctx.Err() != nil {
			return
		}
		log.Error("CSI driver is not registered", "retry", pause, "error", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		pause = min(2*pause, tryLimit)
	}
	log.Info("CSI driver is registered", "driver", mine.name, "endpoint", mine.endpoint)
	<-ctx.Done()
	d.forget(ctx, mine)
}

// forget takes a driver out of the list, unless another has registered by its name since. An agent that ends leaves the
// drivers in its CSINode: they are there when the next begins.
func (d *Drivers) forget(ctx context.Context, mine driver) {
	d.mu.Lock()
	is := d.drivers[mine.name] == mine
	if is {
		delete(d.drivers, mine.name)
	}
	d.mu.Unlock()
	if _, err := os.Lstat(mine.socket); !is || err == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), askLimit)
	defer cancel()
	if err := d.hide(ctx, mine.name); err != nil {
		d.cfg.Log.Error("CSI driver that is gone is still shown", "driver", mine.name, "error", err)
		return
	}
	d.cfg.Log.Info("CSI driver is gone", "driver", mine.name)
}

// register asks a socket who it is, the driver what this node is to it, and says so in the API.
func (d *Drivers) register(ctx context.Context, socket string) (driver, error) {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	conn, err := dial(socket)
	if err != nil {
		return driver{}, err
	}
	defer conn.Close()
	registrar := registerapi.NewRegistrationClient(conn)
	info, err := registrar.GetInfo(ctx, &registerapi.InfoRequest{})
	if err != nil {
		return driver{}, fmt.Errorf("who it is: %w", err)
	}
	mine, err := d.accept(ctx, info, socket)
	status := &registerapi.RegistrationStatus{PluginRegistered: err == nil}
	if err != nil {
		status.Error = err.Error()
	}
	if _, told := registrar.NotifyRegistrationStatus(ctx, status); told != nil && err == nil {
		d.forget(ctx, mine)
		err = fmt.Errorf("tell it that it is registered: %w", told)
	}
	return mine, err
}

// accept checks a driver and shows it.
func (d *Drivers) accept(ctx context.Context, info *registerapi.PluginInfo, socket string) (driver, error) {
	if err := check(info); err != nil {
		return driver{}, err
	}
	mine := driver{name: info.Name, socket: socket, endpoint: info.Endpoint}
	if mine.endpoint == "" {
		mine.endpoint = socket
	}
	conn, err := dial(mine.endpoint)
	if err != nil {
		return driver{}, err
	}
	defer conn.Close()
	node, err := spec.NewNodeClient(conn).NodeGetInfo(ctx, &spec.NodeGetInfoRequest{})
	if err != nil {
		return driver{}, fmt.Errorf("driver %s: NodeGetInfo at %s: %w", mine.name, mine.endpoint, err)
	}
	if node.NodeId == "" {
		return driver{}, fmt.Errorf("driver %s: NodeGetInfo gives no node id", mine.name)
	}
	if err := d.show(ctx, mine.name, node); err != nil {
		return driver{}, fmt.Errorf("driver %s: %w", mine.name, err)
	}
	d.mu.Lock()
	d.drivers[mine.name] = mine // of two with one name the later counts
	d.mu.Unlock()
	return mine, nil
}

// check refuses what this node cannot use.
func check(info *registerapi.PluginInfo) error {
	if info.Type != registerapi.CSIPlugin {
		return fmt.Errorf("this node has no use for plugins of type %q, only for %q", info.Type, registerapi.CSIPlugin)
	}
	if err := checkName(info.Name); err != nil {
		return err
	}
	for _, v := range info.SupportedVersions {
		if parsed, err := version.ParseGeneric(v); err == nil && parsed.Major() == 1 {
			return nil
		}
	}
	return fmt.Errorf("driver %s supports none of the versions that this node does: it has %q, the node 1.x", info.Name, info.SupportedVersions)
}

// dial connects to a driver's socket when something is asked.
func dial(path string) (*grpc.ClientConn, error) {
	path = strings.TrimPrefix(path, "unix://")
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("endpoint %q is not the path of a socket", path)
	}
	return grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
}
