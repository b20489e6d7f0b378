// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"skep.io/skep/api"
)

// The control socket is where a running server takes orders of this host's root that are no business
// of the API's: what they read or write is on this host's disk, keys among it. Who may reach it is in
// the mode of its directory.
const (
	controlDir    = api.RunDir + "/control"
	controlSocket = controlDir + "/server.sock"
	// nodeSocket is the same of the node agent, which every server and agent has.
	nodeSocket = controlDir + "/node.sock"
)

// maxControlBody bounds what either side reads, in bytes.
const maxControlBody = 1 << 20

// refusal is the body of an answer that is no success.
type refusal struct {
	Error string `json:"error"`
}

// control makes a handler of a function of one JSON value that returns another.
func control[In, Out any](do func(context.Context, In) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in In
		var out any
		code := http.StatusOK
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxControlBody)).Decode(&in)
		if err == nil {
			out, err = do(r.Context(), in)
		}
		if err != nil {
			code, out = http.StatusInternalServerError, refusal{err.Error()}
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(out) // the other side has gone
	}
}

// serveControl answers on a control socket until ctx ends.
func serveControl(ctx context.Context, socket string, handler http.Handler, log *slog.Logger) error {
	if err := os.MkdirAll(controlDir, 0o700); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(controlDir, 0o700); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	// What a server left that was killed; the host is claimed, so nobody listens there.
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("control socket: %w", err)
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// order asks the server of this host to do something, and returns its answer.
func order[Out any](ctx context.Context, method, path string, in any) (out Out, err error) {
	return orderAt[Out](ctx, controlSocket, method, path, in)
}

// orderAt is order for one of the sockets.
func orderAt[Out any](ctx context.Context, socket, method, path string, in any) (out Out, err error) {
	body, err := json.Marshal(in)
	if err != nil {
		return out, err
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, method, "http://server"+path, bytes.NewReader(body))
	if err != nil {
		return out, err
	}
	response, err := (&http.Client{Transport: transport}).Do(request)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return out, fmt.Errorf("%s is root's: use sudo", controlDir)
	case socket == nodeSocket && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)):
		return out, errors.New("no node runs on this host: run this where `skep server` or `skep agent` runs")
	case errors.Is(err, fs.ErrNotExist), err != nil && ctx.Err() == nil && noServer():
		return out, errors.New("no server runs on this host: run this where `skep server` runs")
	case err != nil:
		return out, err
	}
	defer response.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(response.Body, maxControlBody))
	if err != nil {
		return out, err
	}
	if response.StatusCode != http.StatusOK {
		var no refusal
		if json.Unmarshal(raw, &no) != nil || no.Error == "" {
			no.Error = response.Status + ": the server on this host is of another version than this command"
		}
		return out, errors.New(no.Error)
	}
	return out, json.Unmarshal(raw, &out)
}

func noServer() bool {
	pid, err := runningServer()
	return err == nil && pid == 0
}

// isAgentsDir says whether an agent keeps its identity in dataDir.
func isAgentsDir(dataDir string) bool {
	_, err := os.Stat(filepath.Join(dataDir, "agent"))
	return err == nil
}
