// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
)

func TestEvictedPodFails(t *testing.T) {
	h := newHost()
	b := newBench(t, h, fake.NewClientset())
	p := pod()
	p.Spec.NodeName = "n"
	if _, err := b.client.CoreV1().Pods("ns").Create(context.Background(), p, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.until("it runs", func() bool { return b.get("p").Status.Phase == corev1.PodRunning })
	b.set.Evict("uid", "it is too big. ")
	b.set.Evict("uid", "and again")
	b.until("it has failed", func() bool { return b.get("p").Status.Phase == corev1.PodFailed })
	s := b.get("p").Status
	if s.Reason != "Evicted" || s.Message != "it is too big. " {
		t.Errorf("reason %q, message %q", s.Reason, s.Message)
	}
	disrupted := false
	for _, c := range s.Conditions {
		disrupted = disrupted || c.Type == corev1.DisruptionTarget && c.Status == corev1.ConditionTrue && c.Reason == "TerminationByKubelet" && c.Message == s.Message
	}
	if !disrupted {
		t.Errorf("conditions %+v", s.Conditions)
	}
	b.until("nothing of it is mounted", func() bool { return !mounts{h}.Present("uid") && !boxes{h}.has("uid") })
	h.mu.Lock()
	for id, grace := range h.grace {
		if grace > minGrace {
			t.Errorf("container %s gets %s", id, grace)
		}
	}
	h.mu.Unlock()
	told := 0
	for len(b.events.Events) > 0 {
		if strings.Contains(<-b.events.Events, "Evicted") {
			told++
		}
	}
	if told != 1 {
		t.Errorf("told %d times", told)
	}
}

// Pods that end for the machine's sake get no more than their group's grace, say why, and nobody comes in their stead.
func TestTerminate(t *testing.T) {
	h := newHost()
	b := newBench(t, h, fake.NewClientset())
	b.create(pod(named("patient"), main("c")))
	b.create(pod(named("quick"), main("c"), grace(2)))
	b.until("they are ready", func() bool { return ready(b.get("patient")) && ready(b.get("quick")) })
	b.set.Close(true)
	uids := []types.UID{"uid-patient", "uid-quick", "uid-unknown"}
	for _, uid := range uids {
		b.set.Terminate(uid, 7*time.Second)
	}
	if err := b.set.Await(context.Background(), uids); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"patient", "quick"} {
		s := b.get(name).Status
		if s.Phase != corev1.PodFailed || s.Reason != "Terminated" || s.Message != "Pod was terminated in response to imminent node shutdown." {
			t.Errorf("%s: %s %s %q", name, s.Phase, s.Reason, s.Message)
		}
	}
	h.mu.Lock()
	patient, quick := h.grace["uid-patient-c-0"], h.grace["uid-quick-c-0"]
	h.mu.Unlock()
	if patient > 7*time.Second || patient < 2*time.Second || quick > 2*time.Second {
		t.Errorf("grace %s and %s", patient, quick)
	}
	b.create(pod(named("late"), main("c")))
	b.until("another is refused", func() bool { return b.get("late").Status.Reason == "NodeShutdown" })
	b.set.Close(false)
	b.create(pod(named("later"), main("c")))
	b.until("and then one is taken", func() bool { return ready(b.get("later")) })
}

func grace(seconds int64) podOpt {
	return func(p *corev1.Pod) { p.Spec.TerminationGracePeriodSeconds = &seconds }
}

// Who waits for a pod that does not end gives up with its context.
func TestAwaitGivesUp(t *testing.T) {
	h := newHost()
	release := make(chan struct{})
	h.release["uid-p-c-0"] = release
	b := newBench(t, h, fake.NewClientset())
	b.create(pod(named("p"), main("c")))
	b.until("it is ready", func() bool { return ready(b.get("p")) })
	b.set.Terminate("uid-p", time.Minute)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := b.set.Await(ctx, []types.UID{"uid-p"}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	close(release)
	if err := b.set.Await(context.Background(), []types.UID{"uid-p"}); err != nil {
		t.Error(err)
	}
}
