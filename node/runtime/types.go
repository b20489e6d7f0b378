// SPDX-License-Identifier: Apache-2.0

// Package runtime runs containers with containerd, whose server it embeds unless it is given the
// address of the host's.
package runtime

import (
	"context"
	"io"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/node/sandbox"
)

// Mount is one bind mount into a container.
type Mount struct {
	HostPath      string
	ContainerPath string
	ReadOnly      bool
	// Recursive makes what is mounted below read-only too (mount_setattr(2), Linux 5.12).
	Recursive   bool
	Propagation corev1.MountPropagationMode
	Volume      string // of the pod that it is of; empty for the node's own files
	Image       bool   // the volume is an image
}

// Device is a block device of the host that a container may use.
type Device struct {
	HostPath      string
	ContainerPath string
	ReadOnly      bool
}

// ContainerSpec is everything that makes one container: variables are expanded, volumes exist.
type ContainerSpec struct {
	PodUID       types.UID
	PodNamespace string
	PodName      string
	Name         string
	Attempt      int      // restart count of this container
	ImageID      string   // what Images returned, not what the pod spec says
	Image        string   // what the pod spec says, for status
	Command      []string // nil: the image's entrypoint
	Args         []string // nil: the image's command, unless Command is set
	WorkingDir   string
	Env          []string // KEY=VALUE, in order; overrides the image's
	Mounts       []Mount
	Devices      []Device
	Sandbox      *sandbox.Sandbox
	HostPID      bool
	TargetPID    uint32 // share the PID namespace of this process; 0 for an own one
	Hostname     string
	CgroupParent string // the pod's cgroup, relative to each hierarchy's root
	Resources    corev1.ResourceRequirements
	OOMScoreAdj  int
	Security     *corev1.SecurityContext    // the container's
	PodSecurity  *corev1.PodSecurityContext // the pod's
	TTY          bool
	Stdin        bool
	StdinOnce    bool
	Sysctls      map[string]string // of a pod with user ids of its own; others get them with their sandbox
	LogPath      string            // CRI log file
	Annotations  map[string]string // stored with the container and given back by List
	// lockedFlags are options that each of Mounts has on the host; see lockedFlags. Nil: none.
	lockedFlags [][]string
	// Ready is waited for between the creation of the container's process and its start: for what it must not run
	// without, but can be made without. Nil: nothing.
	Ready func(ctx context.Context) error
}

// PauseName is the name of the container that holds the PID namespace which the containers of a pod share. A container
// of a pod spec cannot have it: those names are of small letters. It has no image, logs or environment, and only waits.
const PauseName = "POD"

// State of a container's process.
type State string

// States, as containerd's task has them; Created has no task yet.
const (
	Created State = "created"
	Running State = "running"
	Exited  State = "exited"
)

// Container is what the runtime knows; it survives a restart of the agent.
type Container struct {
	ID           string // containerd's id; shown to users as containerd://ID
	PodUID       types.UID
	PodNamespace string
	PodName      string
	Name         string
	Attempt      int
	Image        string
	ImageID      string // repository@digest
	State        State
	PID          uint32
	ExitCode     int32
	Signal       int32
	OOMKilled    bool
	Reason       string // OOMKilled, StartError, ContainerStatusUnknown; empty for an ordinary end
	Message      string // goes with Reason
	CreatedAt    time.Time
	StartedAt    time.Time
	FinishedAt   time.Time
	LogPath      string
	Annotations  map[string]string
	Cgroup       string // relative to each hierarchy's root
	// Resources are what it was made with, or was resized to since; nil where an earlier agent did not note them.
	Resources *corev1.ResourceRequirements
	User      *User // who its first process began as; nil where an earlier agent did not note it
}

// User is a process's identity.
type User struct {
	UID, GID int64
	Groups   []int64 // supplemental ones
}

// Image is one image on this node.
type Image struct {
	ID     string   // digest of the config, the id to create containers with
	Tags   []string // references that name it
	Digest string   // repository@digest as status shows it
	Size   int64    // bytes
	User   string   // the config's user: for runAsNonRoot
	Pinned bool     // it came from an archive on this host: no registry would give it back
}

// Auth are credentials for one pull; the zero value is anonymous.
type Auth struct {
	Username, Password, IdentityToken string
}

// Containers is what the pod workers need of the runtime.
type Containers interface {
	Create(ctx context.Context, spec ContainerSpec) (id string, err error)
	// Start runs the container's process once its Ready lets it. Errors: ErrNotReady, ErrStart.
	Start(ctx context.Context, id string) error
	// Stop sends the stop signal, waits for grace, then kills. It returns when the process is gone.
	Stop(ctx context.Context, id string, grace time.Duration) error
	Remove(ctx context.Context, id string) error
	// Update has a running container use other amounts of processor and memory from now on. Errors: cgroup.ErrInUse, ErrNotRunning.
	Update(ctx context.Context, id string, resources corev1.ResourceRequirements) error
	// List reports every container of every pod, running or not.
	List(ctx context.Context) ([]Container, error)
	// ListPod is List for one pod.
	ListPod(ctx context.Context, pod types.UID) ([]Container, error)
	// Exits delivers the pod of each container whose process ended or started; it never blocks the runtime.
	Exits() <-chan types.UID
	ExecSync(ctx context.Context, id string, command []string, timeout time.Duration) (stdout, stderr []byte, exitCode int, err error)
}

// Images is what the pod workers need of the image store. Errors: ErrImageNotFound, ErrPull.
type Images interface {
	Get(ctx context.Context, ref string) (Image, error)
	Pull(ctx context.Context, ref string, auths []Auth) (Image, error)
	List(ctx context.Context) ([]Image, error)
	// Remove removes an image with all its names. Containers that were made of it keep their layers.
	Remove(ctx context.Context, id string) error
	// Mount mounts an image's files read-only at dir, as a volume of a pod. Errors: ErrImageNotFound.
	Mount(ctx context.Context, imageID string, pod types.UID, volume, dir string) error
	// Release gives up what Mount has kept for the volumes of a pod, once they are unmounted.
	Release(ctx context.Context, pod types.UID) error
	// ImportDir imports image archives (OCI or docker tar) that lie in dir.
	ImportDir(ctx context.Context, dir string) ([]Image, error)
}

// Streams carries a session of exec or attach.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
	TTY      bool
	Resize   <-chan Size
}

// Size of a terminal in characters.
type Size struct{ Width, Height uint16 }

// Sessions is what the node API needs of the runtime.
type Sessions interface {
	Exec(ctx context.Context, id string, command []string, s Streams) (exitCode int, err error)
	Attach(ctx context.Context, id string, s Streams) error
	// PortForward joins stream to port on the pod's loopback.
	PortForward(ctx context.Context, pod types.UID, port uint16, stream io.ReadWriteCloser) error
}
