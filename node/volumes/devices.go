// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Device is a block device of the host that a container sees.
type Device struct {
	HostPath      string
	ContainerPath string
	ReadOnly      bool
}

// deviceDir is the directory of a pod's links to block devices, as kubelet calls it.
const deviceDir = "volumeDevices"

// deviceLink leads to the block device of a pod's claim.
func (v *Volumes) deviceLink(uid types.UID, vol *corev1.Volume) string {
	return filepath.Join(v.podDir(uid), deviceDir, kind(vol), vol.Name)
}

// ContainerDevices says what block devices a container sees for its volumeDevices.
func (v *Volumes) ContainerDevices(pod *corev1.Pod, c *corev1.Container) ([]Device, error) {
	var out []Device
	for i := range c.VolumeDevices {
		d := &c.VolumeDevices[i]
		vol := Of(pod, d.Name)
		if vol == nil {
			return nil, fmt.Errorf("container %s uses volume %q, which pod %s/%s does not have", c.Name, d.Name, pod.Namespace, pod.Name)
		}
		path, err := os.Readlink(v.deviceLink(pod.UID, vol))
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("volume %q of pod %s/%s is not a block device", d.Name, pod.Namespace, pod.Name)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, Device{HostPath: path, ContainerPath: containerPath(d.DevicePath), ReadOnly: readOnly(vol)})
	}
	return out, nil
}
