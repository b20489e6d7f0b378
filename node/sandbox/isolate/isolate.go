// SPDX-License-Identifier: Apache-2.0

// Package isolate runs a package's tests in network, mount and UTS namespaces of their own, so that
// tests with a real kernel neither see nor touch the host and whatever they leave dies with them.
package isolate

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const marker = "SKEP_TEST_ISOLATED"

// Run is TestMain's body: it executes the test binary anew in new namespaces, or runs the tests if
// this is that process. It returns the exit status.
func Run(m *testing.M) int {
	if os.Getenv(marker) == "" {
		return again()
	}
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "isolate:", err)
		return 2
	}
	return m.Run()
}

func again() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS,
		Pdeathsig:    syscall.SIGKILL,
	}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	fmt.Fprintln(os.Stderr, "isolate: the tests need root:", err)
	return 2
}

func prepare() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for _, key := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
		if err := os.WriteFile(key, []byte("1"), 0); err != nil {
			return err
		}
	}
	return nil
}
