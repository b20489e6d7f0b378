// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/dataplane"
	"skep.io/skep/dataplane/loader"
	"skep.io/skep/node/sandbox/cgroup"
	"skep.io/skep/node/steps"
)

// Errors of Create.
var (
	// ErrNoRange means that the node has no pod range yet: try again once it has.
	ErrNoRange = errors.New("the node has no pod address range yet")
	// ErrNoAddress means that the node's range is used up: pods must go first.
	ErrNoAddress = errors.New("no free pod address")
	// ErrNoIDs means that all ranges of user ids are used up: pods must go first.
	ErrNoIDs = errors.New("no free range of user ids")
)

// Config of Sandboxes.
type Config struct {
	RunDir   string                // records and pinned namespaces
	Network  Network               // nil attaches to no data plane
	PodCIDRs func() []netip.Prefix // the node's ranges, IPv4 first; may be empty until the node has them
	MTU      int                   // of pod links; 0: the kernel's default
	Pods     int                   // how many pods can have user ids of their own; 0: 110
	Log      *slog.Logger
}

// Sandboxes makes and removes the sandboxes of this node and remembers them across restarts.
type Sandboxes struct {
	cfg Config

	mu      sync.Mutex
	records map[types.UID]*record
	pools   map[netip.Prefix]*pool
	lastIDs uint32 // first of the range of ids that was handed out last
	adopted bool
	podLock map[types.UID]*podMutex
}

// podMutex serialises what is done to one pod, while others go on.
type podMutex struct {
	sync.Mutex
	users int
}

// New does not touch the kernel; the first List adopts what an earlier process left.
func New(cfg Config) (*Sandboxes, error) {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	s := &Sandboxes{cfg: cfg, records: map[types.UID]*record{}, pools: map[netip.Prefix]*pool{}, podLock: map[types.UID]*podMutex{}}
	if cfg.Pods == 0 {
		s.cfg.Pods = 110
	}
	if err := os.MkdirAll(s.recordDir(), 0o700); err != nil {
		return nil, fmt.Errorf("sandbox records: %w", err)
	}
	return s, nil
}

func (s *Sandboxes) nsDir(uid types.UID) string {
	return filepath.Join(s.cfg.RunDir, "ns", string(uid))
}

func (s *Sandboxes) lockPod(uid types.UID) (unlock func()) {
	s.mu.Lock()
	m := s.podLock[uid]
	if m == nil {
		m = &podMutex{}
		s.podLock[uid] = m
	}
	m.users++
	s.mu.Unlock()
	m.Lock()
	return func() {
		m.Unlock()
		s.mu.Lock()
		if m.users--; m.users == 0 {
			delete(s.podLock, uid)
		}
		s.mu.Unlock()
	}
}

// Create makes a pod's sandbox, or returns the one it has. After an error nothing is left of it. The data plane takes
// the pod meanwhile, for which the kernel waits two RCU grace periods (tcx: some 20 ms): nothing of the pod may run
// before Attached says so.
func (s *Sandboxes) Create(ctx context.Context, spec Spec) (*Sandbox, error) {
	if spec.PodUID == "" || strings.ContainsAny(string(spec.PodUID), "/\x00") {
		return nil, fmt.Errorf("pod %s/%s: %q is not a uid", spec.Namespace, spec.Name, spec.PodUID)
	}
	if spec.OwnUsers && (spec.HostNetwork || spec.HostIPC) {
		return nil, fmt.Errorf("pod %s/%s: with hostUsers: false it cannot have hostNetwork or hostIPC", spec.Namespace, spec.Name)
	}
	for name := range spec.Sysctls {
		if err := checkSysctl(name, spec); err != nil {
			return nil, fmt.Errorf("pod %s/%s: %w", spec.Namespace, spec.Name, err)
		}
	}
	if err := s.adopt(ctx); err != nil {
		return nil, err
	}
	unlock := s.lockPod(spec.PodUID)
	r, err := s.create(ctx, spec)
	if err != nil || r.Complete {
		defer unlock()
		if err != nil {
			return nil, err
		}
		return r.Sandbox.copy(), nil
	}
	box := r.Sandbox.copy()
	ctx = context.WithoutCancel(ctx) // begun is finished
	go func() {
		defer unlock()
		defer close(r.attached)
		if r.attachErr = s.attach(ctx, r); r.attachErr != nil {
			s.discard(ctx, r)
		}
	}()
	return box, nil
}

