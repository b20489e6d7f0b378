// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// hostFiles are the files that every container of a pod sees, and where they are on the host:
//
//	DIR/UID/etc/{hosts,resolv.conf,hostname}
//	DIR/UID/containers/NAME/ATTEMPT       the termination message
//	LOGS/NAMESPACE_NAME_UID/NAME/ATTEMPT.log
type hostFiles struct {
	dir, logs string
}

func (h hostFiles) pod(uid types.UID) string { return filepath.Join(h.dir, string(uid)) }

func (h hostFiles) etc(uid types.UID, name string) string {
	return filepath.Join(h.pod(uid), "etc", name)
}

func (h hostFiles) termination(uid types.UID, container string, attempt int) string {
	return filepath.Join(h.pod(uid), "containers", container, strconv.Itoa(attempt))
}

func (h hostFiles) podLogs(pod *corev1.Pod) string {
	return filepath.Join(h.logs, pod.Namespace+"_"+pod.Name+"_"+string(pod.UID))
}

func (h hostFiles) log(pod *corev1.Pod, container string, attempt int) string {
	return filepath.Join(h.podLogs(pod), container, strconv.Itoa(attempt)+".log")
}

// present reports whether anything of the pod is left on disk.
func (h hostFiles) present(pod *corev1.Pod) bool {
	for _, p := range []string{h.pod(pod.UID), h.podLogs(pod)} {
		if _, err := os.Lstat(p); err == nil {
			return true
		}
	}
	return false
}

// remove deletes what the pod left, once nothing is mounted there any more.
func (h hostFiles) remove(pod *corev1.Pod) error {
	// The directory goes last: as long as it is there, an agent that starts anew finds the pod by it.
	if err := os.RemoveAll(h.podLogs(pod)); err != nil {
		return fmt.Errorf("logs of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return os.RemoveAll(h.pod(pod.UID))
}

// writeEtc writes what the containers of the pod share in /etc.
func (h hostFiles) writeEtc(pod *corev1.Pod, podIPs []string, hostname, domain string, resolv []byte) error {
	dir := filepath.Join(h.pod(pod.UID), "etc")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("directory of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	var hosts []byte
	if pod.Spec.HostNetwork {
		own, err := os.ReadFile("/etc/hosts")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("hosts file of pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		hosts = nodeHosts(own, pod.Spec.HostAliases)
	} else {
		hosts = podHosts(podIPs, hostname, domain, pod.Spec.HostAliases)
	}
	return errors.Join(
		writeInPlace(filepath.Join(dir, "hosts"), hosts),
		writeInPlace(filepath.Join(dir, "resolv.conf"), resolv),
		writeInPlace(filepath.Join(dir, "hostname"), []byte(hostname+"\n")),
	)
}

// writeInPlace keeps the inode: containers have the file bind-mounted, and may have changed it themselves, so what is
// there already and of the same content is left alone.
func writeInPlace(path string, content []byte) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, content) {
		return nil
	}
	return os.WriteFile(path, content, 0o644)
}

func podHosts(ips []string, hostname, domain string, aliases []corev1.HostAlias) []byte {
	var b bytes.Buffer
	b.WriteString("# Kubernetes-managed hosts file.\n")
	b.WriteString("127.0.0.1\tlocalhost\n")
	b.WriteString("::1\tlocalhost ip6-localhost ip6-loopback\n")
	b.WriteString("fe00::0\tip6-localnet\n")
	b.WriteString("fe00::0\tip6-mcastprefix\n")
	b.WriteString("fe00::1\tip6-allnodes\n")
	b.WriteString("fe00::2\tip6-allrouters\n")
	for _, ip := range ips {
		if domain != "" {
			fmt.Fprintf(&b, "%s\t%s.%s\t%s\n", ip, hostname, domain, hostname)
		} else {
			fmt.Fprintf(&b, "%s\t%s\n", ip, hostname)
		}
	}
	writeAliases(&b, aliases)
	return b.Bytes()
}

func nodeHosts(own []byte, aliases []corev1.HostAlias) []byte {
	var b bytes.Buffer
	b.WriteString("# Kubernetes-managed hosts file (host network).\n")
	b.Write(own)
	writeAliases(&b, aliases)
	return b.Bytes()
}

func writeAliases(b *bytes.Buffer, aliases []corev1.HostAlias) {
	if len(aliases) == 0 {
		return
	}
	b.WriteString("\n# Entries added by HostAliases.\n")
	for _, a := range aliases {
		fmt.Fprintf(b, "%s\t%s\n", a.IP, strings.Join(a.Hostnames, "\t"))
	}
}

// hostname is what the pod calls itself, and its domain when it has a subdomain.
func hostname(pod *corev1.Pod, clusterDomain string) (name, domain string) {
	name = pod.Name
	if pod.Spec.HostnameOverride != nil {
		return *pod.Spec.HostnameOverride, ""
	}
	if pod.Spec.Hostname != "" {
		name = pod.Spec.Hostname
	}
	// A host name has at most 63 characters and does not end in a hyphen or a dot.
	const longest = 63
	if len(name) > longest {
		name = strings.TrimRight(name[:longest], "-.")
	}
	if pod.Spec.Subdomain != "" {
		domain = pod.Spec.Subdomain + "." + pod.Namespace + ".svc." + clusterDomain
	}
	return name, domain
}

// What a termination message may hold (kubelet: MaxContainerTerminationMessage*).
const (
	maxMessage      = 4096
	maxLogMessage   = 2048
	maxMessageLines = 80
)

// terminationMessage reads what a container left to say; failed says that its log may speak for it.
func (h hostFiles) terminationMessage(pod *corev1.Pod, c *corev1.Container, attempt int, failed bool) string {
	path := h.termination(pod.UID, c.Name, attempt)
	if f, err := os.Open(path); err == nil {
		defer func() { _ = f.Close() }()
		buf := make([]byte, maxMessage)
		n, _ := f.Read(buf)
		if n > 0 {
			return strings.ToValidUTF8(string(buf[:n]), "")
		}
	}
	if c.TerminationMessagePolicy != corev1.TerminationMessageFallbackToLogsOnError || !failed {
		return ""
	}
	raw, err := tail(h.log(pod, c.Name, attempt), 64<<10)
	if err != nil {
		return ""
	}
	return lastLines(raw, maxMessageLines, maxLogMessage)
}

// tail reads the last n bytes of a file.
func tail(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	from := max(st.Size()-n, 0)
	buf := make([]byte, st.Size()-from)
	m, err := f.ReadAt(buf, from)
	if m > 0 {
		return buf[:m], nil
	}
	return nil, err
}

// lastLines takes the messages out of a log in CRI format ("TIME STREAM TAG MESSAGE"), the last ones that fit.
func lastLines(raw []byte, lines, size int) string {
	var out []string
	for _, line := range strings.Split(strings.TrimSuffix(string(raw), "\n"), "\n") {
		f := strings.SplitN(line, " ", 4)
		if len(f) == 4 && (f[1] == "stdout" || f[1] == "stderr") {
			end := "\n"
			if f[2] == "P" {
				end = ""
			}
			out = append(out, f[3]+end)
		}
	}
	if len(out) > lines {
		out = out[len(out)-lines:]
	}
	s := strings.Join(out, "")
	if len(s) > size {
		s = s[len(s)-size:]
	}
	return strings.ToValidUTF8(s, "")
}
