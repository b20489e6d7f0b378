// SPDX-License-Identifier: Apache-2.0

package cronjob

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"
)

// now is half a minute past ten.
var now = time.Date(2026, 3, 4, 10, 0, 30, 0, time.UTC)

type option func(*batchv1.CronJob)

func newCronJob(schedule string, since time.Duration, options ...option) *batchv1.CronJob {
	cj := &batchv1.CronJob{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "c", UID: "cron", CreationTimestamp: metav1.NewTime(now.Add(-since))},
		Spec: batchv1.CronJobSpec{
			Schedule: schedule, TimeZone: new("Etc/UTC"), ConcurrencyPolicy: batchv1.AllowConcurrent,
			SuccessfulJobsHistoryLimit: new(int32(1)), FailedJobsHistoryLimit: new(int32(1)),
		},
	}
	for _, o := range options {
		o(cj)
	}
	return cj
}

func policy(p batchv1.ConcurrencyPolicy) option {
	return func(cj *batchv1.CronJob) { cj.Spec.ConcurrencyPolicy = p }
}
func zone(z string) option { return func(cj *batchv1.CronJob) { cj.Spec.TimeZone = &z } }
func suspended(cj *batchv1.CronJob) {
	cj.Spec.Suspend = new(true)
}
func deleted(cj *batchv1.CronJob) { cj.DeletionTimestamp = &metav1.Time{Time: now} }
func deadline(seconds int64) option {
	return func(cj *batchv1.CronJob) { cj.Spec.StartingDeadlineSeconds = &seconds }
}
func last(ago time.Duration) option {
	return func(cj *batchv1.CronJob) { cj.Status.LastScheduleTime = &metav1.Time{Time: now.Add(-ago)} }
}
func active(names ...string) option {
	return func(cj *batchv1.CronJob) {
		for _, name := range names {
			cj.Status.Active = append(cj.Status.Active, corev1.ObjectReference{Name: name, UID: types.UID(name)})
		}
	}
}

// job ended so long ago if as says how.
func job(name string, as batchv1.JobConditionType, ago time.Duration) *batchv1.Job {
	j := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{
		Namespace: "ns", Name: name, UID: types.UID(name), Annotations: map[string]string{batchv1.CronJobScheduledTimestampAnnotation: "then"},
	}}
	j.Status.StartTime = &metav1.Time{Time: now.Add(-ago)}
	if as != "" {
		j.Status.Conditions = []batchv1.JobCondition{{Type: as, Status: corev1.ConditionTrue}}
	}
	if as == batchv1.JobComplete {
		j.Status.CompletionTime = &metav1.Time{Time: now.Add(-ago)}
	}
	return j
}

func manual(j *batchv1.Job) *batchv1.Job {
	j.Annotations = nil
	return j
}

func describe(p Plan, old batchv1.CronJobStatus) string {
	var parts []string
	for _, j := range p.Delete {
		parts = append(parts, "delete "+j.Name)
	}
	if p.Create != nil {
		parts = append(parts, "create "+p.Create.Annotations[batchv1.CronJobScheduledTimestampAnnotation])
	}
	if p.Status != nil {
		if fmt.Sprint(p.Status.Active) != fmt.Sprint(old.Active) {
			var names []string
			for _, ref := range p.Status.Active {
				names = append(names, ref.Name)
			}
			parts = append(parts, "active "+strings.Join(names, ","))
		}
		if t := p.Status.LastSuccessfulTime; !t.Equal(old.LastSuccessfulTime) {
			parts = append(parts, "success "+t.UTC().Format(time.TimeOnly))
		}
		if t := p.Status.LastScheduleTime; !t.Equal(old.LastScheduleTime) {
			parts = append(parts, "scheduled "+t.UTC().Format(time.TimeOnly))
		}
	}
	for _, e := range p.Events {
		parts = append(parts, e.Reason)
	}
	if p.Wake > 0 {
		parts = append(parts, "wake "+p.Wake.String())
	}
	return strings.Join(parts, "; ")
}

