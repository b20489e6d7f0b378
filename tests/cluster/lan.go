// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"fmt"
	"net"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The LAN's ranges: RFC 5737's for documentation and a unique local one. They exist only inside
// namespaces, and nobody there has a default route.
var (
	lanPrefix4 = netip.MustParsePrefix("192.0.2.0/24")
	lanPrefix6 = netip.MustParsePrefix("fd00:736b:6570::/64")
)

// LAN joins nodes by a bridge that lies on a machine of its own. That machine is also the client
// outside the cluster: it has the first address and knows no route to pods or services.
type LAN struct {
	*Machine
	mu    sync.Mutex
	next  int
	ports map[*Machine]string // of the bridge
}

// NewLAN makes the network; name has to be unique on the machine.
func NewLAN(name string) (*LAN, error) {
	m, err := newMachine(name, setup{Hosts: "127.0.0.1 localhost\n"}, false)
	if err != nil {
		return nil, err
	}
	l := &LAN{Machine: m, next: 1, ports: map[*Machine]string{}}
	if err := l.bridge(); err != nil {
		m.stop()
		return nil, err
	}
	return l, nil
}

func (l *LAN) bridge() error {
	h, ns, err := l.links()
	if err != nil {
		return err
	}
	defer ns.Close()
	defer h.Close()
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "lan0"}}
	if err := h.LinkAdd(bridge); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	if err := addAddresses(h, bridge, l.address(1)); err != nil {
		return err
	}
	return up(h, "lo", "lan0")
}

// address is the n-th of each family, IPv4 first.
func (l *LAN) address(n int) []netip.Addr {
	a4, a6 := lanPrefix4.Addr().As4(), lanPrefix6.Addr().As16()
	a4[3], a6[15] = byte(n), byte(n)
	return []netip.Addr{netip.AddrFrom4(a4), netip.AddrFrom16(a6)}
}

// join gives the machine a device eth0 on the network, and returns its addresses.
func (l *LAN) join(m *Machine) ([]netip.Addr, error) {
	l.mu.Lock()
	l.next++
	n := l.next
	port := fmt.Sprintf("port%d", n)
	l.ports[m] = port
	l.mu.Unlock()
	here, hereNS, err := l.links()
	if err != nil {
		return nil, err
	}
	defer hereNS.Close()
	defer here.Close()
	there, thereNS, err := m.links()
	if err != nil {
		return nil, err
	}
	defer thereNS.Close()
	defer there.Close()
	bridge, err := here.LinkByName("lan0")
	if err != nil {
		return nil, fmt.Errorf("find bridge: %w", err)
	}
	veth := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: port, MasterIndex: bridge.Attrs().Index},
		PeerName:      "eth0",
		PeerNamespace: netlink.NsFd(int(thereNS)),
	}
	if err := here.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("add veth: %w", err)
	}
	if err := up(here, port); err != nil {
		return nil, err
	}
	eth0, err := there.LinkByName("eth0")
	if err != nil {
		return nil, fmt.Errorf("find eth0 of %s: %w", m.name, err)
	}
	addrs := l.address(n)
	if err := addAddresses(there, eth0, addrs); err != nil {
		return nil, err
	}
	return addrs, up(there, "lo", "eth0")
}

func addAddresses(h *netlink.Handle, link netlink.Link, addrs []netip.Addr) error {
	for _, addr := range addrs {
		bits := lanPrefix4.Bits()
		if addr.Is6() {
			bits = lanPrefix6.Bits()
		}
		a := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(bits, addr.BitLen())}}
		if addr.Is6() {
			a.Flags = unix.IFA_F_NODAD // nobody else is there to ask
		}
		if err := h.AddrAdd(link, a); err != nil {
			return fmt.Errorf("add %s to %s: %w", addr, link.Attrs().Name, err)
		}
	}
	return nil
}

func up(h *netlink.Handle, names ...string) error {
	for _, name := range names {
		link, err := h.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if err := h.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s up: %w", name, err)
		}
	}
	return nil
}

// Cut takes the node off its network, as a switch does whose port fails silently: the node's device stays up, and
// nothing arrives on either side. Heal puts it back.
func (n *Node) Cut() error { return n.LAN.wire(n.Machine, false) }

// Heal ends what Cut did.
func (n *Node) Heal() error { return n.LAN.wire(n.Machine, true) }

func (l *LAN) wire(m *Machine, connected bool) error {
	h, ns, err := l.links()
	if err != nil {
		return err
	}
	defer ns.Close()
	defer h.Close()
	l.mu.Lock()
	name := l.ports[m]
	l.mu.Unlock()
	port, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find the port of %s: %w", m.name, err)
	}
	if !connected {
		return h.LinkSetNoMaster(port)
	}
	bridge, err := h.LinkByName("lan0")
	if err != nil {
		return fmt.Errorf("find bridge: %w", err)
	}
	return h.LinkSetMaster(port, bridge)
}

// Close ends a machine that is no node; a network ends with the machine it lies on.
func (m *Machine) Close() { m.stop() }
