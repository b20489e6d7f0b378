// SPDX-License-Identifier: Apache-2.0

// Package loader loads the kernel programs, attaches them, and pins maps and links so that both
// outlive the process. A process that starts anew opens the pinned maps and puts its own programs
// into the pinned links with one update each: at no moment is a hook without a program.
package loader

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"skep.io/skep/bpf"
	"skep.io/skep/dataplane/maps"
)

// Config says where and how to load.
type Config struct {
	Dir          string // on a BPF file system
	NodePortMode NodePortMode
	XDP          XDPMode
	ConntrackMax uint32 // flows of each protocol that fit; 0: as many as the objects say
	Log          *slog.Logger
}

// NodePortMode is whose address a connection from outside has when a node hands it on to another.
type NodePortMode string

// Modes. With direct server return the backend's node answers the client itself.
const (
	SNAT   NodePortMode = "snat" // the node's, to which the backend answers
	DSR    NodePortMode = "dsr"
	Hybrid NodePortMode = "hybrid" // TCP is answered directly, UDP by the node
)

// ParseNodePortMode reads a flag; empty is SNAT.
func ParseNodePortMode(s string) (NodePortMode, error) {
	switch m := NodePortMode(s); m {
	case "":
		return SNAT, nil
	case SNAT, DSR, Hybrid:
		return m, nil
	}
	return "", fmt.Errorf("%q is none of %s, %s and %s", s, SNAT, DSR, Hybrid)
}

// protocols that are answered directly, as bpf/dsr.h numbers them.
func (m NodePortMode) protocols() uint32 {
	switch m {
	case DSR:
		return 1 | 2
	case Hybrid:
		return 1
	}
	return 0
}

// Loader holds the loaded programs. What it attached stays when it is closed.
type Loader struct {
	cfg         Config
	collections []*ebpf.Collection
	programs    map[string]*ebpf.Program
	maps        *maps.Maps
	cookie      uint64    // of the network namespace
	senders     *ebpf.Map // devices that XDP may send by

	dir    string // name of the directory of this layout's maps
	pinned map[string]*ebpf.Map
	held   map[string]func() error // attaches that wait for Release, by link; nil: none does
}

// Programs of each object, all loaded at once.
var objects = []struct {
	name string
	load func() (*ebpf.CollectionSpec, error)
}{
	{"socket", bpf.LoadSocket},
	{"pod", bpf.LoadPod},
	{"host", bpf.LoadHost},
	{"ingress", bpf.LoadIngress},
	{"xdp", bpf.LoadXdp},
}

// Load opens the maps pinned under Dir, or makes them, and loads all programs.
func Load(cfg Config) (*Loader, error) {
	if err := EnsureBPFFS(cfg.Dir); err != nil {
		return nil, err
	}
	// Before Linux 5.11 maps count against a limit; since then this does nothing.
	if err := rlimit.RemoveMemlock(); err != nil {
		cfg.Log.Warn("cannot raise the limit of locked memory", "err", err)
	}
	cookie, err := ThisNetnsCookie()
	if err != nil {
		return nil, err
	}
	specs, err := specs(cfg)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.links(), 0o700); err != nil {
		return nil, fmt.Errorf("directory for pins: %w", err)
	}
	name := directoryName(specs)
	older, err := cfg.older(name)
	if err == nil {
		err = cfg.share(name, specs, older)
	}
	if err != nil {
		return nil, err
	}
	l := &Loader{cfg: cfg, dir: name, cookie: cookie, programs: map[string]*ebpf.Program{}, pinned: map[string]*ebpf.Map{}}
	dir := filepath.Join(cfg.Dir, name)
	byName := map[string]*ebpf.Map{}
	for i, spec := range specs {
		if objects[i].name == "xdp" && len(cfg.XDP.tries("")) == 0 {
			continue // it has no pinned map that the others have not
		}
		coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: dir}})
		if err != nil {
			l.Close()
			return nil, fmt.Errorf("loading %s programs: %w", objects[i].name, explain(err))
		}
		l.collections = append(l.collections, coll)
		for name, p := range coll.Programs {
			l.programs[name] = p
		}
		for name, m := range coll.Maps {
			byName[name] = m
			if spec.Maps[name].Pinning == ebpf.PinByName {
				l.pinned[name] = m
			}
		}
		if m, ok := coll.Maps["xdp_devices"]; ok {
			l.senders = m
		}
	}
	if l.maps, err = maps.New(byName); err != nil {
		l.Close()
		return nil, err
	}
	lost, err := l.carry(older, func(string) bool { return true })
	if err != nil {
		cfg.Log.Error("some of what an older version noted is lost", "err", err)
	}
	if slices.ContainsFunc(lost, isDesired) {
		cfg.Log.Info("maps are made anew; programs of the older version run until they are", "maps", lost)
		l.held = map[string]func() error{}
	}
	return l, nil
}

func (c Config) links() string { return filepath.Join(c.Dir, "links") }

