// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// diskMain makes a block device of a new file, and a link to it. The kernel takes the device away with the last who has it
// open, which is this process until its standard input ends: however a test ends, no device is left.
func diskMain(args []string) error {
	if len(args) != 3 {
		return errors.New("disk: a file, its size in bytes and a link are needed")
	}
	size, err := strconv.ParseInt(args[1], 10, 64)
	if err != nil {
		return fmt.Errorf("disk: size: %w", err)
	}
	file, err := os.OpenFile(args[0], os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := file.Truncate(size); err != nil {
		return err
	}
	device, err := loop(file)
	if err != nil {
		return fmt.Errorf("loop device: %w", err)
	}
	defer device.Close()
	if err := os.Remove(args[2]); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Symlink(device.Name(), args[2]); err != nil {
		return err
	}
	fmt.Println(device.Name())
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// loop finds a free loop device, which another process may take at the same time, and puts the file behind it.
func loop(file *os.File) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, err
		}
		device, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", number), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(device.Fd()), &unix.LoopConfig{Fd: uint32(file.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}})
		if err == nil {
			return device, nil
		}
		device.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
	}
}
