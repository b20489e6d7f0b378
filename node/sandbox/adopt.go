// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/dataplane"
	"skep.io/skep/node/sandbox/cgroup"
)

// adopt compares records with the kernel, once: a sandbox that is whole is kept as it is, one that
// is not is removed, and so is what belongs to no record.
func (s *Sandboxes) adopt(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.adopted {
		return nil
	}
	good, bad, err := s.readRecords()
	if err != nil {
		return fmt.Errorf("sandbox records: %w", err)
	}
	links, err := podLinks()
	if err != nil {
		return err
	}
	for _, r := range good {
		s.records[r.Sandbox.PodUID] = r
	}
	var broken []*record
	keep := map[types.UID]bool{}
	var endpoints []dataplane.Endpoint
	for _, r := range good {
		if why := s.flaw(r, links); why != "" {
			s.cfg.Log.Warn("sandbox is not whole and is removed", "namespace", r.Sandbox.Namespace, "pod", r.Sandbox.Name, "reason", why)
			r.Complete = false
			broken = append(broken, r)
			continue
		}
		keep[r.Sandbox.PodUID] = true
		delete(links, r.HostLink)
		if r.HostLink != "" {
			r.Sandbox.Endpoint.NetNS = r.Sandbox.NetNS // records of an earlier version lack it
			endpoints = append(endpoints, r.Sandbox.Endpoint)
		}
	}
	for _, uid := range bad {
		broken = append(broken, &record{Sandbox: Sandbox{PodUID: uid}, HostLink: hostLinkName(uid)})
	}
	s.mu.Unlock()
	err = s.clear(ctx, broken, keep, links)
	if err == nil && s.cfg.Network != nil {
		err = s.cfg.Network.PruneEndpoints(ctx, endpoints)
	}
	s.mu.Lock()
	if err != nil {
		return fmt.Errorf("adopt sandboxes: %w", err)
	}
	s.adopted = true
	return nil
}

// clear removes broken sandboxes, namespaces without a record and links without a record.
func (s *Sandboxes) clear(ctx context.Context, broken []*record, keep map[types.UID]bool, links map[string]int) error {
	for _, r := range broken {
		if err := s.remove(ctx, r); err != nil {
			return err
		}
	}
	for name := range links {
		if err := unplug(name); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(filepath.Join(s.cfg.RunDir, "ns"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if !keep[types.UID(e.Name())] {
			if err := unpin(filepath.Join(s.cfg.RunDir, "ns", e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// flaw says what is missing of a recorded sandbox; empty when it is whole.
func (s *Sandboxes) flaw(r *record, links map[string]int) string {
	if !r.Complete {
		return "its creation was interrupted"
	}
	for _, pin := range []string{r.Sandbox.NetNS, r.Sandbox.IPCNS, r.Sandbox.UTSNS, r.Sandbox.UserNS} {
		if pin != "" && !pinned(pin) {
			return "namespace " + pin + " is gone"
		}
	}
	if r.HostLink == "" {
		return ""
	}
	index, ok := links[r.HostLink]
	if !ok {
		return "link " + r.HostLink + " is gone"
	}
	if index != r.Sandbox.Endpoint.Ifindex {
		return "link " + r.HostLink + " is another one"
	}
	return ""
}

// podLinks finds the links that hostLinkName made, by name and type.
func podLinks() (map[string]int, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	links := map[string]int{}
	for _, l := range all {
		if l.Type() == "veth" && isPodLink(l.Attrs().Name) {
			links[l.Attrs().Name] = l.Attrs().Index
		}
	}
	return links, nil
}

func isPodLink(name string) bool {
	rest, ok := strings.CutPrefix(name, linkPrefix)
	return ok && len(rest) == 8 && strings.Trim(rest, "0123456789abcdef") == ""
}

// The cursor file keeps each range's last address, so that a restart does not begin anew with
// addresses that were released a moment ago.
func (s *Sandboxes) cursorPath() string { return filepath.Join(s.cfg.RunDir, "addresses.json") }

func (s *Sandboxes) readCursor() map[string]netip.Addr {
	last := map[string]netip.Addr{}
	if data, err := os.ReadFile(s.cursorPath()); err == nil {
		// An unreadable cursor costs nothing but the order of addresses.
		_ = json.Unmarshal(data, &last)
	}
	return last
}

func (s *Sandboxes) writeCursor() {
	last := s.readCursor()
	for prefix, p := range s.pools {
		if p.last.IsValid() {
			last[prefix.String()] = p.last
		}
	}
	data, err := json.Marshal(last)
	if err != nil {
		return
	}
	if err := writeAtomic(s.cursorPath(), data); err != nil {
		s.cfg.Log.Warn("address cursor is not written", "path", s.cursorPath(), "error", err)
	}
}

// Cleanup removes every sandbox's namespaces, links, cgroups and records, without a running skep.
// cgroupRoot is the parent of all pod cgroups ("kubepods"); empty leaves cgroups alone.
func Cleanup(ctx context.Context, runDir, cgroupRoot string) error {
	var errs []error
	links, err := podLinks()
	errs = append(errs, err)
	for name := range links {
		errs = append(errs, unplug(name))
	}
	ns := filepath.Join(runDir, "ns")
	entries, err := os.ReadDir(ns)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range entries {
		errs = append(errs, unpin(filepath.Join(ns, e.Name())))
	}
	if cgroupRoot != "" {
		errs = append(errs, cgroup.Remove(ctx, cgroupRoot))
	}
	errs = append(errs, os.RemoveAll(ns),
		os.RemoveAll(filepath.Join(runDir, "sandboxes")), os.RemoveAll(filepath.Join(runDir, "addresses.json")))
	return errors.Join(errs...)
}
