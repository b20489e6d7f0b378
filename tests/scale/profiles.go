// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/pprof"

	"skep.io/skep/api"
	"skep.io/skep/tests/cluster"
)

// profileSeconds is how long the server's processor is looked at while a cluster grows.
const profileSeconds = 20

// profiles writes what the server and the hollow nodes do, apart from each other, for each size: files in dir.
type profiles struct {
	dir string
	of  *cluster.Node
}

// during starts to look at the processor. The function that it returns ends that, and looks at the memory.
func (p profiles) during(ctx context.Context, nodes int) (func() error, error) {
	if p.dir == "" {
		return func() error { return nil }, nil
	}
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return nil, err
	}
	file := func(name string) string { return filepath.Join(p.dir, fmt.Sprintf("%05d-%s", nodes, name)) }
	own, err := os.Create(file("nodes.cpu"))
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(own); err != nil {
		return nil, errors.Join(err, own.Close())
	}
	server := make(chan error, 1)
	go func() { server <- p.fetch(ctx, fmt.Sprintf("profile?seconds=%d", profileSeconds), file("server.cpu")) }()
	return func() error {
		pprof.StopCPUProfile()
		return errors.Join(own.Close(), <-server, p.fetch(ctx, "heap?gc=1", file("server.heap")))
	}, nil
}

// fetch asks the server on its own socket.
func (p profiles) fetch(ctx context.Context, what, file string) error {
	socket := p.of.Path(api.RunDir + "/control/server.sock")
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://server/debug/pprof/"+what, nil)
	if err != nil {
		return err
	}
	answer, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("profile %s: %s", what, answer.Status)
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, answer.Body)
	return errors.Join(err, out.Close())
}
