// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestNextIDs(t *testing.T) {
	const length = 65536
	for _, c := range []struct {
		name  string
		last  uint32
		taken []uint32
		want  uint32
	}{
		{"the first of all", 0, nil, length},
		{"in turn", length, nil, 2 * length},
		{"not one that is taken", length, []uint32{2 * length}, 3 * length},
		{"from the beginning again", 3 * length, []uint32{length}, 2 * length},
		{"of an agent that allowed more pods", 30 * length, nil, length},
		{"none is left", length, []uint32{length, 2 * length, 3 * length}, 0},
	} {
		taken := map[uint32]bool{}
		for _, f := range c.taken {
			taken[f] = true
		}
		got, ok := nextIDs(c.last, 3, taken)
		if ok != (c.want != 0) || ok && got != c.want {
			t.Errorf("%s: %d, %v, want %d", c.name, got, ok, c.want)
		}
	}
}

// Two pods with user ids of their own have different ones, which survive the agent; their network is theirs.
func TestOwnUsers(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	s := open(t, dir, &fakeNetwork{})
	s.cfg.Pods = 2
	own := func(name string) Spec {
		sp := spec(name)
		sp.OwnUsers, sp.Sysctls = true, map[string]string{"kernel.shm_rmid_forced": "1"}
		return sp
	}
	var pods []*Sandbox
	for i, name := range []string{"a", "b"} {
		p, err := s.Create(ctx, own(name))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Attached(ctx, p.PodUID); err != nil {
			t.Fatal(err)
		}
		if want := uint32(i+1) * 65536; p.FirstID != want {
			t.Errorf("pod %s has ids from %d on, want %d", name, p.FirstID, want)
		}
		for _, pin := range []string{p.NetNS, p.IPCNS, p.UTSNS} {
			if got, want := ownerOf(t, pin), inode(t, p.UserNS); got != want {
				t.Errorf("%s belongs to user namespace %d, want %d", pin, got, want)
			}
		}
		if st, err := os.Stat(p.ShmPath); err != nil || st.Sys().(*syscall.Stat_t).Uid != p.FirstID {
			t.Errorf("shared memory: %v, %v", st, err)
		}
		err = inNamespace(p.UTSNS, unix.CLONE_NEWUTS, func() error {
			if h, err := os.Hostname(); err != nil || h != name {
				return fmt.Errorf("hostname %q, %w", h, err)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		pods = append(pods, p)
	}
	for _, a := range pods[1].Addrs {
		echo(t, pods[0], pods[1], a)
	}
	if _, err := s.Create(ctx, own("c")); !errors.Is(err, ErrNoIDs) {
		t.Errorf("third pod of two: %v", err)
	}
	bad := own("d")
	bad.HostNetwork = true
	if _, err := s.Create(ctx, bad); err == nil {
		t.Error("a pod has user ids of its own and the host's network")
	}
	plain, err := s.Create(ctx, spec("e"))
	if err != nil || plain.UserNS != "" || plain.FirstID != 0 {
		t.Fatalf("pod of the host's users: %+v, %v", plain, err)
	}
	if err := s.Attached(ctx, plain.PodUID); err != nil {
		t.Fatal(err)
	}

	// An agent that starts anew keeps what is whole, and removes what is not.
	s = open(t, dir, &fakeNetwork{})
	list, err := s.List(ctx)
	if err != nil || len(list) != 3 || list[0].FirstID != 65536 || list[0].UserNS != pods[0].UserNS {
		t.Fatalf("adopted %v, %v", list, err)
	}
	p, err := s.Create(ctx, own("c"))
	if err != nil || p.FirstID != 3*65536 {
		t.Fatalf("after adoption: %+v, %v", p, err)
	}
	if err := s.Attached(ctx, p.PodUID); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(pods[0].UserNS, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, &fakeNetwork{})
	if list, err = s.List(ctx); err != nil || len(list) != 3 || list[0].Name != "b" {
		t.Fatalf("after a user namespace went: %v, %v", list, err)
	}
	for _, name := range []string{"b", "c", "e"} {
		if err := s.Remove(ctx, spec(name).PodUID); err != nil {
			t.Error(err)
		}
	}
	checkClean(t, dir)
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Ino
}

// ownerOf is the user namespace that a pinned namespace belongs to (ioctl_ns(2)).
func ownerOf(t *testing.T, pin string) uint64 {
	t.Helper()
	ns, err := os.Open(pin)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	fd, err := unix.IoctlRetInt(int(ns.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	return inode(t, fmt.Sprintf("/proc/self/fd/%d", fd))
}