func TestCompute(t *testing.T) {
	const complete, failed, day = batchv1.JobComplete, batchv1.JobFailed, 24 * time.Hour
	atTen := jobName(newCronJob("", 0), now.Truncate(time.Minute))
	for _, tt := range []struct {
		name string
		cj   *batchv1.CronJob
		jobs []*batchv1.Job
		want string
	}{
		{"not due yet", newCronJob("0 11 * * *", time.Hour), nil, "wake 59m30s"},
		{"due", newCronJob("0 * * * *", time.Hour), nil, "create 2026-03-04T10:00:00Z; wake 59m30s"},
		{"done", newCronJob("0 * * * *", day, last(30*time.Second)), nil, "wake 59m30s"},
		{"only the latest of what was missed", newCronJob("0 * * * *", day), nil, "create 2026-03-04T10:00:00Z; wake 59m30s"},
		{"too many missed", newCronJob("* * * * *", day), nil, "create 2026-03-04T10:00:00Z; TooManyMissedTimes; wake 30s"},
		{"not too many since the deadline", newCronJob("* * * * *", day, deadline(600)), nil, "create 2026-03-04T10:00:00Z; wake 30s"},
		{"missed long ago", newCronJob("0 9 * * *", day, deadline(600)), nil, "MissSchedule; wake 22h59m30s"},
		{"missed a moment ago", newCronJob("0 10 * * *", day, deadline(31)), nil, "create 2026-03-04T10:00:00Z; wake 23h59m30s"},
		{"suspended", newCronJob("0 * * * *", day, suspended), nil, ""},
		{"being deleted", newCronJob("0 * * * *", day, deleted), nil, ""},

		{"in another zone", newCronJob("30 15 * * *", day, zone("Asia/Kolkata")), nil, "create 2026-03-04T15:30:00+05:30; wake 23h59m30s"},
		{"in no zone", newCronJob("0 * * * *", day, zone("Moon/Tycho")), nil, "UnknownTimeZone"},
		{"no schedule", newCronJob("often", day), nil, "UnparseableSchedule"},
		{"never", newCronJob("0 0 31 2 *", day), nil, "InvalidSchedule"},
		{"a zone in the schedule", newCronJob("TZ=UTC 0 * * * *", day, func(cj *batchv1.CronJob) { cj.Spec.TimeZone = nil }, last(0)), nil, "UnsupportedSchedule; wake 59m30s"},

		{"one runs: allowed", newCronJob("0 * * * *", day, active("a")), []*batchv1.Job{job("a", "", time.Hour)}, "create 2026-03-04T10:00:00Z; wake 59m30s"},
		{"one runs: forbidden", newCronJob("0 * * * *", day, active("a"), policy(batchv1.ForbidConcurrent)), []*batchv1.Job{job("a", "", time.Hour)}, "JobAlreadyActive; wake 59m30s"},
		{"one ran: not forbidden any more", newCronJob("0 * * * *", day, active("a"), policy(batchv1.ForbidConcurrent)), []*batchv1.Job{job("a", failed, time.Hour)}, "create 2026-03-04T10:00:00Z; active ; SawCompletedJob; wake 59m30s"},
		{"one runs, long backlog: forbidden", newCronJob("* * * * *", day, active("a"), policy(batchv1.ForbidConcurrent)), []*batchv1.Job{job("a", "", time.Hour)}, "TooManyMissedTimes; JobAlreadyActive; wake 30s"},
		{"one runs, long backlog: replaced once", newCronJob("* * * * *", day, active("a"), policy(batchv1.ReplaceConcurrent)), []*batchv1.Job{job("a", "", time.Hour)}, "delete a; create 2026-03-04T10:00:00Z; active ; TooManyMissedTimes; wake 30s"},
		{"one runs: replaced", newCronJob("0 * * * *", day, active("a"), policy(batchv1.ReplaceConcurrent)), []*batchv1.Job{job("a", "", time.Hour)}, "delete a; create 2026-03-04T10:00:00Z; active ; wake 59m30s"},
		{"one runs by hand: not replaced", newCronJob("0 * * * *", day, policy(batchv1.ReplaceConcurrent)), []*batchv1.Job{manual(job("a", "", time.Hour))}, "create 2026-03-04T10:00:00Z; UnexpectedJob; wake 59m30s"},
		{"created before a crash", newCronJob("0 * * * *", day), []*batchv1.Job{job(atTen, "", 0)}, "active " + atTen + "; scheduled 10:00:00; wake 59m30s"},

		{"completed", newCronJob("0 * * * *", day, last(30*time.Second), active("a")), []*batchv1.Job{job("a", complete, time.Minute)}, "active ; success 09:59:30; SawCompletedJob; wake 59m30s"},
		{"missing", newCronJob("0 * * * *", day, last(30*time.Second), active("a")), nil, "active ; MissingJob; wake 59m30s"},
		{"history", newCronJob("0 * * * *", day, last(30*time.Second), func(cj *batchv1.CronJob) { cj.Status.LastSuccessfulTime = &metav1.Time{Time: now} }),
			[]*batchv1.Job{job("a", complete, 3*time.Hour), job("b", complete, time.Hour), job("c", failed, 4*time.Hour), job("d", failed, 2*time.Hour), job("e", complete, 2*time.Hour)},
			"delete c; delete a; delete e; wake 59m30s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := tt.cj.DeepCopy()
			plan := Compute(Snapshot{CronJob: tt.cj, Jobs: tt.jobs}, now)
			if got := describe(plan, tt.cj.Status); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if !apiequality.Semantic.DeepEqual(before, tt.cj) {
				t.Error("the snapshot was changed")
			}
		})
	}
}

