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
	"net/netip"
	"strconv"

	"skep.io/skep/dataplane/flows"
	"skep.io/skep/dataplane/maps"
)

// Root is where the node's API has it.
const Root = "/net/"

// Source is a node's data plane.
type Source interface {
	// Flows gives the last events to each, oldest first, and with follow those to come.
	Flows(ctx context.Context, follow bool, each func(flows.Flow) error) error
	Frontends() ([]Frontend, error)
	Backends() ([]Backend, error)
	Endpoints() ([]Endpoint, error)
	PolicySets() ([]PolicySet, error)
	Connections() ([]Connection, error)
	Health() (Health, error)
	Trace(Question) (Trace, error)
}

// Handler answers below Root: each with one JSON object a line.
func Handler(s Source) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+Root+"flows", func(w http.ResponseWriter, r *http.Request) {
		follow, err := strconv.ParseBool(r.FormValue("follow"))
		if err != nil && r.FormValue("follow") != "" {
			http.Error(w, "follow: true or false", http.StatusBadRequest)
			return
		}
		l := newLines(w, follow)
		l.end(r, s.Flows(r.Context(), follow, func(f flows.Flow) error { return l.write(f) }))
	})
	mux.HandleFunc("GET "+Root+"services", list(s.Frontends))
	mux.HandleFunc("GET "+Root+"backends", list(s.Backends))
	mux.HandleFunc("GET "+Root+"endpoints", list(s.Endpoints))
	mux.HandleFunc("GET "+Root+"policy", list(s.PolicySets))
	mux.HandleFunc("GET "+Root+"conntrack", list(s.Connections))
	mux.HandleFunc("GET "+Root+"health", one(s.Health))
	mux.HandleFunc("GET "+Root+"trace", func(w http.ResponseWriter, r *http.Request) {
		q, err := question(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		one(func() (Trace, error) { return s.Trace(q) })(w, r)
	})
	return mux
}

// list answers with what read gives.
func list[T any](read func() ([]T, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		l := newLines(w, false)
		all, err := read()
		for i := 0; err == nil && i < len(all); i++ {
			err = l.write(&all[i])
		}
		l.end(r, err)
	}
}

// one answers with the one thing that read gives.
func one[T any](read func() (T, error)) http.HandlerFunc {
	return list(func() ([]T, error) {
		v, err := read()
		return []T{v}, err
	})
}

// question reads ?from=ADDRESS[:PORT]&to=ADDRESS:PORT&protocol=TCP; without from the node itself asks.
func question(r *http.Request) (q Question, err error) {
	if from := r.FormValue("from"); from != "" {
		if q.From, err = netip.ParseAddr(from); err != nil {
			client, err := netip.ParseAddrPort(from)
			if err != nil {
				return q, fmt.Errorf("from: %w", err)
			}
			q.From, q.FromPort = client.Addr(), client.Port()
		}
	}
	if q.To, err = netip.ParseAddrPort(r.FormValue("to")); err != nil {
		return q, fmt.Errorf("to: %w", err)
	}
	switch p := r.FormValue("protocol"); p {
	case "", "TCP":
		q.Protocol = maps.TCP
	case "UDP":
		q.Protocol = maps.UDP
	case "SCTP":
		q.Protocol = maps.SCTP
	default:
		return q, fmt.Errorf("protocol: %q is none of TCP, UDP and SCTP", p)
	}
	return q, nil
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
