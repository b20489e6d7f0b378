// SPDX-License-Identifier: Apache-2.0

package main

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

func TestPacerIsLateOnlyWhileQuiet(t *testing.T) {
	type step struct {
		name  string
		wrote bool
		used  time.Duration // since the step before
		want  bool
	}
	quiet := step{name: "quiet", used: lookEvery / 50}
	late := step{name: "quiet for long", used: lookEvery / 50, want: true}
	steps := []step{
		quiet, quiet, late, late,
		{name: "a write", wrote: true, used: lookEvery / 50},
		quiet, quiet, late,
		{name: "work without a write", used: lookEvery / 5},
		quiet, quiet, late,
	}
	p := newPacer(slog.New(slog.DiscardHandler))
	now, used := time.Unix(1000, 0), 5*time.Second
	p.looked, p.used = now, used
	for i, s := range steps {
		if s.wrote {
			p.busy()
		}
		now, used = now.Add(lookEvery), used+s.used
		if got := p.look(now, used); got != s.want {
			t.Fatalf("step %d, %s: late %v, want %v", i, s.name, got, s.want)
		}
	}
}

func TestPacerHurriesWhenLate(t *testing.T) {
	p := newPacer(slog.New(slog.DiscardHandler))
	p.busy()
	if len(p.hurry) != 0 {
		t.Error("a write wakes a pacer whose timers are precise")
	}
	p.late.Store(true)
	p.busy()
	p.busy() // does not block
	if len(p.hurry) != 1 {
		t.Error("a write does not wake a pacer whose timers are late")
	}
}

func TestPacerWatchesRequests(t *testing.T) {
	p := newPacer(slog.New(slog.DiscardHandler))
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	client := &http.Client{Transport: p.watch(http.DefaultTransport)}
	for path, want := range map[string]bool{
		"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n": false,
		"/api/v1/namespaces/default/pods/web/status":                       true,
	} {
		response, err := client.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		if err := response.Body.Close(); err != nil {
			t.Fatal(err)
		}
		if got := p.wrote.Swap(false); got != want {
			t.Errorf("%s: busy %v, want %v", path, got, want)
		}
	}
}

func TestPacerRestsNowAndThen(t *testing.T) {
	p := newPacer(slog.New(slog.DiscardHandler))
	rests := 0
	p.rest = func() { rests++ }
	now := time.Unix(1000, 0)
	for i, c := range []struct {
		quiet bool
		after time.Duration
		want  int
	}{
		{false, 0, 0}, {true, lookEvery, 1}, {true, 2 * restEvery, 1}, // once is enough while nothing happens
		{false, lookEvery, 1}, {true, lookEvery, 2},
		{false, lookEvery, 2}, {true, lookEvery, 2}, {true, restEvery, 3},
	} {
		now = now.Add(c.after)
		if p.restIf(c.quiet, now); rests != c.want {
			t.Fatalf("step %d: gave memory back %d times, want %d", i, rests, c.want)
		}
	}
}
