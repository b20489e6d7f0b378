// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/typeurl/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Labels of a container in containerd, for people who look there.
const (
	labelPodUID    = "skep.io/pod-uid"
	labelNamespace = "skep.io/pod-namespace"
	labelPod       = "skep.io/pod-name"
	labelContainer = "skep.io/container"
	labelAttempt   = "skep.io/attempt"
)

// extensionKey is where a container's definition is kept in containerd, as JSON.
const extensionKey = "skep.io/container"

// definition is what a container was created as; it never changes.
type definition struct {
	PodUID       types.UID
	PodNamespace string
	PodName      string
	Name         string
	Attempt      int
	Image        string
	ImageID      string // repository@digest
	CreatedAt    time.Time
	LogPath      string
	Annotations  map[string]string
	TTY          bool
	Stdin        bool
	StdinOnce    bool
	StopSignal   string
	Cgroup       string
	NetNS        string
	UserNS       string // empty unless the pod has user ids of its own
	FirstID      uint32 // of the host, which user 0 is then
	User         *User
	Resources    *corev1.ResourceRequirements // that it was made with
}

// GetTypeUrl and GetValue make a definition something that containerd stores.
type stored []byte

func (stored) GetTypeUrl() string { return "skep.io/container.v1" }
func (s stored) GetValue() []byte { return s }

var _ typeurl.Any = stored(nil)

func (d definition) encode() (stored, error) {
	data, err := json.Marshal(d)
	return stored(data), err
}

// status is what changes; it is a file, replaced at each change, because an exited container has no
// other trace of how it ended.
type status struct {
	State      State
	PID        uint32
	ExitCode   int32
	OOMKilled  bool
	Reason     string
	Message    string
	StartedAt  time.Time
	FinishedAt time.Time
	Resources  *corev1.ResourceRequirements // that it was given since; nil: those of its definition
}

// container is one in memory. op serialises what changes it; mu guards the fields for readers.
type container struct {
	id   string
	def  definition
	op   sync.Mutex
	done chan struct{} // closed once the process has ended and status says how

	ready    func(context.Context) error // of ContainerSpec
	mapped   []mappedMount               // what is to be mounted while the task is created
	taskLeft bool                        // containerd would not delete its task; guarded by op

	mu     sync.Mutex
	status status
	oom    bool // the kernel killed a process of it for want of memory
}

func (c *container) state() status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.status
}

func (c *container) set(s status) {
	c.mu.Lock()
	c.status = s
	c.mu.Unlock()
}

func (c *container) public() Container {
	s := c.state()
	return Container{
		ID: c.id, PodUID: c.def.PodUID, PodNamespace: c.def.PodNamespace, PodName: c.def.PodName, Name: c.def.Name,
		Attempt: c.def.Attempt, Image: c.def.Image, ImageID: c.def.ImageID, State: s.State, PID: s.PID, ExitCode: s.ExitCode,
		OOMKilled: s.OOMKilled, Reason: s.Reason, Message: s.Message, CreatedAt: c.def.CreatedAt, StartedAt: s.StartedAt,
		FinishedAt: s.FinishedAt, LogPath: c.def.LogPath, Annotations: maps.Clone(c.def.Annotations), Cgroup: c.def.Cgroup, User: c.def.User,
		Resources: cmp.Or(s.Resources, c.def.Resources),
	}
}

func (r *Runtime) statusDir() string { return filepath.Join(r.cfg.DataDir, "containers") }

func (r *Runtime) statusPath(id string) string { return filepath.Join(r.statusDir(), id+".json") }

// exitPath is the file in which the shim says how the container ended.
func (r *Runtime) exitPath(id string) string { return filepath.Join(r.statusDir(), id+".exit") }

// save publishes and writes a status.
func (r *Runtime) save(c *container, s status) {
	c.set(s)
	data, err := json.Marshal(s)
	if err == nil {
		tmp := r.statusPath(c.id) + ".tmp"
		if err = os.WriteFile(tmp, data, 0o600); err == nil {
			err = os.Rename(tmp, r.statusPath(c.id))
		}
	}
	if err != nil {
		// The state in memory is right; only an exit code may be lost with a restart.
		r.log.Error("container status is not written", "container", c.def.Name, "pod", c.def.PodName, "namespace", c.def.PodNamespace, "error", err)
	}
}

func (r *Runtime) loadStatus(id string) (status, error) {
	data, err := os.ReadFile(r.statusPath(id))
	if err != nil {
		return status{}, err
	}
	var s status
	if err := json.Unmarshal(data, &s); err != nil {
		return status{}, fmt.Errorf("status of container %s: %w", id, err)
	}
	return s, nil
}

func (r *Runtime) removeStatus(id string) error {
	for _, f := range []string{r.statusPath(id), r.exitPath(id)} {
		if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (r *Runtime) lookup(id string) *container {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.containers[id]
}

func (r *Runtime) find(id string) (*container, error) {
	if c := r.lookup(id); c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("%w: %s", ErrContainerNotFound, id)
}