func specs(cfg Config) ([]*ebpf.CollectionSpec, error) {
	cookie, err := ThisNetnsCookie()
	if err != nil {
		return nil, err
	}
	settings := map[string]any{
		"node_netns_cookie": cookie,
		"dsr_protocols":     cfg.NodePortMode.protocols(),
	}
	var out []*ebpf.CollectionSpec
	for _, o := range objects {
		spec, err := o.load()
		if err != nil {
			return nil, fmt.Errorf("object %s: %w", o.name, err)
		}
		for _, name := range []string{"conntrack_tcp", "conntrack_udp"} {
			if m, ok := spec.Maps[name]; ok && cfg.ConntrackMax > 0 {
				m.MaxEntries = cfg.ConntrackMax
			}
		}
		for name, v := range settings {
			if s, ok := spec.Variables[name]; ok {
				if err := s.Set(v); err != nil {
					return nil, fmt.Errorf("object %s: setting %s: %w", o.name, name, err)
				}
			}
		}
		out = append(out, spec)
	}
	return out, nil
}

// layout names what the pinned maps look like, so that another version's are never read as ours.
func layout(specs []*ebpf.CollectionSpec) string {
	var lines []string
	for _, s := range specs {
		for name, m := range s.Maps {
			if m.Pinning == ebpf.PinByName {
				lines = append(lines, fmt.Sprint(name, m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags))
			}
		}
	}
	slices.Sort(lines)
	lines = append(slices.Compact(lines), fmt.Sprint(maps.LayoutVersion))
	sum := sha256.Sum256([]byte(strings.Join(lines, "\n")))
	return hex.EncodeToString(sum[:4])
}

// explain adds what an operator can do.
func explain(err error) error {
	var v *ebpf.VerifierError
	switch {
	case errors.As(err, &v):
		return fmt.Errorf("the kernel's verifier refuses it; this kernel may be too old (5.18 is the oldest meant to work): %w", err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w (needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON)", err)
	case errors.Is(err, ebpf.ErrMapIncompatible):
		return fmt.Errorf("%w (a pinned map has another layout: `skep reset` removes it)", err)
	}
	return err
}

// ThisNetnsCookie identifies the network namespace this runs in.
func ThisNetnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("network namespace cookie: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("network namespace cookie (Linux 5.14 or later is needed): %w", err)
	}
	return cookie, nil
}

// NetnsCookie identifies the network namespace that the programs take for the node's.
func (l *Loader) NetnsCookie() uint64 { return l.cookie }

// Maps that the programs use.
func (l *Loader) Maps() *maps.Maps { return l.maps }

// Program by its name in C.
func (l *Loader) Program(name string) *ebpf.Program { return l.programs[name] }

// Close releases what this process holds. Pinned maps and links stay.
func (l *Loader) Close() {
	for _, c := range l.collections {
		c.Close()
	}
	if l.maps != nil {
		l.maps.Close()
	}
}

// attach puts a program into the link pinned as name, if that is one of the target's, else makes and
// pins a new one.
func (l *Loader) attach(name, program string, ours func(*link.Info) bool, create func(*ebpf.Program) (link.Link, error)) error {
	prog, ok := l.programs[program]
	if !ok {
		return fmt.Errorf("no program %q", program)
	}
	path := filepath.Join(l.cfg.links(), name)
	old, err := link.LoadPinnedLink(path, nil)
	if err == nil {
		info, err := old.Info()
		if err == nil && ours(info) && l.held != nil {
			l.held[name] = func() error { return l.attach(name, program, ours, create) }
			return old.Close()
		}
		// The kernel refuses an update of a link whose target is gone (ENOLINK).
		if err == nil && ours(info) && old.Update(prog) == nil {
			return old.Close()
		}
		l.cfg.Log.Debug("link is of another target, replacing it", "link", name)
		err = errors.Join(old.Unpin(), old.Close())
		if err != nil {
			return fmt.Errorf("stale link %s: %w", name, err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pinned link %s: %w", name, err)
	}
	fresh, err := create(prog)
	if err != nil {
		return err
	}
	defer fresh.Close()
	if err := fresh.Pin(path); err != nil {
		return fmt.Errorf("pinning link %s: %w", name, err)
	}
	return nil
}

func (l *Loader) detach(name string) error {
	err := os.Remove(filepath.Join(l.cfg.links(), name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Cleanup detaches every program and removes every map pinned under dir.
func Cleanup(dir string) error {
	// Links first, so that no program meets a missing map. Pins are all that hold them.
	err := errors.Join(os.RemoveAll(filepath.Join(dir, "links")), os.RemoveAll(dir))
	if err != nil {
		return fmt.Errorf("pinned programs and maps: %w", err)
	}
	return nil
}

// EnsureBPFFS mounts the BPF file system at /sys/fs/bpf if dir is meant to be on it and it is not
// mounted.
func EnsureBPFFS(dir string) error {
	parent := dir
	var st unix.Statfs_t
	for {
		err := unix.Statfs(parent, &st)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) || parent == "/" {
			return fmt.Errorf("directory for pins %s: %w", dir, err)
		}
		parent = filepath.Dir(parent)
	}
	if st.Type == unix.BPF_FS_MAGIC {
		return nil
	}
	const standard = "/sys/fs/bpf"
	if parent != standard {
		return fmt.Errorf("%s is not on a BPF file system: mount one (mount -t bpf bpf %s)", dir, parent)
	}
	if err := unix.Mount("bpf", standard, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mounting the BPF file system at %s: %w", standard, err)
	}
	return nil
}
