// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// record is one sandbox on disk. It is written before anything is made in the kernel, so that
// whatever exists has a record that says how to take it away.
type record struct {
	Sandbox      Sandbox
	HostLink     string // the veth's end in the node's namespace; empty with HostNetwork
	HostNetwork  bool
	CgroupParent string
	Created      time.Time
	Complete     bool // everything was made and attached

	attached  chan struct{} // closed when the attachment is done or has failed; nil if an earlier process did it
	attachErr error         // valid then
}

// endpoint of a record, with the parts that JSON keeps as text.
type diskRecord struct {
	record
	PodMAC, HostMAC string
}

func (s *Sandboxes) recordDir() string { return filepath.Join(s.cfg.RunDir, "sandboxes") }

func (s *Sandboxes) recordPath(uid types.UID) string {
	return filepath.Join(s.recordDir(), string(uid)+".json")
}

func (s *Sandboxes) writeRecord(r *record) error {
	d := diskRecord{record: *r, PodMAC: r.Sandbox.Endpoint.PodMAC.String(), HostMAC: r.Sandbox.Endpoint.HostMAC.String()}
	d.Sandbox.Endpoint.PodMAC, d.Sandbox.Endpoint.HostMAC = nil, nil
	data, err := json.Marshal(d)
	if err != nil {
		return err
	}
	return writeAtomic(s.recordPath(r.Sandbox.PodUID), data)
}

// writeAtomic replaces path. The directory is on /run: it need not survive a power cut, so nothing is synced.
func writeAtomic(path string, data []byte) error {
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func readRecord(path string) (*record, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var d diskRecord
	if err := json.Unmarshal(data, &d); err != nil {
		return nil, fmt.Errorf("sandbox record %s: %w", path, err)
	}
	e := &d.Sandbox.Endpoint
	if d.PodMAC != "" {
		if e.PodMAC, err = net.ParseMAC(d.PodMAC); err != nil {
			return nil, fmt.Errorf("sandbox record %s: %w", path, err)
		}
	}
	if d.HostMAC != "" {
		if e.HostMAC, err = net.ParseMAC(d.HostMAC); err != nil {
			return nil, fmt.Errorf("sandbox record %s: %w", path, err)
		}
	}
	return &d.record, nil
}

// readRecords reads all; a record that cannot be read is reported by its uid, for removal.
func (s *Sandboxes) readRecords() (good []*record, bad []types.UID, err error) {
	entries, err := os.ReadDir(s.recordDir())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	for _, e := range entries {
		uid, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			if strings.HasSuffix(e.Name(), ".tmp") {
				os.Remove(filepath.Join(s.recordDir(), e.Name()))
			}
			continue
		}
		r, err := readRecord(filepath.Join(s.recordDir(), e.Name()))
		if err != nil || string(r.Sandbox.PodUID) != uid {
			s.cfg.Log.Warn("sandbox record is unreadable and its sandbox will be removed", "pod", uid, "error", err)
			bad = append(bad, types.UID(uid))
			continue
		}
		good = append(good, r)
	}
	return good, bad, nil
}