func TestJob(t *testing.T) {
	cj := newCronJob("0 * * * *", time.Hour)
	cj.Spec.JobTemplate = batchv1.JobTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"l": "1"}, Annotations: map[string]string{"a": "2"}},
		Spec:       batchv1.JobSpec{Parallelism: new(int32(3))},
	}
	plan := Compute(Snapshot{CronJob: cj}, now)
	j := plan.Create
	if j.Name != "c-29543640" || j.Labels["l"] != "1" || j.Annotations["a"] != "2" || *j.Spec.Parallelism != 3 || !metav1.IsControlledBy(j, cj) {
		t.Errorf("job %+v", j)
	}
	if len(cj.Spec.JobTemplate.Annotations) != 1 {
		t.Error("the template was changed")
	}
	j.UID = "new"
	status := plan.Started(cj.Status, j)
	if len(status.Active) != 1 || status.Active[0].UID != "new" || !status.LastScheduleTime.Time.Equal(now.Truncate(time.Minute)) {
		t.Errorf("status %+v", status)
	}
	if again := plan.Started(*status, j); len(again.Active) != 1 {
		t.Errorf("it is active twice: %+v", again)
	}
}

// However irregular a schedule is, jumping finds what walking finds.
func TestStartsSince(t *testing.T) {
	schedules := []string{
		"* * * * *", "*/7 * * * *", "0 * * * *", "5,6,50 3-5 * * *", "30 6-16/4 * * 1-5", "* 6 * * *", "0 0 1 * *", "15 3 29 2 *", "0 12 * * 0", "@every 90m", "@every 25s", "@hourly",
	}
	rapid.Check(t, func(t *rapid.T) {
		cj := newCronJob(rapid.SampledFrom(schedules).Draw(t, "schedule"), 0, zone(rapid.SampledFrom([]string{"UTC", "Europe/Berlin", "America/New_York"}).Draw(t, "zone")))
		if strings.HasPrefix(cj.Spec.Schedule, "@every") {
			cj.Spec.TimeZone = nil
		}
		schedule, err := parse(cj)
		if err != nil {
			t.Fatal(err)
		}
		since := now.Add(time.Duration(rapid.IntRange(0, 366*24*3600).Draw(t, "offset")) * time.Second)
		until := since.Add(time.Duration(rapid.IntRange(0, 3*24*3600).Draw(t, "elapsed")) * time.Second)
		var want starts
		n := 0
		for want.next = schedule.Next(since); !want.next.After(until); want.next = schedule.Next(want.next) {
			want.latest = want.next
			n++
		}
		got, err := startsSince(schedule, since, until)
		if err != nil || !got.latest.Equal(want.latest) || !got.next.Equal(want.next) {
			t.Fatalf("%v to %v: got %+v, %v; want %+v", since, until, got, err, want)
		}
		if tooMany(schedule, since, until) != (n > mostMissed) {
			t.Fatalf("%d starts: too many %t", n, n <= mostMissed)
		}
	})
}

