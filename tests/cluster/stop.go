// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"skep.io/skep/tests/leaks"
)

type leakList = leaks.State

// settleLimit bounds what the kernel does in its own time: freeing namespaces, emptying cgroups.
const settleLimit = 5 * time.Second

// stopLimit bounds an orderly end of a server, its pods included.
const stopLimit = 2 * time.Minute

// ErrLeak is in the error of Stop for each thing left over.
var ErrLeak = errors.New("left over")

// leaksMain prints what exists on the machine.
func leaksMain([]string) error {
	state, err := leaks.Take(context.Background(), leaks.NodeScope())
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(state)
}

func (n *Node) leaks(ctx context.Context) (leakList, error) {
	cmd := n.Tool(ctx, "leaks")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list what is on %s: %w: %s", n.Name, err, &stderr)
	}
	var state leakList
	if err := json.Unmarshal(out, &state); err != nil {
		return nil, fmt.Errorf("list what is on %s: %w", n.Name, err)
	}
	return state, nil
}

// Leaks lists what is on the machine that was not there before the first start, its processes included.
func (n *Node) Leaks(ctx context.Context) ([]string, error) {
	after, err := n.leaks(ctx)
	if err != nil {
		return nil, err
	}
	found := leaks.New(n.before, after)
	procs, err := processes(n.all, n.cgroup)
	if err != nil {
		return nil, err
	}
	for pid, command := range procs {
		if pid != n.Pid() && pid != n.server {
			found = append(found, fmt.Sprintf("process %d %s", pid, command))
		}
	}
	slices.Sort(found)
	return found, nil
}

// Snapshot is what is on a machine while its server runs.
type Snapshot struct {
	Descriptors int // open in the server
	things      leakList
}

// ownFiles are the server's stores, which grow as they like.
var ownFiles = []string{"/var/lib/skep/server", "/var/lib/skep/containerd", "/run/skep/containerd/io.containerd.grpc.v1.cri"}

// Snapshot lists what is on the machine now.
func (n *Node) Snapshot(ctx context.Context) (Snapshot, error) {
	things, err := n.leaks(ctx)
	if err != nil {
		return Snapshot{}, err
	}
	things = slices.DeleteFunc(things, func(line string) bool {
		return slices.ContainsFunc(ownFiles, func(path string) bool { return strings.Contains(line, "file "+path) })
	})
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", n.server))
	return Snapshot{Descriptors: len(open), things: things}, err
}

// Since lists what s has and an earlier snapshot has not.
func (s Snapshot) Since(before Snapshot) []string { return leaks.New(before.things, s.things) }

// Stop ends the server, resets the machine, looks for what is left, and removes everything. The
// error names each leak; everything is gone even then.
func (n *Node) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	var errs []error
	if n.server != 0 {
		errs = append(errs, n.Shutdown(ctx))
	}
	if n.Server == nil {
		errs = append(errs, n.Reset(ctx))
	}
	errs = append(errs, n.leakErrors(func() ([]string, error) { return n.Leaks(ctx) }))
	return errors.Join(append(errs, n.tearDown(ctx))...)
}

// Discard removes the node without the orderly end, for a failed test's sake. After Stop it does
// nothing.
func (n *Node) Discard(ctx context.Context) error { return n.tearDown(ctx) }

// leakErrors looks until nothing is left or the kernel had time enough.
func (n *Node) leakErrors(list func() ([]string, error)) error {
	deadline := time.Now().Add(settleLimit)
	for {
		found, err := list()
		if err != nil {
			return err
		}
		if len(found) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			var errs []error
			for _, leak := range found {
				errs = append(errs, fmt.Errorf("node %s: %w: %s", n.Name, ErrLeak, leak))
			}
			return errors.Join(errs...)
		}
		time.Sleep(10 * pollEvery)
	}
}

// tearDown removes the machine from the host and checks that nothing of it stays there.
func (n *Node) tearDown(context.Context) error {
	if n.gone {
		return nil
	}
	n.gone = true
	var namespaces []string
	for _, kind := range []string{"net", "mnt", "uts"} {
		id, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", n.Pid(), kind))
		if err == nil {
			namespaces = append(namespaces, id)
		}
	}
	n.killProcesses()
	n.stop()
	n.server = 0
	err := removeCgroups(n.all, n.cgroup, settleLimit)
	n.closeLAN()
	return errors.Join(err, n.leakErrors(func() ([]string, error) {
		found, err := leaks.ProcessesIn(namespaces...)
		if err != nil {
			return nil, err
		}
		below, err := leaks.MountsBelow(n.Dir)
		if err != nil {
			return nil, err
		}
		return append(found, below...), nil
	}))
}

// killProcesses ends everybody on the machine but init, who reaps them; whoever is left is removed
// with the cgroups.
func (n *Node) killProcesses() {
	for deadline := time.Now().Add(settleLimit); time.Now().Before(deadline); time.Sleep(pollEvery) {
		procs, err := processes(n.all, n.cgroup)
		if err != nil {
			return
		}
		delete(procs, n.Pid())
		if len(procs) == 0 {
			return
		}
		for pid := range procs {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

func (n *Node) closeLAN() {
	if n.ownLAN && n.LAN != nil {
		n.LAN.Close()
		n.LAN = nil
	}
}
