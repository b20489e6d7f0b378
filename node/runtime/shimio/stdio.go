// SPDX-License-Identifier: Apache-2.0

package shimio

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
)

// scheme marks a stdout that this package handles.
const scheme = "skep-log"

// Stdio says what the shim does with a container's standard streams. It travels in the stdout
// field of containerd's create request.
type Stdio struct {
	LogPath   string // CRI log file; empty: output goes to those who are attached only
	MaxSize   int64  // bytes after which the log file is rotated; 0: never
	MaxFiles  int    // log files kept, the current one included
	Socket    string // unix socket for attach; empty: none
	ExitPath  string // file that says how the process ended; see Exit. Empty: none
	Cgroup    string // the container's, for Exit
	Stdin     bool   // keep a stdin open
	StdinOnce bool   // close stdin when the first who attached closes his
}

// URI encodes s.
func (s Stdio) URI() string {
	q := url.Values{}
	q.Set("size", strconv.FormatInt(s.MaxSize, 10))
	q.Set("files", strconv.Itoa(s.MaxFiles))
	q.Set("socket", s.Socket)
	q.Set("exit", s.ExitPath)
	q.Set("cgroup", s.Cgroup)
	q.Set("stdin", strconv.FormatBool(s.Stdin))
	q.Set("once", strconv.FormatBool(s.StdinOnce))
	return (&url.URL{Scheme: scheme, Path: s.LogPath, RawQuery: q.Encode()}).String()
}

// Parse decodes what URI made; ok is false for the stdout of somebody else.
func Parse(stdout string) (s Stdio, ok bool, err error) {
	if !strings.HasPrefix(stdout, scheme+":") {
		return Stdio{}, false, nil
	}
	u, err := url.Parse(stdout)
	if err != nil {
		return Stdio{}, false, fmt.Errorf("stdout URI: %w", err)
	}
	q := u.Query()
	s.LogPath, s.Socket, s.ExitPath, s.Cgroup = u.Path, q.Get("socket"), q.Get("exit"), q.Get("cgroup")
	if s.MaxSize, err = strconv.ParseInt(q.Get("size"), 10, 64); err != nil {
		return Stdio{}, false, fmt.Errorf("stdout URI: size: %w", err)
	}
	if s.MaxFiles, err = strconv.Atoi(q.Get("files")); err != nil {
		return Stdio{}, false, fmt.Errorf("stdout URI: files: %w", err)
	}
	s.Stdin = q.Get("stdin") == "true"
	s.StdinOnce = q.Get("once") == "true"
	return s, true, nil
}
