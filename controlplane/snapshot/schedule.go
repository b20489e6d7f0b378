// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/robfig/cron/v3"
)

// lookAgain bounds how long a step of the clock stays unnoticed.
const lookAgain = time.Hour

// ParseSchedule reads five fields of cron, or a word such as @daily.
func ParseSchedule(text string) (cron.Schedule, error) {
	s, err := cron.ParseStandard(text)
	if err != nil {
		return nil, fmt.Errorf("%q is not a schedule such as \"0 */12 * * *\" or @daily: %w", text, err)
	}
	return s, nil
}

// Run takes a snapshot whenever schedule says so, and keeps the newest ones, until ctx ends. A snapshot
// that fails is logged: the next one may not.
func (t *Taker) Run(ctx context.Context, schedule cron.Schedule, keep int, log *slog.Logger) error {
	next := schedule.Next(time.Now())
	for {
		if next.IsZero() { // a schedule such as February 30th
			<-ctx.Done()
			return nil
		}
		timer := time.NewTimer(min(time.Until(next), lookAgain))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		now := time.Now()
		if now.Before(next) {
			// The clock may have been set back: then the next time is an earlier one.
			next = earlier(next, schedule.Next(now))
			continue
		}
		if err := t.scheduled(ctx, keep, now, log); err != nil && ctx.Err() == nil {
			log.Error("scheduled snapshot", "error", err)
		}
		next = schedule.Next(now)
	}
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// scheduled takes one snapshot and deletes those that are too many. Nothing is deleted unless the new
// one is there.
func (t *Taker) scheduled(ctx context.Context, keep int, now time.Time, log *slog.Logger) error {
	taken, err := t.Take(ctx, "", Scheduled, now)
	if err != nil {
		return err
	}
	log.Info("snapshot taken", "snapshot", taken.Name, "revision", taken.Revision, "bytes", taken.Size)
	all, err := List(t.Dir)
	if err != nil {
		return fmt.Errorf("look for old snapshots: %w", err)
	}
	var errs []error
	for _, old := range expired(all, t.Node, keep) {
		errs = append(errs, removeIfThere(old.Path))
	}
	return errors.Join(errs...)
}