// Attached waits until the pod's sandbox is attached to the data plane. After an error nothing is left of the sandbox.
func (s *Sandboxes) Attached(ctx context.Context, uid types.UID) error {
	s.mu.Lock()
	r := s.records[uid]
	s.mu.Unlock()
	if r == nil {
		return fmt.Errorf("pod %s has no sandbox", uid)
	}
	if r.attached == nil {
		return nil
	}
	select {
	case <-r.attached:
		return r.attachErr
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Limit bounds the cgroup of a pod anew. Errors: cgroup.ErrInUse.
func (s *Sandboxes) Limit(_ context.Context, uid types.UID, limits cgroup.Limits) error {
	s.mu.Lock()
	r := s.records[uid]
	s.mu.Unlock()
	if r == nil {
		return fmt.Errorf("pod %s has no sandbox", uid)
	}
	if r.CgroupParent == "" {
		return nil
	}
	if err := cgroup.CheckMemory(r.CgroupParent, limits.MemoryBytes); err != nil {
		return fmt.Errorf("pod %s/%s: %w", r.Sandbox.Namespace, r.Sandbox.Name, err)
	}
	return cgroup.Set(r.CgroupParent, limits)
}

// create returns a record that is complete, or one that is all but attached.
func (s *Sandboxes) create(ctx context.Context, spec Spec) (*record, error) {
	s.mu.Lock()
	have := s.records[spec.PodUID]
	s.mu.Unlock()
	if have != nil {
		if have.Complete {
			return have, nil
		}
		if err := s.remove(ctx, have); err != nil {
			return nil, fmt.Errorf("pod %s/%s: what is left of its sandbox: %w", spec.Namespace, spec.Name, err)
		}
	}
	r, err := s.build(ctx, spec)
	if err != nil {
		if r != nil {
			s.discard(context.WithoutCancel(ctx), r)
		}
		return nil, fmt.Errorf("sandbox of pod %s/%s: %w", spec.Namespace, spec.Name, err)
	}
	return r, nil
}

// discard removes what could not be completed.
func (s *Sandboxes) discard(ctx context.Context, r *record) {
	if err := s.remove(ctx, r); err != nil {
		s.cfg.Log.Error("sandbox is left over", "namespace", r.Sandbox.Namespace, "pod", r.Sandbox.Name, "error", err)
	}
}

// build acts; with an error it returns the record of what was begun, otherwise one that is all but attached.
func (s *Sandboxes) build(ctx context.Context, spec Spec) (*record, error) {
	r := &record{
		Sandbox:     Sandbox{PodUID: spec.PodUID, Namespace: spec.Namespace, Name: spec.Name},
		HostNetwork: spec.HostNetwork, CgroupParent: spec.CgroupParent, Created: time.Now(),
		attached: make(chan struct{}),
	}
	dir := s.nsDir(spec.PodUID)
	var want []string
	if !spec.HostNetwork {
		want = append(want, "net", "uts")
		r.Sandbox.NetNS, r.Sandbox.UTSNS = filepath.Join(dir, "net"), filepath.Join(dir, "uts")
		r.HostLink = hostLinkName(spec.PodUID)
		if err := s.address(r); err != nil {
			return nil, err
		}
	}
	if !spec.HostIPC {
		want = append(want, "ipc")
		r.Sandbox.IPCNS, r.Sandbox.ShmPath = filepath.Join(dir, "ipc"), filepath.Join(dir, "shm")
	}
	if err := s.add(r, spec.OwnUsers); err != nil {
		return nil, err
	}
	if err := s.writeRecord(r); err != nil {
		return r, err
	}
	steps.Passed(ctx, "sandbox: recorded")
	if spec.CgroupParent != "" {
		if err := cgroup.Create(spec.CgroupParent); err != nil {
			return r, err
		}
		if err := cgroup.Set(spec.CgroupParent, spec.CgroupLimits); err != nil {
			return r, err
		}
	}
	steps.Passed(ctx, "sandbox: cgroup made")
	if len(want) > 0 {
		setup := func() error {
			if !spec.HostNetwork {
				cookie, err := loader.ThisNetnsCookie()
				if err != nil {
					return err
				}
				s.mu.Lock()
				r.Sandbox.Endpoint.NetnsCookie = cookie
				s.mu.Unlock()
			}
			return configure(spec)
		}
		var err error
		if spec.OwnUsers {
			err = makeOwned(dir, want, r.Sandbox.FirstID, setup)
		} else {
			err = makeNamespaces(dir, want, setup)
		}
		if err != nil {
			return r, err
		}
	}
	steps.Passed(ctx, "sandbox: namespaces pinned")
	if r.Sandbox.ShmPath != "" {
		if err := makeShm(r.Sandbox.ShmPath, r.Sandbox.FirstID); err != nil {
			return r, err
		}
	}
	if r.HostLink != "" {
		if err := plug(r, s.cfg.MTU); err != nil {
			return r, err
		}
	}
	steps.Passed(ctx, "sandbox: plugged in")
	return r, nil
}

// attach completes what build made.
func (s *Sandboxes) attach(ctx context.Context, r *record) error {
	if r.HostLink != "" && s.cfg.Network != nil {
		if err := s.cfg.Network.AttachEndpoint(ctx, r.Sandbox.Endpoint); err != nil {
			return fmt.Errorf("attach to the data plane: %w", err)
		}
	}
	steps.Passed(ctx, "sandbox: attached")
	done := *r
	done.Complete = true
	if err := s.writeRecord(&done); err != nil {
		return err
	}
	steps.Passed(ctx, "sandbox: complete")
	s.mu.Lock()
	r.Complete = true
	s.mu.Unlock()
	return nil
}

// add makes a record known, with a range of ids if it shall have one.
func (s *Sandboxes) add(r *record, ownUsers bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ownUsers {
		taken := map[uint32]bool{}
		for _, o := range s.records {
			taken[o.Sandbox.FirstID] = true
		}
		first, ok := nextIDs(s.lastIDs, s.cfg.Pods, taken)
		if !ok {
			s.release(r.Sandbox.Addrs)
			return fmt.Errorf("%w: all %d are taken by pods with hostUsers: false", ErrNoIDs, s.cfg.Pods)
		}
		s.lastIDs = first
		r.Sandbox.FirstID, r.Sandbox.UserNS = first, filepath.Join(s.nsDir(r.Sandbox.PodUID), userKind)
	}
	s.records[r.Sandbox.PodUID] = r
	return nil
}

// configure runs on the thread that has just entered the pod's new namespaces.
func configure(spec Spec) error {
	if !spec.HostNetwork {
		if spec.Hostname != "" {
			if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
				return fmt.Errorf("hostname %q: %w", spec.Hostname, err)
			}
		}
		if err := prepareNetNS(); err != nil {
			return fmt.Errorf("network namespace: %w", err)
		}
	}
	if spec.OwnUsers {
		return nil // only its own root may: the runtime does it with each container
	}
	for _, name := range slices.Sorted(maps.Keys(spec.Sysctls)) {
		if err := setSysctl(sysctlKey(name), spec.Sysctls[name]); err != nil {
			return fmt.Errorf("sysctl %s=%s: %w", name, spec.Sysctls[name], err)
		}
	}
	return nil
}

// address gives the record one address of each of the node's ranges, and link addresses.
func (s *Sandboxes) address(r *record) error {
	ranges := s.cfg.PodCIDRs()
	if len(ranges) == 0 {
		return ErrNoRange
	}
	e := dataplane.Endpoint{PodUID: r.Sandbox.PodUID, Namespace: r.Sandbox.Namespace, Name: r.Sandbox.Name, NetNS: r.Sandbox.NetNS}
	var err error
	if e.PodMAC, err = newMAC(); err != nil {
		return err
	}
	if e.HostMAC, err = newMAC(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, prefix := range ranges {
		a, err := s.pool(prefix).next()
		if err != nil {
			s.release(e.Addrs)
			return err
		}
		e.Addrs = append(e.Addrs, a)
	}
	s.writeCursor()
	r.Sandbox.Endpoint, r.Sandbox.Addrs = e, slices.Clone(e.Addrs)
	return nil
}

// pool finds or makes the pool of a range; addresses of known sandboxes are in use in it.
func (s *Sandboxes) pool(prefix netip.Prefix) *pool {
	if p := s.pools[prefix]; p != nil {
		return p
	}
	p := newPool(prefix)
	var newest time.Time
	for _, r := range s.records {
		for _, a := range r.Sandbox.Addrs {
			if !prefix.Contains(a) {
				continue
			}
			p.used[a] = true
			if r.Created.After(newest) {
				newest, p.last = r.Created, a
			}
		}
	}
	if last, ok := s.readCursor()[prefix.String()]; ok && prefix.Contains(last) {
		p.last = last
	}
	s.pools[prefix] = p
	return p
}

func (s *Sandboxes) release(addrs []netip.Addr) {
	for _, p := range s.pools {
		for _, a := range addrs {
			p.release(a)
		}
	}
}

// Remove takes away everything of a pod's sandbox. A pod without one is no error.
func (s *Sandboxes) Remove(ctx context.Context, uid types.UID) error {
	if err := s.adopt(ctx); err != nil {
		return err
	}
	defer s.lockPod(uid)()
	s.mu.Lock()
	r := s.records[uid]
	s.mu.Unlock()
	if r == nil {
		return nil
	}
	if err := s.remove(ctx, r); err != nil {
		return fmt.Errorf("sandbox of pod %s/%s: %w", r.Sandbox.Namespace, r.Sandbox.Name, err)
	}
	return nil
}

func (s *Sandboxes) remove(ctx context.Context, r *record) error {
	uid := r.Sandbox.PodUID
	if r.HostLink != "" {
		if s.cfg.Network != nil {
			if err := s.cfg.Network.DetachEndpoint(ctx, r.Sandbox.Endpoint); err != nil {
				return fmt.Errorf("detach from the data plane: %w", err)
			}
		}
		if err := unplug(r.HostLink); err != nil {
			return err
		}
	}
	steps.Passed(ctx, "sandbox: unplugged")
	if err := unpin(s.nsDir(uid)); err != nil {
		return err
	}
	steps.Passed(ctx, "sandbox: namespaces gone")
	if r.CgroupParent != "" {
		if err := cgroup.Remove(ctx, r.CgroupParent); err != nil {
			return err
		}
	}
	steps.Passed(ctx, "sandbox: cgroup gone")
	s.mu.Lock()
	s.release(r.Sandbox.Addrs)
	delete(s.records, uid)
	s.mu.Unlock()
	if err := os.Remove(s.recordPath(uid)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// List reports the complete sandboxes. The first call adopts what an earlier process left and
// removes what is broken or incomplete.
func (s *Sandboxes) List(ctx context.Context) ([]*Sandbox, error) {
	if err := s.adopt(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*Sandbox
	for _, r := range s.records {
		if r.Complete {
			all = append(all, r.Sandbox.copy())
		}
	}
	slices.SortFunc(all, func(a, b *Sandbox) int { return strings.Compare(string(a.PodUID), string(b.PodUID)) })
	return all, nil
}

func (s *Sandbox) copy() *Sandbox {
	c := *s
	c.Addrs = slices.Clone(s.Addrs)
	c.Endpoint.Addrs = slices.Clone(s.Endpoint.Addrs)
	return &c
}
