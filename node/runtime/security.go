// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/pkg/cap"
	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/opencontainers/runtime-spec/specs-go"
	corev1 "k8s.io/api/core/v1"
)

// defaultCapabilities is the set that every container runtime agrees on.
func defaultCapabilities() []string {
	return []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
		"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE"}
}

// capabilities adds and drops; ALL may stand in both lists, and then what is named explicitly decides.
// A process that is not root starts without effective ones, and may get those of the bounding set by exec.
func capabilities(sec *corev1.SecurityContext, privileged, root bool) *specs.LinuxCapabilities {
	set := defaultCapabilities()
	if privileged {
		set = known()
	} else if sec.Capabilities != nil {
		var add, drop []string
		for _, c := range sec.Capabilities.Add {
			add = append(add, capName(string(c)))
		}
		for _, c := range sec.Capabilities.Drop {
			drop = append(drop, capName(string(c)))
		}
		if slices.Contains(add, "CAP_ALL") {
			set = known()
		}
		if slices.Contains(drop, "CAP_ALL") {
			set = nil
		}
		for _, c := range add {
			if c != "CAP_ALL" && !slices.Contains(set, c) {
				set = append(set, c)
			}
		}
		set = slices.DeleteFunc(set, func(c string) bool { return slices.Contains(drop, c) })
	}
	c := &specs.LinuxCapabilities{Bounding: set}
	if root {
		c.Effective, c.Permitted = set, set
	}
	return c
}

// known are the capabilities that this process could pass on; runc warns about others.
func known() []string {
	if all, err := cap.Current(); err == nil && len(all) > 0 {
		return all
	}
	return cap.Known()
}

func capName(c string) string {
	c = strings.ToUpper(c)
	if !strings.HasPrefix(c, "CAP_") {
		c = "CAP_" + c
	}
	return c
}

// resolveUser decides uid, gid and groups as kubelet and CRI do: numbers in the security contexts
// win over the image's user.
func resolveUser(sec *corev1.SecurityContext, pod *corev1.PodSecurityContext, image string, db userDB) (specs.User, error) {
	if pod == nil {
		pod = &corev1.PodSecurityContext{}
	}
	first := func(a, b *int64) *int64 {
		if a != nil {
			return a
		}
		return b
	}
	uid, gid := first(sec.RunAsUser, pod.RunAsUser), first(sec.RunAsGroup, pod.RunAsGroup)
	who := image
	if uid != nil {
		who = fmt.Sprint(*uid)
	}
	if who == "" {
		who = "0"
	}
	u, groups, err := db.lookup(who)
	if err != nil {
		return specs.User{}, fmt.Errorf("%w: %w", ErrStart, err)
	}
	if gid != nil {
		u.GID = uint32(*gid)
	}
	extra := []uint32{u.GID}
	strict := pod.SupplementalGroupsPolicy != nil && *pod.SupplementalGroupsPolicy == corev1.SupplementalGroupsPolicyStrict
	if !strict {
		extra = append(extra, groups...)
	}
	for _, g := range pod.SupplementalGroups {
		extra = append(extra, uint32(g))
	}
	if pod.FSGroup != nil {
		extra = append(extra, uint32(*pod.FSGroup))
	}
	for _, g := range extra {
		if !slices.Contains(u.AdditionalGids, g) {
			u.AdditionalGids = append(u.AdditionalGids, g)
		}
	}
	return u, nil
}

func seccompOf(sec *corev1.SecurityContext, pod *corev1.PodSecurityContext) *corev1.SeccompProfile {
	if sec.SeccompProfile != nil {
		return sec.SeccompProfile
	}
	if pod != nil {
		return pod.SeccompProfile
	}
	return nil
}

// seccompProfile loads what a profile names. None means unconfined, as it does for kubelet.
func (r *Runtime) seccompProfile(spec *specs.Spec, p *corev1.SeccompProfile) (*specs.LinuxSeccomp, error) {
	if p == nil {
		return nil, nil
	}
	switch p.Type {
	case corev1.SeccompProfileTypeRuntimeDefault:
		return seccomp.DefaultProfile(spec), nil
	case corev1.SeccompProfileTypeLocalhost:
		if p.LocalhostProfile == nil || r.cfg.SeccompDir == "" {
			return nil, errors.New("seccomp profile of type Localhost without a name, or this node has no profiles")
		}
		path, err := securejoin.SecureJoin(r.cfg.SeccompDir, *p.LocalhostProfile)
		if err != nil {
			return nil, err
		}
		data, err := os.ReadFile(filepath.Clean(path))
		if err != nil {
			return nil, fmt.Errorf("seccomp profile: %w", err)
		}
		profile := &specs.LinuxSeccomp{}
		if err := json.Unmarshal(data, profile); err != nil {
			return nil, fmt.Errorf("seccomp profile %s: %w", path, err)
		}
		return profile, nil
	}
	return nil, nil
}
