// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"log/slog"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func startAt(revision int64) clientv3.OpOption { return clientv3.WithRev(revision) }

// always is a schedule whose next time is the next second.
type always struct{}

func (always) Next(t time.Time) time.Time { return t.Truncate(time.Second).Add(time.Second) }

// signals is a log that tells of one message.
type signals struct {
	slog.Handler
	message string
	seen    chan struct{}
}

func newSignals(message string) (*slog.Logger, <-chan struct{}) {
	s := signals{slog.DiscardHandler, message, make(chan struct{}, 100)}
	return slog.New(s), s.seen
}

func (signals) Enabled(context.Context, slog.Level) bool { return true }

func (s signals) Handle(_ context.Context, r slog.Record) error {
	if r.Message == s.message {
		s.seen <- struct{}{}
	}
	return nil
}