// A clock that was wrong by centuries costs no more than a good one.
func TestStartsSinceLongAgo(t *testing.T) {
	for _, text := range []string{"* * * * *", "@every 1s", "* * 29 2 *"} {
		schedule, err := parse(newCronJob(text, 0, func(cj *batchv1.CronJob) { cj.Spec.TimeZone = nil }))
		if err != nil {
			t.Fatal(err)
		}
		counted := &counting{Schedule: schedule}
		got, err := startsSince(counted, time.Unix(0, 0), now)
		if err != nil || got.latest.After(now) || !got.next.After(now) || got.latest.Before(now.AddDate(-4, 0, 0)) {
			t.Errorf("%s: %+v %v", text, got, err)
		}
		if counted.calls > 5000 {
			t.Errorf("%s: %d steps", text, counted.calls)
		}
	}
}

type counting struct {
	Schedule
	calls int
}

func (c *counting) Next(t time.Time) time.Time {
	c.calls++
	return c.Schedule.Next(t)
}

// However time passes and wherever the controller dies, no minute is started twice, and Forbid never runs two.
func TestStartsOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		forbid := rapid.Bool().Draw(t, "forbid")
		cj := newCronJob("*/2 * * * *", 0)
		if forbid {
			cj.Spec.ConcurrencyPolicy = batchv1.ForbidConcurrent
		}
		*cj.Spec.SuccessfulJobsHistoryLimit = int32(rapid.IntRange(0, 2).Draw(t, "history"))
		jobs, started, clock := []*batchv1.Job{}, map[string]bool{}, now
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			switch rapid.IntRange(0, 3).Draw(t, "step") {
			case 0:
				clock = clock.Add(time.Duration(rapid.IntRange(1, 300).Draw(t, "seconds")) * time.Second)
			case 1:
				if len(jobs) > 0 {
					i := rapid.IntRange(0, len(jobs)-1).Draw(t, "job")
					done := jobs[i].DeepCopy()
					done.Status.Conditions = []batchv1.JobCondition{{Type: batchv1.JobComplete, Status: corev1.ConditionTrue}}
					done.Status.CompletionTime = &metav1.Time{Time: clock}
					jobs[i] = done
				}
			default:
				plan := Compute(Snapshot{CronJob: cj, Jobs: jobs}, clock)
				for _, j := range plan.Delete {
					jobs = slices.DeleteFunc(jobs, func(k *batchv1.Job) bool { return k.UID == j.UID })
				}
				status := plan.Status
				if plan.Create != nil {
					if started[plan.Create.Name] {
						t.Fatalf("%s is started twice", plan.Create.Name)
					}
					started[plan.Create.Name] = true
					j := plan.Create.DeepCopy()
					j.UID = types.UID(j.Name)
					jobs = append(jobs, j)
					status = plan.Started(cj.Status, j)
				}
				if rapid.IntRange(0, 3).Draw(t, "dies before the status") == 0 {
					continue
				}
				if status != nil {
					cj = cj.DeepCopy()
					cj.Status = *status
				}
			}
			running := 0
			for _, j := range jobs {
				if len(j.Status.Conditions) == 0 {
					running++
				}
			}
			if forbid && running > 1 {
				t.Fatalf("%d jobs run at once", running)
			}
		}
	})
}
