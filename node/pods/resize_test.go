// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/client-go/kubernetes/fake"

	"skep.io/skep/node/runtime"
	"skep.io/skep/node/sandbox/cgroup"
)

// needs is requests and limits alike: "250m/64Mi".
func needs(amounts string) corev1.ResourceRequirements {
	cpu, memory, _ := strings.Cut(amounts, "/")
	list := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
	return corev1.ResourceRequirements{Requests: list, Limits: list.DeepCopy()}
}

func needing(amounts string) func(*corev1.Container) {
	return func(c *corev1.Container) { c.Resources = needs(amounts) }
}

func restartingFor(names ...corev1.ResourceName) func(*corev1.Container) {
	return func(c *corev1.Container) {
		for _, n := range names {
			c.ResizePolicy = append(c.ResizePolicy, corev1.ContainerResizePolicy{ResourceName: n, RestartPolicy: corev1.RestartContainer})
		}
	}
}

func having(amounts string) func(*runtime.Container) {
	return func(c *runtime.Container) { r := needs(amounts); c.Resources = &r }
}

func generation(n int64) podOpt { return func(p *corev1.Pod) { p.Generation = n } }

func important(n int32) podOpt { return func(p *corev1.Pod) { p.Spec.Priority = &n } }

func TestAllot(t *testing.T) {
	allocatable := corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("1Gi"), corev1.ResourcePods: resource.MustParse("10"),
	}
	other := pod(called("other"), main("c", needing("2/512Mi")))
	finished := pod(called("finished"), main("c", needing("2/512Mi")), phase(corev1.PodSucceeded))
	big := pod(called("big"), main("c", needing("8/4Gi"))) // a static pod, say: the node is overcommitted
	for name, c := range map[string]struct {
		spec    string
		others  []*corev1.Pod
		want    string // given
		reason  string
		message string
	}{
		"the same":               {spec: "1/256Mi", want: "1/256Mi"},
		"the same, said in m":    {spec: "1000m/256Mi", want: "1/256Mi"},
		"more":                   {spec: "2/512Mi", others: []*corev1.Pod{other}, want: "2/512Mi"},
		"less":                   {spec: "500m/64Mi", want: "500m/64Mi"},
		"less on a full node":    {spec: "500m/64Mi", others: []*corev1.Pod{big}, want: "500m/64Mi"},
		"more than there is now": {spec: "3/256Mi", others: []*corev1.Pod{other}, want: "1/256Mi", reason: corev1.PodReasonDeferred, message: "Node didn't have enough resource: cpu, requested: 3000, used: 2000, capacity: 4000"},
		"what a finished one had": {
			spec: "3/256Mi", others: []*corev1.Pod{finished}, want: "3/256Mi"},
		"more than there ever is": {spec: "1/2Gi", want: "1/256Mi", reason: corev1.PodReasonInfeasible, message: "Node didn't have enough capacity: memory, requested: 2147483648, capacity: 1073741824"},
		"less of one, more of another": {
			spec: "3/64Mi", others: []*corev1.Pod{other}, want: "1/256Mi", reason: corev1.PodReasonDeferred, message: "Node didn't have enough resource: cpu, requested: 3000, used: 2000, capacity: 4000"},
	} {
		was := pod(main("c", needing("1/256Mi")))
		got := allot(pod(main("c", needing(c.spec)), generation(2)), allotment{pod: was}, append(c.others, was), allocatable, now)
		given, want := got.pod.Spec.Containers[0].Resources, needs(c.want)
		if !sameRequirements(&given, &want) {
			t.Errorf("%s: given %v", name, given)
		}
		switch p := got.pending; {
		case (p != nil) != (c.reason != ""):
			t.Errorf("%s: pending %+v", name, p)
		case p != nil && (p.Reason != c.reason || p.Message != c.message || p.Generation != 2):
			t.Errorf("%s: pending %+v", name, p)
		}
	}
}

