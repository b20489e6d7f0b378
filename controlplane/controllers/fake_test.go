// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"skep.io/skep/controlplane/controllers/nodelifecycle"
	"skep.io/skep/controlplane/controllers/podgc"
)

// fakeCluster is skep's own controllers against client-go's object tracker, which knows neither names nor
// versions nor UIDs by itself.
type fakeCluster struct {
	*cluster
	// created counts pods that were created.
	created atomic.Int32
	// podEvents holds the pod watch back while it is locked.
	podEvents sync.RWMutex
	// watched are kinds whose watch is open: what is created between list and watch is lost to a fake.
	watched sync.Map
	metrics *prometheus.Registry
	fake    *fake.Clientset
}

func newFakeCluster(t *testing.T, entries []entry, timing nodelifecycle.Timing, objects ...runtime.Object) *fakeCluster {
	t.Helper()
	client := fake.NewClientset(objects...)
	f := &fakeCluster{cluster: &cluster{T: t, client: client}, metrics: prometheus.NewRegistry(), fake: client}
	var serial atomic.Int64
	identify := func(action clienttesting.Action) (bool, runtime.Object, error) {
		create, ok := action.(clienttesting.CreateAction)
		if !ok || action.GetSubresource() != "" {
			return false, nil, nil
		}
		obj, err := meta.Accessor(create.GetObject())
		if err != nil {
			return false, nil, nil
		}
		n := serial.Add(1)
		if obj.GetName() == "" {
			obj.SetName(obj.GetGenerateName() + strconv.FormatInt(n, 10))
		}
		obj.SetUID(types.UID(fmt.Sprint("uid-", n)))
		obj.SetCreationTimestamp(metav1.Now())
		if action.GetResource().Resource == "pods" {
			f.created.Add(1)
		}
		return false, nil, nil
	}
	client.PrependReactor("create", "*", identify)
	client.PrependWatchReactor("*", func(action clienttesting.Action) (bool, watch.Interface, error) {
		w, err := client.Tracker().Watch(action.GetResource(), action.GetNamespace())
		if err != nil {
			return true, nil, err
		}
		f.watched.Store(action.GetResource().Resource, true)
		return true, watch.Filter(w, func(e watch.Event) (watch.Event, bool) {
			if action.GetResource().Resource == "pods" {
				f.podEvents.RLock()
				defer f.podEvents.RUnlock()
			}
			e.Object = e.Object.DeepCopyObject()
			if obj, err := meta.Accessor(e.Object); err == nil {
				obj.SetResourceVersion(strconv.FormatInt(serial.Add(1), 10))
			}
			return e, true
		}), nil
	})

	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	cfg := Config{
		Client: client, Informers: informers.NewSharedInformerFactory(client, 0), Log: slog.New(slog.DiscardHandler), Metrics: f.metrics, NodeTiming: timing,
		ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")},
	}.withDefaults()
	go func() { done <- runEntries(ctx, cfg, entries) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("controllers: %v", err)
		}
	})
	f.eventually("watches to open", func(context.Context) error {
		kinds := []string{"pods", "nodes"}
		if len(entries) > 1 {
			kinds = append(kinds, "replicasets", "deployments", "daemonsets", "statefulsets", "controllerrevisions", "services", "endpointslices", "leases")
		}
		for _, kind := range kinds {
			if _, ok := f.watched.Load(kind); !ok {
				return fmt.Errorf("nobody watches %s", kind)
			}
		}
		return nil
	})
	return f
}

// syncs is how often a controller has synced anything, by its metric.
func (f *fakeCluster) syncs(controller string) (n uint64) {
	f.Helper()
	families, err := f.metrics.Gather()
	if err != nil {
		f.Fatal(err)
	}
	for _, family := range families {
		for _, m := range family.Metric {
			for _, l := range m.Label {
				if l.GetName() == "controller" && l.GetValue() == controller && m.Histogram != nil {
					n += m.Histogram.GetSampleCount()
				}
			}
		}
	}
	return n
}

func (f *fakeCluster) pods() []corev1.Pod {
	f.Helper()
	pods, err := f.client.CoreV1().Pods("ns").List(f.Context(), metav1.ListOptions{})
	if err != nil {
		f.Fatal(err)
	}
	return pods.Items
}

