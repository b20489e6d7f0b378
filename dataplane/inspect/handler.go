// SPDX-License-Identifier: Apache-2.0

// Package inspect shows what a node's data plane holds and does, with names: the node's API serves it, and
// `skep flows`, `skep net` and `skep trace` print it. All of it is read from the maps that the programs read.
package inspect

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"skep.io/skep/dataplane/flows"
)

// Path is where the node's API has it.
const Path = "/net/"

// Source is a node's data plane.
type Source interface {
	// Flows gives the last events to each, oldest first, and with follow those to come.
	Flows(ctx context.Context, follow bool, each func(flows.Flow) error) error
}

// Handler answers below Path: each with one JSON object a line.
func Handler(s Source) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+Path+"flows", func(w http.ResponseWriter, r *http.Request) {
		follow, err := strconv.ParseBool(r.FormValue("follow"))
		if err != nil && r.FormValue("follow") != "" {
			http.Error(w, "follow: true or false", http.StatusBadRequest)
			return
		}
		l := newLines(w, follow)
		l.end(r, s.Flows(r.Context(), follow, func(f flows.Flow) error { return l.write(f) }))
	})
	return mux
}

// lines writes objects, and an error as the last of them: the status has long been sent by then.
type lines struct {
	w       *bufio.Writer
	flush   func() error
	encoder *json.Encoder
	wrote   bool
	status  http.ResponseWriter
}

// newLines flushes each line if somebody waits for it.
func newLines(w http.ResponseWriter, eachLine bool) *lines {
	w.Header().Set("Content-Type", "application/x-ndjson")
	l := &lines{w: bufio.NewWriterSize(w, 32<<10), status: w}
	l.encoder = json.NewEncoder(l.w)
	if eachLine {
		l.flush = http.NewResponseController(w).Flush
		_ = l.flush() // so that the client knows that it follows; the next write tells whether it is gone
	}
	return l
}

func (l *lines) write(v any) error {
	l.wrote = true
	if err := l.encoder.Encode(v); err != nil {
		return err
	}
	if l.flush == nil {
		return nil
	}
	if err := l.w.Flush(); err != nil {
		return err
	}
	return l.flush()
}

// failure is the last line when something went wrong in the middle.
type failure struct {
	Error string `json:"error"`
}

func (l *lines) end(r *http.Request, err error) {
	switch {
	case err == nil || r.Context().Err() != nil:
	case !l.wrote && l.flush == nil:
		http.Error(l.status, err.Error(), http.StatusInternalServerError)
		return
	default:
		_ = l.encoder.Encode(failure{err.Error()}) // if it fails, nobody is there to be told
	}
	_ = l.w.Flush()
}

// Decode reads what Handler wrote.
func Decode[T any](r io.Reader, each func(T) error) error {
	d := json.NewDecoder(r)
	for {
		var raw json.RawMessage
		if err := d.Decode(&raw); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("answer of the node: %w", err)
		}
		var f failure
		if err := json.Unmarshal(raw, &f); err == nil && f.Error != "" {
			return fmt.Errorf("the node says: %s", f.Error)
		}
		var v T
		if err := json.Unmarshal(raw, &v); err != nil {
			return fmt.Errorf("answer of the node: %w", err)
		}
		if err := each(v); err != nil {
			return err
		}
	}
}