// A pod waits for room from when it first asked, not from when it was last looked at.
func TestAllotKeepsTheTime(t *testing.T) {
	allocatable := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("2"), corev1.ResourceMemory: resource.MustParse("1Gi"), corev1.ResourcePods: resource.MustParse("10")}
	other := []*corev1.Pod{pod(called("other"), main("c", needing("1/1Mi")))}
	was := allotment{pod: pod(main("c", needing("1/1Mi")))}
	first := allot(pod(main("c", needing("2/1Mi")), generation(2)), was, other, allocatable, now)
	again := allot(pod(main("c", needing("2/1Mi")), generation(2)), first, other, allocatable, now.Add(time.Hour))
	anew := allot(pod(main("c", needing("1500m/1Mi")), generation(3)), again, other, allocatable, now.Add(time.Hour))
	if again.pending.Since != now || anew.pending.Since != now.Add(time.Hour) {
		t.Errorf("since %v, then %v", again.pending.Since, anew.pending.Since)
	}
}

func TestMoreUrgent(t *testing.T) {
	at := func(d time.Duration) *allotment { return &allotment{pending: &pending{Since: ago(d)}} }
	type waiting struct {
		pod *corev1.Pod
		a   *allotment
	}
	burstable := main("c", asks(corev1.ResourceCPU, "1"))
	list := []waiting{
		{pod(called("late"), burstable), at(time.Second)},
		{pod(called("early"), burstable), at(time.Minute)},
		{pod(called("guaranteed"), main("c", needing("1/1Mi"))), at(time.Second)},
		{pod(called("important"), burstable, important(10)), at(time.Second)},
	}
	slices.SortFunc(list, func(p, q waiting) int { return moreUrgent(p.pod, p.a, q.pod, q.a) })
	var got []string
	for _, w := range list {
		got = append(got, string(w.pod.UID))
	}
	if diff := cmp.Diff([]string{"important", "guaranteed", "early", "late"}, got); diff != "" {
		t.Error(diff)
	}
}

func limited(p *corev1.Pod) seenOpt {
	return func(o *Observed) { l := podLimits(p, 0); o.Limits = &l }
}

