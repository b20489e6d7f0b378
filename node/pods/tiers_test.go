// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"testing"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/client-go/kubernetes/fake"
)

func asking(cpu string) podOpt {
	return main("c", func(c *corev1.Container) {
		c.Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu)}
	})
}

func TestBurstableShares(t *testing.T) {
	guaranteed := pod(main("c", func(c *corev1.Container) {
		c.Resources.Limits = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("1Gi")}
		c.Resources.Requests = c.Resources.Limits
	}))
	memory := pod(main("c", func(c *corev1.Container) {
		c.Resources.Requests = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("1Gi")}
	}))
	whole := pod(func(p *corev1.Pod) {
		p.Spec.Resources = &corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("2")}}
	})
	for name, c := range map[string]struct {
		pods []*corev1.Pod
		want uint64
	}{
		"nobody":                     {nil, 2},
		"other classes do not count": {[]*corev1.Pod{guaranteed, pod()}, 2},
		"one that asks for memory":   {[]*corev1.Pod{memory}, 2},
		"the sum":                    {[]*corev1.Pod{pod(asking("500m")), pod(asking("1")), guaranteed, pod()}, 1536},
		"what a pod asks as a whole": {[]*corev1.Pod{whole}, 2048},
		"as much as there may be":    {[]*corev1.Pod{pod(asking("1000"))}, 262144},
	} {
		if got := burstableShares(c.pods); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

// The weight of burstable pods follows those that are there, once all of them are known.
func TestWeightFollowsPods(t *testing.T) {
	defer goleak.VerifyNone(t)
	h := newHost()
	b := newBench(t, h, fake.NewClientset())
	defer b.stop()
	weighs := func(what string, want uint64) {
		t.Helper()
		b.until(what, func() bool { h.mu.Lock(); defer h.mu.Unlock(); return h.burstable == want })
	}
	b.set.cfg.Allocatable = corev1.ResourceList{corev1.ResourcePods: resource.MustParse("10"), corev1.ResourceCPU: resource.MustParse("4")}
	b.create(pod(named("a"), asking("500m")))
	b.until("the pod is ready", func() bool { return ready(b.get("a")) })
	h.mu.Lock()
	if h.burstable != 0 {
		t.Errorf("weight %d before all pods are known", h.burstable)
	}
	h.mu.Unlock()
	if err := b.set.Prune(context.Background()); err != nil {
		t.Fatal(err)
	}
	weighs("the first counts", 512)
	b.create(pod(named("b"), asking("1"), policy(corev1.RestartPolicyNever)))
	weighs("both count", 1536)
	b.until("the second is ready", func() bool { return ready(b.get("b")) })
	b.host.end("uid-b-c-0", 0)
	weighs("one that is over does not", 512)
	b.mark("a", deleting(0))
	weighs("nor one that is gone", 2)
}
