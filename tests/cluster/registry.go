// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"crypto/subtle"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// registryMain is an image registry on the machine it runs on: NAME:TAG=ARCHIVE pairs are its images. It
// prints its address, and ends with its standard input.
func registryMain(args []string) error {
	flags := flag.NewFlagSet("registry", flag.ContinueOnError)
	listen := flags.String("listen", "127.0.0.1:0", "address")
	login := flags.String("login", "", "USER:PASSWORD that pulls need")
	if err := flags.Parse(args); err != nil {
		return err
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	images := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: images}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }()
	for _, pair := range flags.Args() {
		ref, archive, ok := strings.Cut(pair, "=")
		if !ok {
			return fmt.Errorf("registry: %q is not NAME:TAG=ARCHIVE", pair)
		}
		if err := push(l.Addr().String()+"/"+ref, archive); err != nil {
			return err
		}
	}
	if *login != "" {
		if err := server.Close(); err != nil {
			return err
		}
		if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		if l, err = net.Listen("tcp", l.Addr().String()); err != nil {
			return err
		}
		server = &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: guarded(images, *login)}
		go func() { failed <- server.Serve(l) }()
	}
	fmt.Println(l.Addr())
	_, _ = io.Copy(io.Discard, os.Stdin)
	if err := server.Close(); err != nil {
		return err
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func push(ref, archive string) error {
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		return err
	}
	image, err := tarball.ImageFromPath(archive, nil)
	if err != nil {
		return fmt.Errorf("read %s: %w", archive, err)
	}
	if err := remote.Write(tag, image); err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	return nil
}

func guarded(next http.Handler, login string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, _ := r.BasicAuth()
		if subtle.ConstantTimeCompare([]byte(user+":"+password), []byte(login)) != 1 {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}