func TestPlanResize(t *testing.T) {
	small, large := pod(main("c", needing("1/64Mi"))), pod(main("c", needing("2/64Mi")))
	restarts := pod(main("c", needing("2/64Mi"), restartingFor(corev1.ResourceCPU)))
	onMemory := pod(main("c", needing("2/64Mi"), restartingFor(corev1.ResourceMemory)))
	failed := func(o *Observed) { o.ResizeFailure = &Failure{RetryAt: now.Add(time.Second)} }
	stopped := func(o *Observed) { o.Resized = map[string]bool{"c-0": true} }
	for name, c := range map[string]struct {
		pod  *corev1.Pod
		seen *Observed
		want []string
	}{
		"nothing to do":                     {large, seen(running("c", 0, having("2/64Mi")), limited(large)), nil},
		"in place":                          {large, seen(running("c", 0, having("1/64Mi")), limited(small)), []string{"Resize"}},
		"in place, of another resource":     {onMemory, seen(running("c", 0, having("1/64Mi")), limited(small)), []string{"Resize"}},
		"it failed a moment ago":            {large, seen(running("c", 0, having("1/64Mi")), limited(small), failed), nil},
		"an agent that has just started":    {large, seen(running("c", 0, having("2/64Mi")), func(o *Observed) { o.Limits = nil }), []string{"Resize"}},
		"made by an agent that noted less":  {large, seen(running("c", 0), limited(large)), nil},
		"restart: first there must be room": {restarts, seen(running("c", 0, having("1/64Mi")), limited(small)), []string{"Resize"}},
		"restart: then it ends":             {restarts, seen(running("c", 0, having("1/64Mi")), limited(restarts)), []string{"stop c-0 30s"}},
		"restart: and starts again at once": {restarts, seen(exited("c", 0, 0, having("1/64Mi"), delay(10*time.Second)), limited(restarts), stopped, image("c", 1)), []string{"start c#1 next 10s"}},
		"to be narrowed once it is over":    {small, seen(running("c", 0, having("1/64Mi")), limited(large)), []string{"Resize"}},
		"no room for the next attempt":      {large, seen(exited("c", 0, 1, having("1/64Mi")), limited(small), image("c", 1)), []string{"Resize"}},
	} {
		p := plan(c.pod, c.seen)
		var got []string
		for _, a := range p.Actions {
			got = append(got, short(a))
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

// A container that was stopped to be resized starts again even where one that ends well would not.
func TestResizedContainerIsNotOver(t *testing.T) {
	p := pod(main("c", needing("2/64Mi"), restartingFor(corev1.ResourceCPU)), policy(corev1.RestartPolicyOnFailure))
	o := seen(exited("c", 0, 0, having("1/64Mi")), limited(p), image("c", 1))
	if s := status(p, o); s.Phase != corev1.PodSucceeded {
		t.Errorf("without a resize it is %s", s.Phase)
	}
	o.Resized = map[string]bool{"c-0": true}
	if s := status(p, o); s.Phase != corev1.PodRunning || s.ContainerStatuses[0].State.Terminated != nil {
		t.Errorf("phase %s, state %+v", s.Phase, s.ContainerStatuses[0].State)
	}
}

// What was stopped to start again was never over: the API refuses to let a container come back that it has seen ended so.
func TestStatusOfWhatStartsAgain(t *testing.T) {
	for name, p := range map[string]*corev1.Pod{
		"an end that counts":     pod(main("c", liveness), policy(corev1.RestartPolicyOnFailure)),
		"nothing is restarted":   pod(main("c"), policy(corev1.RestartPolicyNever)),
		"everything is anyhow":   pod(main("c", liveness)),
		"it is waited a while":   pod(main("c", liveness), policy(corev1.RestartPolicyOnFailure), named("slow")),
		"its image is not there": pod(main("c", liveness), policy(corev1.RestartPolicyOnFailure), named("imageless")),
	} {
		o, want := seen(exited("c", 0, 0), again("c-0")), reasonContainerCreating
		switch p.Name {
		case "slow":
			o, want = seen(exited("c", 0, 0, delay(10*time.Second)), again("c-0")), reasonCrashLoop
		case "imageless":
			o.Images["c"], want = ImageState{Failure: &Failure{Reason: "ErrImagePull"}}, "ErrImagePull"
		}
		s := status(p, o).ContainerStatuses[0]
		if s.State.Waiting == nil || s.State.Waiting.Reason != want || s.LastTerminationState.Terminated == nil {
			t.Errorf("%s: %+v, last %+v", name, s.State, s.LastTerminationState)
		}
	}
}

func TestStatusOfResize(t *testing.T) {
	p := pod(main("c", needing("2/64Mi")), generation(3))
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodResizePending, Status: corev1.ConditionTrue}, {Type: corev1.PodResizeInProgress, Status: corev1.ConditionTrue}}
	show := func(s corev1.PodStatus) string {
		var out []string
		for _, c := range s.Conditions {
			if c.Type == corev1.PodResizePending || c.Type == corev1.PodResizeInProgress {
				out = append(out, string(c.Type)+" "+c.Reason+" "+c.Message)
			}
		}
		cs := s.ContainerStatuses[0]
		return strings.Join(append(out, "allocated "+cs.AllocatedResources.Cpu().String(), "has "+cs.Resources.Limits.Cpu().String()), ", ")
	}
	for name, c := range map[string]struct {
		seen *Observed
		want string
	}{
		"done":        {seen(running("c", 0, having("2/64Mi")), limited(p)), "allocated 2, has 2"},
		"in progress": {seen(running("c", 0, having("1/64Mi")), limited(p)), "PodResizeInProgress  , allocated 2, has 1"},
		"failing": {seen(running("c", 0, having("1/64Mi")), limited(p), func(o *Observed) { o.ResizeFailure = &Failure{Message: "no"} }),
			"PodResizeInProgress Error no, allocated 2, has 1"},
		"pending": {seen(running("c", 0, having("2/64Mi")), limited(p), func(o *Observed) { o.Pending = &pending{Reason: "Deferred", Message: "wait"} }),
			"PodResizePending Deferred wait, allocated 2, has 2"},
	} {
		if got := show(status(p, c.seen)); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func (b *bench) resize(name, amounts string) {
	b.t.Helper()
	b.mark(name, func(p *corev1.Pod) {
		p.Generation++
		p.Spec.Containers[0].Resources = needs(amounts)
	})
}

func (b *bench) condition(name string, want corev1.PodConditionType) *corev1.PodCondition {
	for _, c := range b.get(name).Status.Conditions {
		if c.Type == want {
			return &c
		}
	}
	return nil
}

// sized reports whether the container's status shows that it has so much.
func (b *bench) sized(name, amounts string) bool {
	want := needs(amounts)
	s := b.get(name).Status.ContainerStatuses
	return len(s) > 0 && s[0].Resources != nil && sameRequirements(s[0].Resources, &want) && b.condition(name, corev1.PodResizeInProgress) == nil
}

func newSizedBench(t *testing.T, h *host, client *fake.Clientset) *bench {
	b := newBench(t, h, client)
	b.set.cfg.Allocatable = corev1.ResourceList{
		corev1.ResourcePods: resource.MustParse("10"), corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("1Gi"),
	}
	if err := b.set.Prune(context.Background()); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestResizeInPlace(t *testing.T) {
	b := newSizedBench(t, newHost(), fake.NewClientset())
	b.create(pod(named("p"), main("c", needing("1/64Mi"))))
	b.until("it is ready", func() bool { return ready(b.get("p")) })
	b.resize("p", "2/128Mi")
	b.until("it has more", func() bool { return b.sized("p", "2/128Mi") })
	b.resize("p", "500m/32Mi")
	b.until("it has less", func() bool { return b.sized("p", "500m/32Mi") })
	b.host.mu.Lock()
	steps := slices.Clone(b.host.steps)
	b.host.mu.Unlock()
	// The pod's cgroup is always the wider one.
	want := []string{"limit cpu 200000 memory 134217728", "update uid-p-c-0", "update uid-p-c-0", "limit cpu 50000 memory 33554432"}
	if diff := cmp.Diff(want, steps); diff != "" {
		t.Error(diff)
	}
	if s := b.get("p").Status.ContainerStatuses[0]; s.RestartCount != 0 {
		t.Errorf("restarted %d times", s.RestartCount)
	}
	var told []string
	for len(b.events.Events) > 0 {
		if f := strings.Fields(<-b.events.Events); strings.HasPrefix(f[1], "Resize") {
			told = append(told, f[1])
		}
	}
	if diff := cmp.Diff([]string{"ResizeStarted", "ResizeCompleted", "ResizeStarted", "ResizeCompleted"}, told); diff != "" {
		t.Error(diff)
	}
}

func TestResizeByRestart(t *testing.T) {
	b := newSizedBench(t, newHost(), fake.NewClientset())
	b.create(pod(named("p"), policy(corev1.RestartPolicyOnFailure), main("c", needing("1/64Mi"), restartingFor(corev1.ResourceMemory))))
	b.until("it is ready", func() bool { return ready(b.get("p")) })
	b.resize("p", "1/128Mi")
	b.until("it runs again with more", func() bool {
		return b.sized("p", "1/128Mi") && b.get("p").Status.ContainerStatuses[0].RestartCount == 1
	})
	b.until("the pod's cgroup has as much", func() bool {
		b.host.mu.Lock()
		defer b.host.mu.Unlock()
		return b.host.limits["uid-p"] == podLimits(b.set.Pods()[0], 0)
	})
}

// What does not fit waits until another pod has gone, and what never fits says so.
func TestResizeWaitsForRoom(t *testing.T) {
	b := newSizedBench(t, newHost(), fake.NewClientset())
	b.create(pod(named("other"), main("c", needing("2/64Mi"))))
	b.create(pod(named("p"), main("c", needing("1/64Mi"))))
	b.until("they are ready", func() bool { return ready(b.get("p")) && ready(b.get("other")) })
	b.resize("p", "5/64Mi")
	b.until("it can never be", func() bool {
		c := b.condition("p", corev1.PodResizePending)
		return c != nil && c.Reason == corev1.PodReasonInfeasible
	})
	b.resize("p", "3/64Mi")
	b.until("it waits", func() bool {
		c := b.condition("p", corev1.PodResizePending)
		return c != nil && c.Reason == corev1.PodReasonDeferred
	})
	if !b.sized("p", "1/64Mi") {
		t.Errorf("status %+v", b.get("p").Status.ContainerStatuses)
	}
	b.mark("other", deleting(1))
	b.until("it has what it asked for", func() bool { return b.sized("p", "3/64Mi") && b.condition("p", corev1.PodResizePending) == nil })
}

// A limit below what is in use is an error that shows, and is tried again.
func TestResizeBelowUsage(t *testing.T) {
	h := newHost()
	b := newSizedBench(t, h, fake.NewClientset())
	b.create(pod(named("p"), main("c", needing("1/64Mi"))))
	b.until("it is ready", func() bool { return ready(b.get("p")) })
	h.mu.Lock()
	h.inUse = 48 << 20
	h.mu.Unlock()
	b.resize("p", "1/32Mi")
	b.until("the error shows", func() bool {
		c := b.condition("p", corev1.PodResizeInProgress)
		return c != nil && c.Reason == corev1.PodReasonError && strings.Contains(c.Message, cgroup.ErrInUse.Error())
	})
	h.mu.Lock()
	h.inUse = 0
	h.mu.Unlock()
	b.until("it is tried again", func() bool { return b.sized("p", "1/32Mi") })
}

// An agent that starts finds what containers were made with, and gives nothing away before it knows all pods.
func TestResizeAfterRestart(t *testing.T) {
	h, client := newHost(), fake.NewClientset()
	b := newSizedBench(t, h, client)
	b.create(pod(named("p"), main("c", needing("1/64Mi"))))
	b.create(pod(named("other"), main("c", needing("2/64Mi"))))
	b.until("they are ready", func() bool { return ready(b.get("p")) && ready(b.get("other")) })
	b.stop()
	b.resize("p", "3/64Mi")
	b = newBench(t, h, client)
	b.set.cfg.Allocatable = corev1.ResourceList{
		corev1.ResourcePods: resource.MustParse("10"), corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("1Gi"),
	}
	b.set.Update(b.get("p"))
	b.set.Update(b.get("other"))
	if err := b.set.Prune(context.Background()); err != nil {
		t.Fatal(err)
	}
	b.until("it waits", func() bool {
		c := b.condition("p", corev1.PodResizePending)
		return c != nil && c.Reason == corev1.PodReasonDeferred
	})
	if !b.sized("p", "1/64Mi") {
		t.Errorf("status %+v", b.get("p").Status.ContainerStatuses)
	}
}

// What a pod has as a whole is what its cgroup has; while that lags behind, status shows what it had.
func TestStatusOfWholePod(t *testing.T) {
	whole := func(cpu string) *corev1.Pod {
		return pod(func(p *corev1.Pod) {
			list := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu)}
			p.Spec.Resources = &corev1.ResourceRequirements{Requests: list, Limits: list}
		})
	}
	small, large := whole("1"), whole("2")
	large.Status = status(small, seen(running("c", 0), limited(small)))
	show := func(s corev1.PodStatus) string {
		return s.AllocatedResources.Cpu().String() + " " + s.Resources.Limits.Cpu().String()
	}
	if got := show(large.Status); got != "1 1" {
		t.Errorf("before: %s", got)
	}
	if got := show(status(large, seen(running("c", 0), limited(small)))); got != "2 1" {
		t.Errorf("on the way: %s", got)
	}
	if got := show(status(large, seen(running("c", 0), limited(large)))); got != "2 2" {
		t.Errorf("after: %s", got)
	}
	if s := status(pod(), seen()); s.Resources != nil || s.AllocatedResources != nil {
		t.Errorf("a pod without: %v %v", s.Resources, s.AllocatedResources)
	}
}