// A ReplicaSet that is looked at again and again, while the cache has not seen its pods yet, creates none twice.
func TestNoPodTwiceWhileTheCacheIsBehind(t *testing.T) {
	f := newFakeCluster(t, own(), nodelifecycle.DefaultTiming)
	ctx := t.Context()
	f.podEvents.Lock()
	replicas := int32(5)
	labels := map[string]string{"app": "web"}
	rs, err := f.client.AppsV1().ReplicaSets("ns").Create(ctx, &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"},
		Spec: appsv1.ReplicaSetSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	f.eventually("five pods", func(context.Context) error {
		if n := f.created.Load(); n != 5 {
			return fmt.Errorf("%d pods were created", n)
		}
		return nil
	})
	// Each of these makes the controller look again.
	for i := range 10 {
		before := f.syncs("replicaset")
		cur, err := f.client.AppsV1().ReplicaSets("ns").Get(ctx, rs.Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		cur.Annotations = map[string]string{"look": fmt.Sprint(i)}
		if _, err = f.client.AppsV1().ReplicaSets("ns").Update(ctx, cur, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		f.eventually("another look", func(context.Context) error {
			if f.syncs("replicaset") == before {
				return fmt.Errorf("the replica set was synced %d times", before)
			}
			return nil
		})
	}
	if n := f.created.Load(); n != 5 {
		t.Errorf("%d pods were created while the cache was behind", n)
	}
	f.podEvents.Unlock()
	f.eventually("status", func(ctx context.Context) error {
		cur, err := f.client.AppsV1().ReplicaSets("ns").Get(ctx, rs.Name, metav1.GetOptions{})
		if err == nil && cur.Status.Replicas != 5 {
			return fmt.Errorf("replicas %d", cur.Status.Replicas)
		}
		return err
	})
	if n := f.created.Load(); n != 5 {
		t.Errorf("%d pods were created in the end", n)
	}

	// A pod that loses its label is released and replaced; one that gains it is adopted and another goes.
	lost := f.pods()[0]
	lost.Labels = map[string]string{"app": "debug"}
	if _, err := f.client.CoreV1().Pods("ns").Update(ctx, &lost, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	f.eventually("release and replacement", func(ctx context.Context) error {
		pods, owned := f.pods(), 0
		for _, p := range pods {
			if metav1.IsControlledBy(&p, rs) {
				owned++
			}
			if p.Name == lost.Name && len(p.OwnerReferences) != 0 {
				return fmt.Errorf("pod %s still has an owner", p.Name)
			}
		}
		if len(pods) != 6 || owned != 5 {
			return fmt.Errorf("%d pods, %d owned", len(pods), owned)
		}
		return nil
	})
	orphan, err := f.client.CoreV1().Pods("ns").Get(ctx, lost.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	orphan.Labels = labels
	if _, err := f.client.CoreV1().Pods("ns").Update(ctx, orphan, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	f.eventually("adoption", func(ctx context.Context) error {
		pods := f.pods()
		for _, p := range pods {
			if !metav1.IsControlledBy(&p, rs) {
				return fmt.Errorf("pod %s has no owner", p.Name)
			}
		}
		if len(pods) != 5 {
			return fmt.Errorf("%d pods", len(pods))
		}
		return nil
	})
}

// A node that falls silent becomes Unknown and tainted, its pods unready and their addresses not ready; when its
// lease comes back and it reports, all of that is undone.
func TestSilentNode(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "p", Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{NodeName: "silent"},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIP: "10.42.0.2", PodIPs: []corev1.PodIP{{IP: "10.42.0.2"}},
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
		},
	}
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "s"},
		Spec: corev1.ServiceSpec{
			Selector: pod.Labels, ClusterIP: "10.43.0.9", IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(80)}},
		},
	}
	f := newFakeCluster(t, own(), nodelifecycle.Timing{Grace: time.Second, StartupGrace: time.Second}, readyNode("silent"), readyNode("lively"), pod, service)
	ctx := t.Context()

	// The other node renews its lease all the time, from another goroutine than the test's.
	leases := f.client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	lease, err := leases.Create(ctx, &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Namespace: corev1.NamespaceNodeLease, Name: "lively"},
		Spec:       coordinationv1.LeaseSpec{RenewTime: &metav1.MicroTime{Time: time.Now()}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for tick := time.NewTicker(50 * time.Millisecond); ; {
			select {
			case <-ctx.Done():
				tick.Stop()
				return
			case now := <-tick.C:
				renewed := lease.DeepCopy()
				renewed.Spec.RenewTime = &metav1.MicroTime{Time: now}
				if _, err := leases.Update(ctx, renewed, metav1.UpdateOptions{}); err != nil && ctx.Err() == nil {
					t.Errorf("renew: %v", err)
				}
			}
		}
	}()

	readyAddresses := func(ctx context.Context) (int, error) {
		slices, err := f.client.DiscoveryV1().EndpointSlices("ns").List(ctx, metav1.ListOptions{})
		n := 0
		for _, slice := range slices.Items {
			for _, e := range slice.Endpoints {
				if *e.Conditions.Ready {
					n++
				}
			}
		}
		return n, err
	}
	f.eventually("the pod to be published", func(ctx context.Context) error {
		if n, err := readyAddresses(ctx); err != nil || n != 1 {
			return fmt.Errorf("%d ready addresses, %w", n, err)
		}
		return nil
	})
	f.eventually("the node to be given up", func(ctx context.Context) error {
		n, err := f.client.CoreV1().Nodes().Get(ctx, "silent", metav1.GetOptions{})
		if err != nil {
			return err
		}
		var taints []string
		for _, taint := range n.Spec.Taints {
			taints = append(taints, taint.Key+":"+string(taint.Effect))
		}
		if got := strings.Join(taints, " "); got != "node.kubernetes.io/unreachable:NoSchedule node.kubernetes.io/unreachable:NoExecute" {
			return fmt.Errorf("taints %s, conditions %v", got, n.Status.Conditions)
		}
		if n, err := readyAddresses(ctx); err != nil || n != 0 {
			return fmt.Errorf("%d ready addresses, %w", n, err)
		}
		return nil
	})
	lively, err := f.client.CoreV1().Nodes().Get(ctx, "lively", metav1.GetOptions{})
	if err != nil || len(lively.Spec.Taints) != 0 || lively.Status.Conditions[0].Status != corev1.ConditionTrue {
		t.Errorf("the other node suffers: %+v %v", lively, err)
	}

	back, err := f.client.CoreV1().Nodes().Get(ctx, "silent", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range back.Status.Conditions {
		if c := &back.Status.Conditions[i]; c.Type == corev1.NodeReady {
			c.Status, c.LastHeartbeatTime = corev1.ConditionTrue, metav1.Now()
		}
	}
	if _, err := f.client.CoreV1().Nodes().UpdateStatus(ctx, back, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	f.eventually("the node to be well", func(ctx context.Context) error {
		n, err := f.client.CoreV1().Nodes().Get(ctx, "silent", metav1.GetOptions{})
		if err == nil && len(n.Spec.Taints) != 0 {
			return fmt.Errorf("taints %v", n.Spec.Taints)
		}
		return err
	})
}

func TestRunSaysWhatIsMissing(t *testing.T) {
	err := Run(t.Context(), Config{})
	for _, want := range []string{"Client", "RESTConfig", "Informers", "ClusterCIDRs", "ServiceCIDRs"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not name %s", err, want)
		}
	}
}

// When one controller dies, cannot be made, or ends by itself, all end and the error names it.
func TestDeath(t *testing.T) {
	patient := entry{"patient", "", func(context.Context, env) (run, error) {
		return func(ctx context.Context) error { <-ctx.Done(); return nil }, nil
	}}
	for what, bad := range map[string]func(context.Context, env) (run, error){
		"boom": func(context.Context, env) (run, error) {
			return func(context.Context) error { return fmt.Errorf("boom") }, nil
		},
		"cannot be made": func(context.Context, env) (run, error) { return nil, fmt.Errorf("cannot be made") },
		"nobody stopped": func(context.Context, env) (run, error) {
			return func(context.Context) error { return nil }, nil
		},
	} {
		client := fake.NewClientset()
		err := runEntries(t.Context(), Config{Client: client, Informers: informers.NewSharedInformerFactory(client, 0)}.withDefaults(),
			[]entry{patient, {"ill", "", bad}, patient})
		if err == nil || !strings.Contains(err.Error(), "controller ill") || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: error %v", what, err)
		}
	}
}

