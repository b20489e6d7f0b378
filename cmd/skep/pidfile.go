// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"skep.io/skep/api"
)

// pidFile tells `skep reset` and `make run` which process serves this host.
const pidFile = api.RunDir + "/server.pid"

// claimHost makes this process the one server of this host: two could share neither /run/skep nor
// the pinned programs, whatever their data directories are. release gives the host back.
func claimHost() (release func(), err error) {
	if err := os.MkdirAll(api.RunDir, 0o755); err != nil {
		return nil, fmt.Errorf("%s: %w", api.RunDir, err)
	}
	f, err := os.OpenFile(pidFile, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("claim this host: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("skep server already runs on this host as process %s: stop it first", readPID(pidFile))
		}
		return nil, fmt.Errorf("lock %s: %w", pidFile, err)
	}
	if err := f.Truncate(0); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", pidFile, err), f.Close())
	}
	if _, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", pidFile, err), f.Close())
	}
	return func() {
		_ = os.Remove(pidFile) // while still locked, so that nobody else's file is removed
		_ = f.Close()
	}, nil
}

// runningServer returns the process that holds the host, 0 if there is none. A file that a killed
// server left is not locked.
func runningServer() (int, error) {
	f, err := os.Open(pidFile)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if err == nil {
		return 0, nil
	}
	if !errors.Is(err, unix.EWOULDBLOCK) {
		return 0, fmt.Errorf("lock %s: %w", pidFile, err)
	}
	pid, err := strconv.Atoi(readPID(pidFile))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("%s is held, but names no process", pidFile)
	}
	if exe, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe"); err != nil || !strings.HasPrefix(filepath.Base(exe), "skep") {
		return 0, fmt.Errorf("%s is held, but process %d (%s) is not skep: stop it by hand", pidFile, pid, exe)
	}
	return pid, nil
}

func readPID(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "?"
	}
	return strings.TrimSpace(string(b))
}

// stopProcess asks a process to end and waits until it has.
func stopProcess(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop process %d: %w", pid, err)
	}
	for {
		const limit = 60_000 // milliseconds
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, limit)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("wait for process %d: %w", pid, err)
		}
		if n == 0 {
			return fmt.Errorf("process %d did not stop within a minute: look at its log, or kill -9 it and try again", pid)
		}
		return nil
	}
}

// isNotEmptyOrBusy tells a directory that is kept for somebody else's sake: it has other files, or
// is a mount point.
func isNotEmptyOrBusy(err error) bool {
	return errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY)
}
