// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
)

// keptConnection is one from a client outside, which stays open while agents come and go.
type keptConnection struct {
	t       *testing.T
	to      netip.AddrPort
	in      io.Writer
	answers *bufio.Reader
}

func (n *testNode) keep(t *testing.T, to netip.AddrPort) keptConnection {
	t.Helper()
	k := keptConnection{t: t, to: to}
	err := n.asStranger(n.outside, "kept "+to.String(), func(cmd *exec.Cmd) error {
		in, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return err
		}
		t.Cleanup(func() {
			in.Close() // which ends it
			if err := cmd.Wait(); err != nil {
				t.Errorf("client of %s: %v", to, err)
			}
		})
		k.in, k.answers = in, bufio.NewReader(out)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if hello, err := k.answers.ReadString('\n'); err != nil {
		t.Fatalf("connection to %s: %q, %v", to, hello, err)
	}
	return k
}

// keptOpen copies lines to a server and what it answers to the output, until the input ends.
func keptOpen(to netip.AddrPort) (string, error) {
	c, err := net.DialTimeout("tcp", to.String(), 5*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	answers, lines := bufio.NewReader(c), bufio.NewScanner(os.Stdin)
	for {
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		answer, err := answers.ReadString('\n')
		if err != nil {
			return "", err
		}
		fmt.Print(answer)
		if !lines.Scan() {
			return "", lines.Err()
		}
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := fmt.Fprintln(c, lines.Text()); err != nil {
			return "", err
		}
	}
}

// says sends a line and waits for its echo.
func (k keptConnection) says(message string) {
	k.t.Helper()
	_, err := fmt.Fprintln(k.in, message)
	answer := ""
	if err == nil {
		answer, err = k.answers.ReadString('\n')
	}
	if err != nil || answer != message+"\n" {
		k.t.Errorf("kept connection to %s answers %q with %q, %v", k.to, message, answer, err)
	}
}

// olderLayout gives the directory of pins the name that a version before this had, and the maps there that are named what
// change makes of them. No agent may run; the programs go on with what they have.
func (n *testNode) olderLayout(change map[string]func(*ebpf.Map) *ebpf.Map) (dir string) {
	n.t.Helper()
	dirs, err := filepath.Glob(filepath.Join(n.cfg.BPFDir, "maps-*"))
	if err != nil || len(dirs) != 1 {
		n.t.Fatalf("directories of maps: %v, %v", dirs, err)
	}
	dir = filepath.Join(n.cfg.BPFDir, "maps-0badf00d")
	if err := os.Rename(dirs[0], dir); err != nil {
		n.t.Fatal(err)
	}
	for name, convert := range change {
		pin := filepath.Join(dir, name)
		m, err := ebpf.LoadPinnedMap(pin, nil)
		if err != nil {
			n.t.Fatal(err)
		}
		other := convert(m)
		if err := os.Remove(pin); err != nil {
			n.t.Fatal(err)
		}
		if err := other.Pin(pin); err != nil {
			n.t.Fatal(err)
		}
		m.Close()
		other.Close()
	}
	return dir
}

// resized is an empty map like m, whose values have so many bytes; with entries they are cut.
func resized(t *testing.T, m *ebpf.Map, value uint32, entries bool) *ebpf.Map {
	t.Helper()
	out, err := ebpf.NewMap(&ebpf.MapSpec{Type: m.Type(), KeySize: m.KeySize(), ValueSize: value, MaxEntries: m.MaxEntries(), Flags: m.Flags()})
	if err != nil {
		t.Fatal(err)
	}
	var k, v []byte
	it := m.Iterate()
	for entries && it.Next(&k, &v) {
		if err := out.Put(k, v[:value]); err != nil {
			t.Fatal(err)
		}
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	return out
}

func (n *testNode) mapID(name string) ebpf.MapID {
	n.t.Helper()
	pins, err := filepath.Glob(filepath.Join(n.cfg.BPFDir, "maps-*", name))
	if err != nil || len(pins) != 1 {
		n.t.Fatalf("pins of %s: %v, %v", name, pins, err)
	}
	m, err := ebpf.LoadPinnedMap(pins[0], nil)
	if err != nil {
		n.t.Fatal(err)
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		n.t.Fatal(err)
	}
	id, _ := info.ID()
	return id
}

// outsideGets waits until a client outside is answered by a server.
func (n *testNode) outsideGets(to netip.AddrPort, name string) {
	n.t.Helper()
	eventually(n.t, to.String(), func() error {
		got, _, err := n.askAs(n.outside, "tcp", to)
		if err == nil && got != name {
			err = fmt.Errorf("%s answers", got)
		}
		return err
	})
}

// TestOlderLayout: the flows of a version that did not yet note which policies had judged them (its values were 72 bytes)
// are taken over, so translated connections go on; what looks the same stays the same map; and nothing old is left.
func TestOlderLayout(t *testing.T) {
	n := newNode(t)
	pod := n.pod("server")
	serve(t, pod.ns, "server", 8080)
	web := n.service("web", nil, pod)
	n.outsideGets(web.at(nodeV4), "server")
	open := []keptConnection{n.keep(t, web.at(nodeV4)), n.keep(t, web.at(nodeV6))}
	for range 2 { // and once more when the older directory has another's remains beside it
		n.stop()
		services := n.mapID("services")
		old := n.olderLayout(map[string]func(*ebpf.Map) *ebpf.Map{
			"conntrack_tcp": func(m *ebpf.Map) *ebpf.Map { return resized(t, m, 72, true) },
		})
		if err := os.Mkdir(filepath.Join(n.cfg.BPFDir, "maps-new-unfinished"), 0o700); err != nil {
			t.Fatal(err)
		}
		n.start()
		for i, c := range open {
			c.says(fmt.Sprint("still there, ", i))
		}
		if now := n.mapID("services"); now != services {
			t.Errorf("services are in map %d, were in %d", now, services)
		}
		for _, left := range []string{old, filepath.Join(n.cfg.BPFDir, "maps-new-unfinished")} {
			if _, err := os.Stat(left); !os.IsNotExist(err) {
				t.Errorf("%s: %v", left, err)
			}
		}
		n.outsideGets(web.at(nodeV6), "server")
	}
}

// TestOtherRoom: another --conntrack-max is another layout, and no reason to forget anybody.
func TestOtherRoom(t *testing.T) {
	n := newNodeOf(t, func(c *Config) { c.ConntrackMax = 4096 })
	pod := n.pod("server")
	serve(t, pod.ns, "server", 8080)
	web := n.service("web", nil, pod)
	n.outsideGets(web.at(nodeV4), "server")
	c := n.keep(t, web.at(nodeV4))
	for _, room := range []uint32{8192, 2048} {
		n.stop()
		n.cfg.ConntrackMax = room
		n.start()
		c.says(fmt.Sprint(room))
		if got := n.dp.maps.Capacity()["conntrack_tcp"]; got != room {
			t.Errorf("room for %d flows, want %d", got, room)
		}
	}
}

// TestUnknownLayout: services of a layout that nobody knows are written anew, and until they are the older programs serve:
// no connection fails, none that is open ends, and the programs are replaced in the end.
func TestUnknownLayout(t *testing.T) {
	n := newNode(t)
	client, server := n.pod("client"), n.pod("server")
	serve(t, server.ns, "server", 8080)
	web := n.service("web", nil, server)
	n.answers(client.ns, "tcp", web.v4, "server")
	n.outsideGets(web.at(nodeV4), "server")
	c := n.keep(t, web.at(nodeV4))
	l := startLoad(client.ns, web.v4)
	n.stop()
	services := n.mapID("services")
	n.olderLayout(map[string]func(*ebpf.Map) *ebpf.Map{
		"services": func(m *ebpf.Map) *ebpf.Map { return resized(t, m, m.ValueSize()+8, false) },
	})
	n.start()
	made := l.made.Load()
	eventually(t, "load", func() error {
		if l.made.Load() < made+20 {
			return fmt.Errorf("%d connections", l.made.Load()-made)
		}
		return nil
	})
	l.stop()
	for err := range l.fails {
		t.Error(err)
	}
	c.says("still there")
	if now := n.mapID("services"); now == services {
		t.Error("services are in the map that nobody understands")
	}
	if n.dp.loader.Holds() {
		t.Error("programs of the older version still run")
	}
	// What changes now is in the new map, which the programs read.
	other := n.pod("other")
	serve(t, other.ns, "other", 8080)
	n.endpoints("web", other)
	n.answers(client.ns, "tcp", web.v4, "other")
}