// Pods whose node is gone are marked failed and deleted after the quarantine; so are ended ones beyond the number.
func TestGarbage(t *testing.T) {
	pod := func(name, node string, phase corev1.PodPhase, age time.Duration) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), CreationTimestamp: metav1.NewTime(time.Now().Add(-age))},
			Spec:       corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: phase},
		}
	}
	var failed sync.Map
	entries := []entry{{"podgc", "", func(_ context.Context, e env) (run, error) {
		return started(podgc.New(e.deps, 1, 100*time.Millisecond))
	}}}
	f := newFakeCluster(t, entries, nodelifecycle.DefaultTiming,
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n2"}},
		pod("stays", "n1", corev1.PodRunning, time.Hour), pod("goes", "n2", corev1.PodRunning, time.Hour),
		pod("old", "n1", corev1.PodSucceeded, time.Hour), pod("new", "n1", corev1.PodFailed, time.Minute))
	f.fake.PrependReactor("patch", "pods", func(action clienttesting.Action) (bool, runtime.Object, error) {
		if patch, ok := action.(clienttesting.PatchAction); ok && patch.GetSubresource() == "status" {
			failed.Store(patch.GetName(), string(patch.GetPatch()))
		}
		return false, nil, nil
	})
	names := func() string {
		var names []string
		for _, p := range f.pods() {
			names = append(names, p.Name)
		}
		slices.Sort(names)
		return strings.Join(names, " ")
	}
	wait := func(want string) {
		f.eventually(want, func(context.Context) error {
			if got := names(); got != want {
				return fmt.Errorf("pods %s", got)
			}
			return nil
		})
	}
	wait("goes new stays")
	if err := f.client.CoreV1().Nodes().Delete(t.Context(), "n2", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	wait("new stays")
	patch, _ := failed.Load("goes")
	if text, _ := patch.(string); !strings.Contains(text, `"phase":"Failed"`) || !strings.Contains(text, "DeletionByPodGC") {
		t.Errorf("status patch %v", patch)
	}
}
