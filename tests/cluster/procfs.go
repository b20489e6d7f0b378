// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bytes"
	"strconv"
	"time"
)

// field reads the number that follows a name at the beginning of a line.
func field(raw []byte, name string) int64 {
	for line := range bytes.Lines(raw) {
		rest, found := bytes.CutPrefix(line, []byte(name))
		if !found {
			continue
		}
		words := bytes.Fields(rest)
		if len(words) == 0 {
			return 0
		}
		n, _ := strconv.ParseInt(string(words[0]), 10, 64) // not a number: 0, as for a missing line
		return n
	}
	return 0
}

// clockTicks a second, in /proc/PID/stat: 100 on every architecture that Go runs on.
const clockTicks = 100

// cpuTime reads user and system time, fields 14 and 15 of /proc/PID/stat (proc(5)). The name in
// field 2 may hold spaces and parentheses, so counting begins behind its end.
func cpuTime(stat []byte) time.Duration {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return 0
	}
	words := bytes.Fields(stat[end+1:])
	if len(words) < 13 {
		return 0
	}
	user, _ := strconv.ParseInt(string(words[11]), 10, 64)
	system, _ := strconv.ParseInt(string(words[12]), 10, 64)
	return time.Duration(user+system) * time.Second / clockTicks
}
