// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// gcPercent trades a little processor time for memory: most of the heap are caches of objects that
// hardly change, so collections are rare and the head-room of the default would stay unused. While nothing happens
// even less is enough: then the runtime collects every two minutes in any case.
const (
	gcPercent      = 50
	quietGCPercent = 25
)

// collectAt lets the heap grow by percent between collections, unless the environment says by how much.
func collectAt(percent int) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(percent)
	}
}

// giveBackMemory returns what only past work needed, starting above all: the garbage of first lists and of OpenAPI, and
// the pages of the binary that hold initialisation code and tables.
func giveBackMemory(log *slog.Logger) {
	debug.FreeOSMemory()
	if err := dropBinaryPages(); err != nil {
		log.Debug("the binary's pages stay resident", "error", err)
	}
}

// dropBinaryPages unmaps the read-only pages of the executable. They stay in the page cache, and
// the next use of one maps it again: after a start that is a third of them (madvise(2),
// MADV_DONTNEED on a private file mapping). Where the page cache holds the binary in huge pages, as it does for one just
// written, a use would map 2 MiB, hence MADV_NOHUGEPAGE (Linux 6.12 heeds it for files). A binary that the dynamic linker
// relocates, as with cgo, is left alone: its read-only pages were written to before they became read-only (RELRO).
func dropBinaryPages() error {
	if relocated, err := isRelocated("/proc/self/exe"); err != nil || relocated {
		return err
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return err
	}
	defer f.Close()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	ranges, err := readOnlyMappings(f, exe)
	if err != nil {
		return err
	}
	for _, r := range ranges {
		// EINVAL: a kernel without huge pages.
		if err := r.advise(unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
			return err
		}
		if err := r.advise(unix.MADV_DONTNEED); err != nil {
			return err
		}
	}
	return nil
}

func isRelocated(binary string) (bool, error) {
	f, err := elf.Open(binary)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool {
		return p.Type == elf.PT_DYNAMIC || p.Type == elf.PT_GNU_RELRO
	}), nil
}

type addressRange struct{ start, end uintptr }

func (r addressRange) advise(advice uintptr) error {
	if _, _, errno := unix.Syscall(unix.SYS_MADVISE, r.start, r.end-r.start, advice); errno != 0 {
		return fmt.Errorf("madvise %d: %w", advice, errno)
	}
	return nil
}

// readOnlyMappings finds, in the format of /proc/PID/maps, the mappings of file that cannot have
// been written to: dropping one that was would lose data.
func readOnlyMappings(maps io.Reader, file string) ([]addressRange, error) {
	var ranges []addressRange
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || strings.Join(fields[5:], " ") != file || strings.Contains(fields[1], "w") || !strings.HasSuffix(fields[1], "p") {
			continue
		}
		from, to, _ := strings.Cut(fields[0], "-")
		start, err := strconv.ParseUint(from, 16, 64)
		if err != nil {
			return nil, fmt.Errorf("line %q: %w", lines.Text(), err)
		}
		end, err := strconv.ParseUint(to, 16, 64)
		if err != nil || end <= start {
			return nil, fmt.Errorf("line %q: not a range", lines.Text())
		}
		ranges = append(ranges, addressRange{uintptr(start), uintptr(end)})
	}
	return ranges, lines.Err()
}
