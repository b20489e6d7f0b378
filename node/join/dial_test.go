// SPDX-License-Identifier: Apache-2.0

package join

import (
	"context"
	"net"
	"path/filepath"
	"slices"
	"testing"
)

func TestCandidates(t *testing.T) {
	for name, c := range map[string]struct {
		last  string
		list  []string
		first string
		want  []string
	}{
		"only the first is known":   {"f", nil, "f", []string{"f"}},
		"the last that answered":    {"b", []string{"a", "b"}, "a", []string{"b", "a"}},
		"the first is not listed":   {"a", []string{"a", "b"}, "f", []string{"a", "b", "f"}},
		"the first was removed":     {"f", []string{"a", "b"}, "f", []string{"a", "b", "f"}},
		"the last was removed":      {"x", []string{"a", "b"}, "a", []string{"a", "b"}},
		"behind a name or balancer": {"f", []string{"a"}, "f", []string{"a", "f"}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := candidates(c.last, c.list, c.first); !slices.Equal(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestDialsWhoeverAnswers(t *testing.T) {
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		return l
	}
	a, b := listen(), listen()
	path := filepath.Join(t.TempDir(), "servers.json")
	s := newServers(a.Addr().String(), path)
	reaches := func(s *servers, l net.Listener) {
		t.Helper()
		conn, err := s.dial(context.Background(), "tcp", "anything:1")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if conn.RemoteAddr().String() != l.Addr().String() {
			t.Errorf("reached %s, want %s", conn.RemoteAddr(), l.Addr())
		}
	}
	reaches(s, a)
	if err := s.learn([]string{a.Addr().String(), b.Addr().String()}); err != nil {
		t.Fatal(err)
	}
	reaches(s, a)
	_ = a.Close()
	reaches(s, b)
	reaches(newServers(a.Addr().String(), path), b) // the next process
	_ = b.Close()
	if conn, err := s.dial(context.Background(), "tcp", "anything:1"); err == nil {
		conn.Close()
		t.Error("reached somebody")
	}
}
