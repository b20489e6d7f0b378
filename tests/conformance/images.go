// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// recipe says what is in one of the suite's images, in the words of examples/image.
type recipe struct {
	tags     []string // with the version that the suite asks for
	programs []string // of this host, with the libraries that they load
	files    []string // SRC:DST
	args     []string // further flags of examples/image
}

// nss is what glibc loads when a program looks up a name; static busybox does so, too.
var nss = []string{"libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2", "libc.so.6"}

// network are the programs that tests run in agnhost's containers.
var network = []string{"dig", "curl", "nc", "ss", "ip", "bash", "ipcs", "getent"}

// Files that images have beside what is built.
const (
	nsswitch = "passwd: files\ngroup: files\nhosts: files dns\n"
	passwd   = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\nwww-data:x:33:33:www-data:/var/www:/bin/false\n" +
		"user-defined-in-image:x:1000:1000::/:/bin/sh\n"
	group     = "root:x:0:\nnobody:x:65534:\nwww-data:x:33:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n"
	nginxConf = `user www-data;
worker_processes 1;
pid /run/nginx.pid;
error_log stderr;
events { worker_connections 256; }
http {
  types { text/html html; }
  access_log off;
  server {
    listen 80;
    listen [::]:80;
    root /usr/share/nginx/html;
  }
}
`
	nginxPage = "<!DOCTYPE html>\n<html><head><title>Welcome to nginx!</title></head><body><h1>Welcome to nginx!</h1></body></html>\n"
)

// recipes are all images. built has the programs that were compiled, kubernetes is the module's source, etc a
// directory with the files above.
func recipes(built, kubernetes, etc, busybox string) []recipe {
	const e2e = "registry.k8s.io/e2e-test-images/"
	shell := []string{"--busybox", busybox}
	root := append(slices.Clone(shell), "--user", "0:0")
	names := []string{etc + "/nsswitch.conf:/etc/nsswitch.conf", etc + "/passwd:/etc/passwd", etc + "/group:/etc/group"}
	porter := kubernetes + "/test/images/agnhost/porter/localhost"
	agnhostFiles := append(slices.Clone(names), built+"/agnhost:/agnhost", porter+".crt:/localhost.crt", porter+".key:/localhost.key")
	// Debian's busybox runs its own nc where agnhost's has OpenBSD's, whatever PATH says; bash does not.
	agnhostArgs := append(slices.Clone(root), "--entrypoint", "/agnhost", "--link", "/agnhost-2=agnhost", "--link", "/bin/sh=bash", "--dir", "/uploads")
	agnhost := func(command string, tags []string, files ...string) recipe {
		return recipe{tags: tags, programs: network, files: append(slices.Clone(agnhostFiles), files...), args: append(slices.Clone(agnhostArgs), "--cmd", command)}
	}
	page := func(name string) recipe {
		html := kubernetes + "/test/images/" + name + "/html/"
		return agnhost("test-webserver", []string{e2e + name + ":1.8"}, html+name+".jpg:/"+name+".jpg", html+"data.json:/data.json")
	}
	return []recipe{
		agnhost("pause", []string{e2e + "agnhost:2.63.0", e2e + "agnhost:2.55"}),
		page("nautilus"),
		// Debian's busybox shell hides variables whose names it would not take itself from what it runs; bash does not.
		{
			tags: []string{e2e + "busybox:1.37.0-1"}, programs: []string{"bash"}, files: names,
			args: append(slices.Clone(root), "--link", "/bin/sh=bash", "--cmd", "sh"),
		},
		{tags: []string{e2e + "glibc-dns-testing:2.0.0"}, programs: network, files: names, args: append(slices.Clone(root), "--cmd", "bash")},
		{tags: []string{"registry.k8s.io/pause:3.10.2"}, files: []string{built + "/pause"}, args: []string{"--user", "65535:65535"}},
		{
			tags: []string{e2e + "nginx:1.15-4", e2e + "nginx:1.27-0"}, programs: []string{"nginx"},
			files: append(names, etc+"/nginx.conf:/etc/nginx/nginx.conf", etc+"/index.html:/usr/share/nginx/html/index.html"),
			args: append(slices.Clone(root), "--port", "80/tcp", "--entrypoint", "nginx", "--cmd", "-g", "--cmd", "daemon off;",
				"--dir", "/var/lib/nginx", "--dir", "/var/log/nginx", "--dir", "/run"),
		},
	}
}

// makeImages writes the archives into dir.
func makeImages(ctx context.Context, root, built, kubernetes, dir string) error {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("the suite's images need a static busybox: apt-get install busybox-static: %w", err)
	}
	etc := filepath.Join(built, "etc")
	for _, d := range []string{etc, dir} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for name, content := range map[string]string{
		"nsswitch.conf": nsswitch, "passwd": passwd, "group": group, "nginx.conf": nginxConf, "index.html": nginxPage,
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	image := filepath.Join(built, "image")
	for _, r := range recipes(built, kubernetes, etc, busybox) {
		files, err := r.all(ctx)
		if err != nil {
			return err
		}
		file := strings.NewReplacer("/", "-", ":", "-").Replace(r.tags[0]) + ".tar"
		argv := append([]string{image, "--output", filepath.Join(dir, file)}, r.args...)
		for _, tag := range r.tags {
			argv = append(argv, "--tag", tag)
		}
		if err := do(ctx, root, append(argv, files...)...); err != nil {
			return err
		}
	}
	return nil
}

// all are the files of the image with its programs and what those load.
func (r recipe) all(ctx context.Context) ([]string, error) {
	files := slices.Clone(r.files)
	shell := slices.Contains(r.args, "--busybox")
	wanted := map[string]bool{}
	for _, name := range r.programs {
		p, err := exec.LookPath(name)
		if err != nil {
			return nil, fmt.Errorf("%s needs this host's %s: apt-get install bind9-dnsutils curl netcat-openbsd iproute2 nginx-light: %w", r.tags[0], name, err)
		}
		files = append(files, p+":/usr/bin/"+name)
		if shell {
			files = append(files, p+":/bin/"+name) // in place of busybox's
		}
		libraries, err := loads(ctx, p)
		if err != nil {
			return nil, err
		}
		for _, l := range libraries {
			wanted[l] = true
		}
	}
	if shell {
		getent, err := exec.LookPath("getent")
		if err != nil {
			return nil, err
		}
		libraries, err := loads(ctx, getent)
		if err != nil {
			return nil, err
		}
		for _, l := range libraries {
			wanted[l] = true
			for _, name := range nss {
				if beside := filepath.Join(filepath.Dir(l), name); exists(beside) {
					wanted[beside] = true
				}
			}
		}
	}
	for l := range wanted {
		files = append(files, l+":"+l)
	}
	slices.Sort(files[len(r.files):])
	return files, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// loads are the loader and the libraries of a program, by their absolute paths.
func loads(ctx context.Context, program string) ([]string, error) {
	out, err := exec.CommandContext(ctx, "ldd", program).Output()
	if err != nil {
		return nil, fmt.Errorf("ldd %s: %w", program, err)
	}
	return libraries(out), nil
}

// libraries reads ldd's output: "NAME => PATH (ADDRESS)", or "PATH (ADDRESS)" for the loader.
func libraries(ldd []byte) []string {
	var found []string
	for line := range bytes.Lines(ldd) {
		for field := range strings.FieldsSeq(string(line)) {
			if strings.HasPrefix(field, "/") {
				found = append(found, field)
				break
			}
		}
	}
	return found
}
