// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Every socket hook with its program's name in C.
var socketHooks = []struct {
	program string
	attach  ebpf.AttachType
}{
	// The way back comes first: a reply must not meet a socket that was translated without it.
	{"getpeername4", ebpf.AttachCgroupInet4GetPeername},
	{"getpeername6", ebpf.AttachCgroupInet6GetPeername},
	{"recvmsg4", ebpf.AttachCGroupUDP4Recvmsg},
	{"recvmsg6", ebpf.AttachCGroupUDP6Recvmsg},
	{"sendmsg4", ebpf.AttachCGroupUDP4Sendmsg},
	{"sendmsg6", ebpf.AttachCGroupUDP6Sendmsg},
	{"connect4", ebpf.AttachCGroupInet4Connect},
	{"connect6", ebpf.AttachCGroupInet6Connect},
}

// AttachSockets puts the socket programs on a cgroup2 directory: they see every socket of the
// processes below it.
func (l *Loader) AttachSockets(cgroup string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(cgroup, &fs); err != nil {
		return fmt.Errorf("cgroup %s: %w", cgroup, err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("cgroup %s is not on a cgroup2 file system: mount one (mount -t cgroup2 none DIR), or name one that is", cgroup)
	}
	st, err := os.Stat(cgroup)
	if err != nil {
		return err
	}
	inode := inodeOf(st)
	for _, h := range socketHooks {
		ours := func(i *link.Info) bool {
			c := i.Cgroup()
			return c != nil && c.CgroupId == inode
		}
		err := l.attach("socket_"+h.program, h.program, ours, func(p *ebpf.Program) (link.Link, error) {
			return link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: h.attach, Program: p})
		})
		if err != nil {
			return fmt.Errorf("attaching %s to cgroup %s: %w", h.program, cgroup, err)
		}
	}
	return nil
}

// AttachIngress puts the sk_lookup program on the network namespace this runs in.
func (l *Loader) AttachIngress() error {
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer ns.Close()
	st, err := ns.Stat()
	if err != nil {
		return err
	}
	inode := inodeOf(st)
	ours := func(i *link.Info) bool {
		n := i.NetNs()
		return n != nil && uint64(n.NetnsInode) == inode
	}
	err = l.attach("ingress", "steer", ours, func(p *ebpf.Program) (link.Link, error) {
		return link.AttachNetNs(int(ns.Fd()), p)
	})
	if err != nil {
		return fmt.Errorf("attaching sk_lookup: %w", err)
	}
	return nil
}

// AttachPod puts the pod programs on the node's end of a pod's veth.
func (l *Loader) AttachPod(ifindex int) error {
	return l.attachDevice("pod", ifindex, "from_pod", "to_pod")
}

// AttachHost puts the host programs on one of the node's devices.
func (l *Loader) AttachHost(ifindex int) error {
	return l.attachDevice("host", ifindex, "from_outside", "to_outside")
}

// DetachPod undoes AttachPod, also after the device has gone.
func (l *Loader) DetachPod(ifindex int) error { return l.detachDevice("pod", ifindex) }

// DetachHost undoes AttachHost, also after the device has gone.
func (l *Loader) DetachHost(ifindex int) error {
	return errors.Join(l.detachDevice("host", ifindex), l.DetachXDP(ifindex))
}

// Pods lists the devices that have pod programs, or had when they existed.
func (l *Loader) Pods() ([]int, error) { return l.devices("pod") }

// Hosts lists the devices that have host programs, or had when they existed.
func (l *Loader) Hosts() ([]int, error) { return l.devices("host") }

func (l *Loader) devices(kind string) ([]int, error) {
	entries, err := os.ReadDir(l.cfg.links())
	if err != nil {
		return nil, err
	}
	var out []int
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), kind+"_")
		if !ok {
			continue
		}
		if index, err := strconv.Atoi(strings.TrimSuffix(rest, "_in")); err == nil {
			out = append(out, index)
		}
	}
	return out, nil
}

func deviceLinks(kind string, ifindex int) (in, out string) {
	name := kind + "_" + strconv.Itoa(ifindex)
	return name + "_in", name + "_out"
}

func (l *Loader) attachDevice(kind string, ifindex int, ingress, egress string) error {
	in, out := deviceLinks(kind, ifindex)
	ours := func(i *link.Info) bool {
		t := i.TCX()
		return t != nil && int(t.Ifindex) == ifindex
	}
	tcx := func(dir ebpf.AttachType) func(*ebpf.Program) (link.Link, error) {
		return func(p *ebpf.Program) (link.Link, error) {
			return link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: p, Attach: dir})
		}
	}
	err := l.attach(in, ingress, ours, tcx(ebpf.AttachTCXIngress))
	if err == nil {
		err = l.attach(out, egress, ours, tcx(ebpf.AttachTCXEgress))
	}
	if errors.Is(err, ebpf.ErrNotSupported) {
		err = errors.Join(
			l.attachClsact(ifindex, ingress, netlink.HANDLE_MIN_INGRESS),
			l.attachClsact(ifindex, egress, netlink.HANDLE_MIN_EGRESS))
	}
	if err != nil {
		return fmt.Errorf("attaching %s programs to device %d: %w", kind, ifindex, err)
	}
	return nil
}

func (l *Loader) detachDevice(kind string, ifindex int) error {
	in, out := deviceLinks(kind, ifindex)
	return errors.Join(l.detach(in), l.detach(out), detachClsact(ifindex))
}

// Before Linux 6.6 there is no tcx. Filters of the clsact qdisc belong to the device and live without
// a pin; replacing one under the same handle and priority is atomic as well.
const (
	clsactPriority = 0x5be
	clsactHandle   = 0x5be
	clsactPrefix   = "skep_"
)

func (l *Loader) attachClsact(ifindex int, program string, parent uint32) error {
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("clsact: %w", err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: parent, Handle: clsactHandle, Priority: clsactPriority, Protocol: unix.ETH_P_ALL,
		},
		Fd: l.programs[program].FD(), Name: clsactPrefix + program, DirectAction: true,
	}
	if err := netlink.FilterReplace(filter); err != nil {
		return fmt.Errorf("clsact filter %s: %w", program, err)
	}
	return nil
}

func detachClsact(ifindex int) error {
	device, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		var gone netlink.LinkNotFoundError
		if errors.As(err, &gone) {
			return nil
		}
		return err
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		filters, err := netlink.FilterList(device, parent)
		if err != nil {
			return nil // no such qdisc
		}
		for _, f := range filters {
			b, ok := f.(*netlink.BpfFilter)
			if ok && strings.HasPrefix(b.Name, clsactPrefix) {
				if err := netlink.FilterDel(f); err != nil {
					return fmt.Errorf("clsact filter %s: %w", b.Name, err)
				}
			}
		}
	}
	return nil
}
