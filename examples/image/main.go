// SPDX-License-Identifier: Apache-2.0

// Command image writes a container image as an archive that `skep server --images-dir`, containerd
// and Docker load. It needs no registry, no daemon and no root, and the same input makes the same
// bytes.
//
//	go run ./examples/image --tag NAME:TAG --output FILE.tar [flags] [STATIC-BINARY [SRC:DST ...]]
//
// The binary lands at /NAME-OF-THE-FILE and becomes the entrypoint; further files go where they are
// told. With --busybox and no binary the image starts a shell.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// options are the command line.
type options struct {
	output, busybox, user, arch string
	tags                        list
	entrypoint, cmd, env, ports list
	links, dirs                 list
	files                       []string
}

func parse(args []string) (options, error) {
	var o options
	f := flag.NewFlagSet("image", flag.ContinueOnError)
	f.Var(&o.tags, "tag", "the image's name, such as skep.io/examples/hello:latest; repeat for more")
	f.StringVar(&o.output, "output", "", "the archive to write")
	f.StringVar(&o.busybox, "busybox", "", "a static busybox to add as /bin/busybox, with links for its programs")
	f.StringVar(&o.user, "user", "", "USER[:GROUP] that runs it (default 65532:65532 with a binary, else root)")
	f.StringVar(&o.arch, "arch", runtime.GOARCH, "architecture, as Go names it")
	f.Var(&o.entrypoint, "entrypoint", "a word of the entrypoint; repeat for more (default: the binary)")
	f.Var(&o.cmd, "cmd", "a word of the default arguments; repeat for more")
	f.Var(&o.env, "env", "NAME=VALUE; repeat for more")
	f.Var(&o.links, "link", "PATH=TARGET, a symbolic link; repeat for more")
	f.Var(&o.dirs, "dir", "a directory for everybody to write in; repeat for more")
	f.Var(&o.ports, "port", "a port to declare, such as 8080/tcp; repeat for more")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	o.files = f.Args()
	switch {
	case len(o.tags) == 0 || o.output == "":
		return o, errors.New("--tag and --output are required; see --help")
	case len(o.files) == 0 && o.busybox == "":
		return o, errors.New("nothing to put into the image: name a static binary, or --busybox")
	}
	return o, nil
}

// build makes the image that options describe.
func build(o options) (v1.Image, error) {
	t := newTree()
	config := v1.Config{
		Env:        append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, o.env...),
		Entrypoint: o.entrypoint, Cmd: o.cmd, User: o.user, WorkingDir: "/",
	}
	if o.busybox != "" {
		if err := t.addBusybox(o.busybox); err != nil {
			return nil, err
		}
	}
	for i, arg := range o.files {
		src, dst, placed := strings.Cut(arg, ":")
		switch {
		case placed:
			if err := t.addFile(src, dst); err != nil {
				return nil, err
			}
		case i == 0:
			program := "/" + filepath.Base(src)
			if err := t.addBinary(src, program); err != nil {
				return nil, err
			}
			if len(config.Entrypoint) == 0 {
				config.Entrypoint = []string{program}
			}
			if config.User == "" {
				config.User = "65532:65532"
			}
		default:
			return nil, fmt.Errorf("%s: say where it goes in the image, as SRC:DST", arg)
		}
	}
	if err := t.addNames(o.links, o.dirs); err != nil {
		return nil, err
	}
	if len(config.Entrypoint) == 0 && len(config.Cmd) == 0 {
		config.Cmd = []string{"sh"}
	}
	if len(o.ports) > 0 {
		config.ExposedPorts = map[string]struct{}{}
		for _, p := range o.ports {
			config.ExposedPorts[p] = struct{}{}
		}
	}
	layer, err := t.layer()
	if err != nil {
		return nil, err
	}
	img, err := mutate.Append(empty.Image, mutate.Addendum{
		Layer: layer, History: v1.History{Created: v1.Time{Time: epoch}, CreatedBy: "skep examples/image"},
	})
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Created, cf.Config = "linux", o.arch, v1.Time{Time: epoch}, config
	return mutate.ConfigFile(img, cf)
}

// write replaces the archive only once the new one is complete; two may write the same at once.
func write(o options, img v1.Image) error {
	images := map[name.Tag]v1.Image{}
	for _, t := range o.tags {
		tag, err := name.NewTag(t, name.StrictValidation)
		if err != nil {
			return fmt.Errorf("--tag: %w", err)
		}
		images[tag] = img
	}
	f, err := os.CreateTemp(filepath.Dir(o.output), filepath.Base(o.output)+".*.new")
	if err != nil {
		return err
	}
	err = errors.Join(tarball.MultiWrite(images, f), f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), o.output)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("writing %s: %w", o.output, err)
	}
	return nil
}

func run(args []string) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	img, err := build(o)
	if err != nil {
		return err
	}
	return write(o, img)
}

func main() {
	switch err := run(os.Args[1:]); {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}
