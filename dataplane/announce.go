// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"skep.io/skep/dataplane/maps"
)

// announcedMaps is where the programs read what to answer for.
type announcedMaps interface {
	Announced() (map[maps.AnnouncedKey]maps.Announced, error)
	SetAnnounced(maps.AnnouncedKey, maps.Announced) error
	DeleteAnnounced(maps.AnnouncedKey) error
}

// announcer makes this node answer for load balancers' addresses on its devices, and tells the
// neighbours when it begins to. The answers themselves are the programs'.
type announcer struct {
	maps announcedMaps
	log  *slog.Logger
	// join makes a device receive what is asked about an IPv6 address, until leave is called.
	join func(index int, a netip.Addr) (leave func(), err error)
	// tell sends a frame on a device.
	tell func(index int, frame []byte) error

	mu       sync.Mutex
	services map[string][]netip.Addr
	devices  map[int]net.HardwareAddr
	settled  bool // whether all Services are known
	joined   map[maps.AnnouncedKey]func()
}

func newAnnouncer(m announcedMaps, log *slog.Logger) *announcer {
	return &announcer{
		maps: m, log: log, join: joinSolicited, tell: sendFrame,
		services: map[string][]netip.Addr{}, devices: map[int]net.HardwareAddr{}, joined: map[maps.AnnouncedKey]func(){},
	}
}

// Announce makes exactly these addresses a Service's that this node announces.
func (a *announcer) Announce(service string, addrs []netip.Addr) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if slices.Equal(a.services[service], addrs) {
		return nil
	}
	old := a.services[service]
	if len(addrs) == 0 {
		delete(a.services, service)
	} else {
		a.services[service] = slices.Clone(addrs)
	}
	if err := a.sync(); err != nil {
		a.services[service] = old // so that it is tried again
		return err
	}
	return nil
}

// Settle ends what an earlier process announced and nobody has claimed.
func (a *announcer) Settle() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.settled = true
	return a.sync()
}

// setDevices says where to announce.
func (a *announcer) setDevices(devices map[int]net.HardwareAddr) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.devices = devices
	return a.sync()
}

func (a *announcer) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for key, leave := range a.joined {
		leave()
		delete(a.joined, key)
	}
}

func (a *announcer) sync() error {
	have, err := a.maps.Announced()
	if err != nil {
		return err
	}
	want := map[maps.AnnouncedKey]maps.Announced{}
	for _, addrs := range a.services {
		for _, addr := range addrs {
			for index, mac := range a.devices {
				var v maps.Announced
				copy(v.MAC[:], mac)
				want[maps.AnnouncedKey{Addr: maps.AddressOf(addr), Ifindex: uint32(index)}] = v
			}
		}
	}
	var errs []error
	for key, v := range want {
		errs = append(errs, a.begin(key, v, have))
	}
	for key := range have {
		if _, ok := want[key]; ok || !a.settled {
			continue
		}
		if err := a.maps.DeleteAnnounced(key); err != nil {
			errs = append(errs, err)
			continue
		}
		if leave, ok := a.joined[key]; ok {
			leave()
			delete(a.joined, key)
		}
	}
	return errors.Join(errs...)
}

func (a *announcer) begin(key maps.AnnouncedKey, v maps.Announced, have map[maps.AnnouncedKey]maps.Announced) error {
	addr, index := key.Addr.Addr(), int(key.Ifindex)
	if _, ok := a.joined[key]; !ok && addr.Is6() {
		leave, err := a.join(index, addr)
		if err != nil {
			return fmt.Errorf("announcing %s on device %d: %w", addr, index, err)
		}
		a.joined[key] = leave
	}
	if have[key] == v {
		return nil
	}
	if err := a.maps.SetAnnounced(key, v); err != nil {
		return fmt.Errorf("announcing %s on device %d: %w", addr, index, err)
	}
	a.spread(key, v, retold)
	return nil
}

// retold are the pauses after which neighbours are told again, as one frame may be lost.
var retold = []time.Duration{time.Second, 3 * time.Second}

// spread tells the neighbours who has an address now, and again as long as it is so.
func (a *announcer) spread(key maps.AnnouncedKey, v maps.Announced, again []time.Duration) {
	if err := a.tell(int(key.Ifindex), unsolicited(key.Addr.Addr(), v.MAC)); err != nil {
		a.log.Warn("neighbours were not told of an address", "address", key.Addr.Addr(), "ifindex", key.Ifindex, "err", err)
	}
	if len(again) == 0 {
		return
	}
	time.AfterFunc(again[0], func() {
		if now, err := a.maps.Announced(); err == nil && now[key] == v {
			a.spread(key, v, again[1:])
		}
	})
}

// unsolicited is the frame that says who has an address without being asked: a gratuitous ARP request
// (RFC 5227), or an unsolicited neighbour advertisement that overrides (RFC 4861, 7.2.6).
func unsolicited(a netip.Addr, mac [6]byte) []byte {
	if a.Is4() {
		b := slices.Repeat([]byte{0xff}, 6)
		b = append(append(b, mac[:]...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
		b = append(append(b, mac[:]...), a.AsSlice()...)
		b = append(b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
		return append(b, a.AsSlice()...)
	}
	allNodes := netip.MustParseAddr("ff02::1").AsSlice()
	icmp := []byte{136, 0, 0, 0, 0x20, 0, 0, 0}
	icmp = append(append(icmp, a.AsSlice()...), 2, 1)
	icmp = append(icmp, mac[:]...)
	sum := uint32(58) + uint32(len(icmp))
	for _, part := range [][]byte{a.AsSlice(), allNodes, icmp} {
		for i := 0; i < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(icmp[2:], ^uint16(sum))
	b := []byte{0x33, 0x33, 0, 0, 0, 1}
	b = append(append(b, mac[:]...), 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(icmp)), 58, 255)
	b = append(append(b, a.AsSlice()...), allNodes...)
	return append(b, icmp...)
}

// sendFrame sends on a device what it is given, as it is.
func sendFrame(index int, frame []byte) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: index, Halen: 6})
}

// joinSolicited makes a device let through what is sent to the solicited-node group of an address
// (RFC 4291, 2.7.1).
func joinSolicited(index int, a netip.Addr) (func(), error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	b := a.As16()
	group := unix.PacketMreq{Ifindex: int32(index), Type: unix.PACKET_MR_MULTICAST, Alen: 6, Address: [8]byte{0x33, 0x33, 0xff, b[13], b[14], b[15]}}
	if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &group); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("solicited-node group of %s: %w", a, err)
	}
	return func() { unix.Close(fd) }, nil
}
