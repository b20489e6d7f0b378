// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/distribution/reference"
	"github.com/pelletier/go-toml/v2"
)

// A registry that accepts a connection and then says nothing is given up after that.
const registryPatience = time.Minute

// resolver finds what image names stand for as dir says, which has containerd's layout: of each registry a
// directory with its name (docker.io; localhost_5000_ with a port; _default for all others) and in it hosts.toml
// with its mirrors, certificates and headers, or certificates alone as Docker has them.
// https://github.com/containerd/containerd/blob/main/docs/hosts.md
func resolver(ctx context.Context, dir string, named reference.Named, auth Auth) remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{Hosts: config.ConfigureHosts(ctx, config.HostOptions{
		HostDir:     registryDir(dir),
		Credentials: auth.forRegistry(reference.Domain(named)),
		UpdateClient: func(c *http.Client) error {
			if t, ok := c.Transport.(*http.Transport); ok {
				t.ResponseHeaderTimeout = registryPatience
			}
			return nil
		},
	})})
}

// registryDir finds a registry's directory below dir.
func registryDir(dir string) func(registry string) (string, error) {
	if dir == "" {
		return nil
	}
	find := config.HostDirFromRoot(dir)
	return func(registry string) (string, error) {
		found, err := find(registry)
		if err != nil {
			return "", err
		}
		return found, checkHostsFile(filepath.Join(found, "hosts.toml"))
	}
}

// forRegistry gives the credentials to the registry that they are for: a mirror is somebody else, whose own go
// into a header of hosts.toml.
func (a Auth) forRegistry(domain string) func(host string) (string, string, error) {
	if domain == "docker.io" {
		domain = "registry-1.docker.io"
	}
	return func(host string) (string, string, error) {
		switch {
		case host != domain:
			return "", "", nil
		case a.IdentityToken != "":
			return "", a.IdentityToken, nil
		}
		return a.Username, a.Password, nil
	}
}

// hostsFile has the keys that containerd knows in a hosts.toml.
type hostsFile struct {
	registryHost
	Server string                  `toml:"server"`
	Host   map[string]registryHost `toml:"host"`
}

type registryHost struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   *bool          `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

// checkHostsFile refuses a file that containerd would ignore, or a key in it: then the registry itself would be
// asked, behind the mirror's back.
func checkHostsFile(path string) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("registry configuration: %w", err)
	}
	var unknown *toml.StrictMissingError
	var malformed *toml.DecodeError
	err = toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(new(hostsFile))
	switch {
	case errors.As(err, &unknown):
		first := &unknown.Errors[0]
		line, _ := first.Position()
		return fmt.Errorf("registry configuration %s:%d: unknown key %s", path, line, strings.Join(first.Key(), "."))
	case errors.As(err, &malformed):
		line, _ := malformed.Position()
		return fmt.Errorf("registry configuration %s:%d: %w", path, line, err)
	case err != nil:
		return fmt.Errorf("registry configuration %s: %w", path, err)
	}
	return nil
}
