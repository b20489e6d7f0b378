// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"context"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	"skep.io/skep/dataplane/flows"
)

type source struct {
	Source
	flows []flows.Flow
	err   error
}

func (s *source) Flows(ctx context.Context, follow bool, each func(flows.Flow) error) error {
	for _, f := range s.flows {
		if err := each(f); err != nil {
			return err
		}
	}
	if follow {
		<-ctx.Done()
		return ctx.Err()
	}
	return s.err
}

// TestHandlerFlows: what is written is read, an error in the middle is told, and a follower's client goes when it likes.
func TestHandlerFlows(t *testing.T) {
	s := &source{flows: []flows.Flow{{Node: "a", Verdict: flows.Dropped, Policies: []string{"x/y"}}, {Node: "b"}}}
	srv := httptest.NewServer(Handler(s))
	defer srv.Close()
	read := func(path string, n int) (got []flows.Flow, err error) {
		t.Helper()
		resp, err := srv.Client().Get(srv.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		enough := errors.New("enough")
		err = Decode(resp.Body, func(f flows.Flow) error {
			if got = append(got, f); len(got) == n {
				return enough
			}
			return nil
		})
		if errors.Is(err, enough) {
			err = nil
		}
		return got, err
	}
	for _, path := range []string{"/net/flows", "/net/flows?follow=false", "/net/flows?follow=true"} {
		n := 0
		if strings.HasSuffix(path, "true") {
			n = 2
		}
		got, err := read(path, n)
		if err != nil || len(got) != 2 || got[0].Policies[0] != "x/y" || got[1].Node != "b" {
			t.Errorf("%s: %+v, %v", path, got, err)
		}
	}
	s.err = errors.New("no more")
	if got, err := read("/net/flows", 0); len(got) != 2 || err == nil || !strings.Contains(err.Error(), "no more") {
		t.Errorf("%+v, %v", got, err)
	}
	s.flows = nil
	resp, err := srv.Client().Get(srv.URL + "/net/flows")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 500 {
		t.Errorf("status %d", resp.StatusCode)
	}
	resp, err = srv.Client().Get(srv.URL + "/net/flows?follow=perhaps")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 400 {
		t.Errorf("status %d", resp.StatusCode)
	}
}
