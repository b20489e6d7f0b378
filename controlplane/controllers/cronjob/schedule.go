// SPDX-License-Identifier: Apache-2.0

package cronjob

import (
	"errors"
	"fmt"
	"strings"
	"time"
	_ "time/tzdata" // hosts without a time zone database have CronJobs with time zones too

	batchv1 "k8s.io/api/batch/v1"
	"k8s.io/kubernetes/pkg/util/parsers"
)

// mostMissed is how many missed starts are nothing to worry about.
const mostMissed = 100

// Schedule tells when, after a moment, the next start is; the zero time if never.
type Schedule interface{ Next(time.Time) time.Time }

var errNever = errors.New("no date fits it")

// location is where the clock of the schedule hangs.
func location(cj *batchv1.CronJob) (*time.Location, error) {
	if cj.Spec.TimeZone == nil {
		return time.Local, nil
	}
	return time.LoadLocation(*cj.Spec.TimeZone)
}

func parse(cj *batchv1.CronJob) (Schedule, error) {
	text := cj.Spec.Schedule
	if cj.Spec.TimeZone != nil && !strings.Contains(text, "TZ") {
		text = fmt.Sprintf("TZ=%s %s", *cj.Spec.TimeZone, text)
	}
	return parsers.ParseCronScheduleWithPanicRecovery(text)
}

// starts are what a schedule comes to between a moment and now.
type starts struct {
	// latest is the last start, zero if there was none.
	latest time.Time
	// next is the first one to come.
	next time.Time
}

// startsSince looks at the starts after since. Its cost does not grow with their number: a clock that was years off
// must not keep the controller busy.
func startsSince(schedule Schedule, since, now time.Time) (starts, error) {
	first := schedule.Next(since)
	if first.IsZero() {
		return starts{}, errNever
	}
	if first.After(now) {
		return starts{next: first}, nil
	}
	second := schedule.Next(first)
	interval := second.Sub(first)
	if second.IsZero() || interval < time.Second {
		return starts{latest: first}, errNever
	}
	// Jump to shortly before now, in whole intervals so that "@every" keeps its step, and further back as long as a
	// gap in the schedule is all that is found there.
	found := starts{latest: first}
	ahead := now.Sub(first) / interval
	for back := time.Duration(1); ; back *= 2 {
		from := first
		if back < ahead {
			from = first.Add((ahead - back) * interval)
		}
		at := schedule.Next(from)
		for ; !at.IsZero() && !at.After(now); at = schedule.Next(at) {
			found.latest = at
		}
		if found.latest.After(from) || back >= ahead {
			found.next = at
			break
		}
	}
	if found.next.IsZero() {
		return found, errNever
	}
	return found, nil
}

// tooMany tells whether more starts than mostMissed fall between since and now.
func tooMany(schedule Schedule, since, now time.Time) bool {
	at := since
	for range mostMissed + 1 {
		if at = schedule.Next(at); at.IsZero() || at.After(now) {
			return false
		}
	}
	return true
}
