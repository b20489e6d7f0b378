// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// XDPMode is where NodePorts with backends elsewhere are served before the stack sees their packets.
type XDPMode string

// Modes.
const (
	XDPOff     XDPMode = "off"
	XDPNative  XDPMode = "native"  // by the driver, or it is an error
	XDPGeneric XDPMode = "generic" // by the kernel, for any device
	XDPAuto    XDPMode = "auto"    // by the driver where it can, else by the kernel
)

// ParseXDPMode reads a flag; empty is XDPOff.
func ParseXDPMode(s string) (XDPMode, error) {
	switch m := XDPMode(s); m {
	case "":
		return XDPOff, nil
	case XDPOff, XDPNative, XDPGeneric, XDPAuto:
		return m, nil
	}
	return "", fmt.Errorf("%q is none of %s, %s, %s and %s", s, XDPAuto, XDPNative, XDPGeneric, XDPOff)
}

// tries says which modes to try for a device, in this order. A veth sends from XDP only to an end that has a program
// itself, and drops the rest without a word: nobody is told of that, so it is never chosen unasked. It is pure.
func (m XDPMode) tries(kind string) []XDPMode {
	switch {
	case m == XDPNative || m == XDPGeneric:
		return []XDPMode{m}
	case m == XDPAuto && kind == "veth":
		return []XDPMode{XDPGeneric}
	case m == XDPAuto:
		return []XDPMode{XDPNative, XDPGeneric}
	}
	return nil
}

func xdpPrefix(m XDPMode) string { return "xdp-" + string(m) + "_" }

// AttachXDP puts the program for the driver on one of the node's devices, as the mode says, and says which was taken.
// Off takes off what an earlier process put there. With an error the device is as with off.
func (l *Loader) AttachXDP(ifindex int) (XDPMode, error) {
	device, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return XDPOff, fmt.Errorf("device %d: %w", ifindex, err)
	}
	took := XDPOff
	var failed error
	for _, m := range l.cfg.XDP.tries(device.Type()) {
		err := l.attachXDP(ifindex, m)
		if err == nil {
			took, failed = m, nil
			break
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", m, err)) // drivers have many errors for what they cannot
	}
	for _, other := range []XDPMode{XDPNative, XDPGeneric} {
		if other != took {
			failed = errors.Join(failed, l.detachMode(ifindex, other))
		}
	}
	if took != XDPOff {
		failed = errors.Join(failed, l.senders.Put(uint32(ifindex), uint32(1)))
	}
	if failed != nil {
		return took, fmt.Errorf("XDP (%s) on device %s: %w; --xdp=off serves NodePorts without it", l.cfg.XDP, device.Attrs().Name, failed)
	}
	return took, nil
}

func (l *Loader) attachXDP(ifindex int, m XDPMode) error {
	// A device has one mode at a time: the other's program goes first.
	other, flags := XDPGeneric, link.XDPDriverMode
	if m == XDPGeneric {
		other, flags = XDPNative, link.XDPGenericMode
	}
	if err := l.detachMode(ifindex, other); err != nil {
		return err
	}
	ours := func(i *link.Info) bool {
		x := i.XDP()
		return x != nil && int(x.Ifindex) == ifindex
	}
	return l.attach(xdpPrefix(m)+strconv.Itoa(ifindex), "at_driver", ours, func(p *ebpf.Program) (link.Link, error) {
		return link.AttachXDP(link.XDPOptions{Program: p, Interface: ifindex, Flags: flags})
	})
}

// detachMode takes the program off at once: a link that only loses its pin goes some time later, and the device has no
// place for another until then.
func (l *Loader) detachMode(ifindex int, m XDPMode) error {
	name := xdpPrefix(m) + strconv.Itoa(ifindex)
	old, err := link.LoadPinnedLink(filepath.Join(l.cfg.links(), name), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		_ = old.Detach() // it has none if its device has gone
		err = old.Close()
	}
	return errors.Join(err, l.detach(name))
}

// DetachXDP undoes AttachXDP, also after the device has gone.
func (l *Loader) DetachXDP(ifindex int) error {
	var err error
	if l.senders != nil {
		if err = l.senders.Delete(uint32(ifindex)); errors.Is(err, ebpf.ErrKeyNotExist) {
			err = nil
		}
	}
	for _, m := range []XDPMode{XDPNative, XDPGeneric} {
		err = errors.Join(err, l.detachMode(ifindex, m))
	}
	return err
}

// XDPDevices says which devices have the program, by what is pinned under dir.
func XDPDevices(dir string) (map[int]XDPMode, error) {
	entries, err := os.ReadDir(filepath.Join(dir, "links"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := map[int]XDPMode{}
	for _, e := range entries {
		for _, m := range []XDPMode{XDPNative, XDPGeneric} {
			if rest, ok := strings.CutPrefix(e.Name(), xdpPrefix(m)); ok {
				if index, err := strconv.Atoi(rest); err == nil {
					out[index] = m
				}
			}
		}
	}
	return out, nil
}
