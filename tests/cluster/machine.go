// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	// pollEvery spaces the looks at a condition that nothing announces.
	pollEvery = 10 * time.Millisecond
	// startLimit bounds what takes milliseconds on an idle machine; tests share two cores.
	startLimit = 30 * time.Second
)

// Machine is a set of namespaces with a process that holds them open, reaps orphans and starts
// long-lived processes. A [Node] runs skep on one; the clients outside live on another.
type Machine struct {
	name    string
	cgroup  string
	all     []hierarchy
	cgroups []string

	init   *exec.Cmd
	stdin  io.WriteCloser
	ask    *json.Encoder
	exited *exits
	ended  chan struct{}
	events chan event
}

// newMachine makes the namespaces. With data empty it is a machine without cgroups of its own.
func newMachine(name string, s setup, withCgroups bool) (*Machine, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("machine %s: namespaces and cgroups need root", name)
	}
	if isHelper() { // running what it was to help with, and so on without end
		return nil, fmt.Errorf("machine %s: this program's main or TestMain must begin with cluster.Helper()", name)
	}
	m := &Machine{name: name, exited: newExits(), ended: make(chan struct{}), events: make(chan event)}
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	s.Hostname = name
	if withCgroups {
		m.cgroup, m.all, s.All = "skep-test-"+name, all, all
		if err := removeCgroups(all, m.cgroup, startLimit); err != nil {
			return nil, fmt.Errorf("remove what an earlier run left: %w", err)
		}
		if m.cgroups, err = makeCgroups(all, m.cgroup); err != nil {
			return nil, err
		}
		s.Cgroups = m.cgroups
	}
	raw, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	argv := self("join", string(raw))
	m.init = &exec.Cmd{Path: argv[0], Args: argv, Stderr: os.Stderr, Env: os.Environ()}
	if m.stdin, err = m.init.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := m.init.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := m.init.Start(); err != nil {
		return nil, fmt.Errorf("machine %s: start init: %w", name, err)
	}
	m.ask = json.NewEncoder(m.stdin)
	go func() {
		defer close(m.ended)
		in := json.NewDecoder(stdout)
		for {
			var e event
			if err := in.Decode(&e); err != nil {
				return
			}
			if e.Exited != 0 {
				m.exited.add(e.Exited, e.Status)
				continue
			}
			m.events <- e
		}
	}()
	if _, err := m.answer(); err != nil {
		m.stop()
		return nil, fmt.Errorf("machine %s: %w", name, err)
	}
	return m, nil
}

// answer is init's next word on what it was asked.
func (m *Machine) answer() (event, error) {
	select {
	case e := <-m.events:
		if e.Error != "" {
			return e, fmt.Errorf("init: %s", e.Error)
		}
		return e, nil
	case <-m.ended:
		return event{}, fmt.Errorf("init ended")
	case <-time.After(startLimit):
		return event{}, fmt.Errorf("init did not answer within %s", startLimit)
	}
}

// spawn starts a process as a child of the machine's init.
func (m *Machine) spawn(r request) (int, error) {
	if err := m.ask.Encode(r); err != nil {
		return 0, fmt.Errorf("ask init: %w", err)
	}
	e, err := m.answer()
	return e.Started, err
}

// stop ends init, which ends the namespaces once nobody else is in them.
func (m *Machine) stop() {
	_ = m.stdin.Close()
	_ = m.init.Process.Kill()
	<-m.ended
	_ = m.init.Wait()
}

// Pid of the machine's init: the way to its namespaces and, below /proc/PID/root, its files.
func (m *Machine) Pid() int { return m.init.Process.Pid }

// Path is where the machine's file can be read from outside.
func (m *Machine) Path(path string) string { return fmt.Sprintf("/proc/%d/root%s", m.Pid(), path) }

// Command prepares a command that runs on the machine, in its namespaces and cgroups. The command is
// looked up on the machine, with the environment's PATH.
func (m *Machine) Command(ctx context.Context, argv ...string) *exec.Cmd {
	return CommandIn(ctx, m.Place(), argv...)
}

// Tool prepares one of this package's helpers on the machine.
func (m *Machine) Tool(ctx context.Context, role string, args ...string) *exec.Cmd {
	return m.Command(ctx, self(role, args...)...)
}

// Dial connects from the machine's network. It is not in the machine's cgroup: socket programs
// attached there do not see it.
func (m *Machine) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		conn, err := m.dialInside(ctx, network, address)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

// dialInside is on a goroutine of its own. Its thread goes back to its namespace; a thread that
// cannot is not given back to the scheduler, and ends with the goroutine.
func (m *Machine) dialInside(ctx context.Context, network, address string) (net.Conn, error) {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		return nil, err
	}
	defer home.Close()
	ns, err := netns.GetFromPid(m.Pid())
	if err != nil {
		runtime.UnlockOSThread()
		return nil, err
	}
	defer ns.Close()
	if err := netns.Set(ns); err != nil {
		runtime.UnlockOSThread()
		return nil, err
	}
	// One address is dialled on the calling goroutine; several would be on others, outside.
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, address)
	if back := netns.Set(home); back == nil {
		runtime.UnlockOSThread()
	}
	return conn, err
}

// links gives access to the machine's network devices; the caller closes it.
func (m *Machine) links() (*netlink.Handle, netns.NsHandle, error) {
	ns, err := netns.GetFromPid(m.Pid())
	if err != nil {
		return nil, ns, fmt.Errorf("open network of %s: %w", m.name, err)
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		ns.Close()
		return nil, ns, fmt.Errorf("open network of %s: %w", m.name, err)
	}
	return h, ns, nil
}
