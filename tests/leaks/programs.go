// SPDX-License-Identifier: Apache-2.0

package leaks

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// cgroupAttachments are the hooks that skep uses on the cgroup2 root.
var cgroupAttachments = map[string]ebpf.AttachType{
	"connect4":     ebpf.AttachCGroupInet4Connect,
	"connect6":     ebpf.AttachCGroupInet6Connect,
	"sendmsg4":     ebpf.AttachCGroupUDP4Sendmsg,
	"sendmsg6":     ebpf.AttachCGroupUDP6Sendmsg,
	"recvmsg4":     ebpf.AttachCGroupUDP4Recvmsg,
	"recvmsg6":     ebpf.AttachCGroupUDP6Recvmsg,
	"getpeername4": ebpf.AttachCgroupInet4GetPeername,
	"getpeername6": ebpf.AttachCgroupInet6GetPeername,
	"post_bind4":   ebpf.AttachCGroupInet4PostBind,
	"post_bind6":   ebpf.AttachCGroupInet6PostBind,
	"sock_create":  ebpf.AttachCGroupInetSockCreate,
	"sock_release": ebpf.AttachCgroupInetSockRelease,
	"sock_ops":     ebpf.AttachCGroupSockOps,
}

// attachedPrograms asks the kernel hook by hook. Going through all loaded programs would show those
// of other machines too: their ids are not per namespace.
func attachedPrograms() ([]string, error) {
	var lines []string
	add := func(where string, options link.QueryOptions) error {
		result, err := link.QueryPrograms(options)
		if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL) {
			return nil // this kernel has no such hook, so nothing is there
		}
		if err != nil {
			return fmt.Errorf("query %s: %w", where, err)
		}
		for _, p := range result.Programs {
			name := fmt.Sprintf("id %d", p.ID)
			if prog, err := ebpf.NewProgramFromID(p.ID); err == nil {
				if info, err := prog.Info(); err == nil {
					name = info.Name
				}
				_ = prog.Close()
			}
			lines = append(lines, fmt.Sprintf("program %s at %s", name, where))
		}
		return nil
	}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		dir, err := os.Open(m.Mountpoint)
		if err != nil {
			return nil, err
		}
		defer dir.Close()
		for hook, attach := range cgroupAttachments {
			where := fmt.Sprintf("cgroup %s %s", m.Mountpoint, hook)
			if err := add(where, link.QueryOptions{Target: int(dir.Fd()), Attach: attach}); err != nil {
				return nil, err
			}
		}
	}
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if err := add("sk_lookup", link.QueryOptions{Target: int(ns.Fd()), Attach: ebpf.AttachSkLookup}); err != nil {
		return nil, err
	}
	devices, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	for _, device := range devices {
		for direction, attach := range map[string]ebpf.AttachType{"ingress": ebpf.AttachTCXIngress, "egress": ebpf.AttachTCXEgress} {
			where := fmt.Sprintf("tcx %s of %s", direction, device.Attrs().Name)
			if err := add(where, link.QueryOptions{Target: device.Attrs().Index, Attach: attach}); err != nil {
				return nil, err
			}
		}
	}
	return lines, nil
}
