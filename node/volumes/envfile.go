// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	kubeenv "k8s.io/kubernetes/pkg/kubelet/util/env"
)

// maxEnvFile bounds a file of variables: as much as a ConfigMap holds.
const maxEnvFile = 1 << 20

// EnvFile reads the variable key of a file that containers of the pod have written to one of its volumes (KEP-3721). One
// that the file does not have is empty. The error is fs.ErrNotExist where there is no such file.
func (v *Volumes) EnvFile(pod *corev1.Pod, volume, path, key string) (string, error) {
	vol := Of(pod, volume)
	if vol == nil || vol.EmptyDir == nil {
		return "", fmt.Errorf("pod %s/%s has no volume %q of type emptyDir", pod.Namespace, pod.Name, volume)
	}
	data, err := readBeneath(v.path(pod.UID, vol), path, maxEnvFile)
	if err != nil {
		return "", fmt.Errorf("file %q of volume %q: %w", path, volume, err)
	}
	// Parsed as it was read: containers may be writing to it still.
	fd, err := unix.MemfdCreate("env", unix.MFD_CLOEXEC)
	if err != nil {
		return "", fmt.Errorf("file %q of volume %q: %w", path, volume, err)
	}
	copied := os.NewFile(uintptr(fd), "env")
	defer copied.Close()
	if _, err := copied.Write(data); err != nil {
		return "", fmt.Errorf("file %q of volume %q: %w", path, volume, err)
	}
	value, err := kubeenv.ParseEnv("/proc/self/fd/"+strconv.Itoa(fd), key)
	if err != nil {
		return "", fmt.Errorf("couldn't parse env file %q of volume %q: %w", path, volume, err)
	}
	return value, nil
}

// readBeneath reads a regular file that containers may replace meanwhile by a link that leads elsewhere, or by a pipe
// that nobody writes to.
func readBeneath(root, path string, most int64) ([]byte, error) {
	path = strings.TrimLeft(path, "/")
	if !filepath.IsLocal(path) {
		return nil, errors.New("it must stay within the volume")
	}
	dir, err := unix.Open(root, unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("open volume %s: %w", root, err)
	}
	defer func() { _ = unix.Close(dir) }()
	fd, err := openat2(dir, path, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Mode()&fs.ModeType != 0 {
		return nil, errors.New("it is not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("it has more than %d bytes", most)
	}
	return data, err
}
