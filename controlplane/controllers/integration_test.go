// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	runtimeapi "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/kubectl/pkg/polymorphichelpers"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/apiserver"
	"skep.io/skep/controlplane/controllers/nodelifecycle"
	"skep.io/skep/controlplane/pki"
	"skep.io/skep/controlplane/store"
)

// generous bounds waits for events that take milliseconds on an idle machine.
const generous = 4 * time.Minute

// cluster is a real API server in this process with every controller running against it.
type cluster struct {
	*testing.T
	client kubernetes.Interface
	// before is the live heap and the goroutines without the controllers.
	before usage
}

type usage struct {
	heap       int64 // bytes
	goroutines int
}

func measure() usage {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return usage{int64(m.HeapAlloc), runtime.NumGoroutine()}
}

// heapBudget is what all controllers together may keep of an empty cluster; they keep 15.5 MB. Most of it
// belongs to informers, and to their watches on the server's side, which run in this process too.
const heapBudget = 20 << 20

func newCluster(t *testing.T) *cluster {
	t.Helper()
	level := slog.LevelWarn
	if testing.Verbose() {
		level = slog.LevelInfo
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	quiet := slog.New(slog.DiscardHandler)
	dir := t.TempDir()
	st, err := store.Open(t.Context(), store.Config{DataDir: dir, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	ca, err := pki.Open(filepath.Join(dir, "pki"))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serviceCIDRs := []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16"), netip.MustParsePrefix("fd73:6b65:7043::/112")}
	server, err := apiserver.New(t.Context(), apiserver.Config{
		Store: st, PKI: ca, Listener: l, AdvertiseAddress: net.IPv4(192, 0, 2, 1), ServiceCIDRs: serviceCIDRs, Log: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	serverCtx, stopServer := context.WithCancel(context.Background())
	serverDone := make(chan error, 1)
	go func() { serverDone <- server.Run(serverCtx) }()
	t.Cleanup(func() {
		stopServer()
		if err := <-serverDone; err != nil {
			t.Errorf("API server: %v", err)
		}
		if err := st.Close(); err != nil {
			t.Errorf("store: %v", err)
		}
	})
	select {
	case <-server.Ready():
	case err := <-serverDone:
		t.Fatalf("API server ended: %v", err)
	case <-time.After(generous):
		t.Fatal("API server is not ready")
	}

	key, err := os.ReadFile(ca.ServiceAccountKeyFile())
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{T: t, client: kubernetes.NewForConfigOrDie(unlimited(server.ClientConfig("test-admin", "system:masters")))}
	c.before = measure()
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Config{
			Client:       c.client,
			RESTConfig:   func(user string) *rest.Config { return server.ClientConfig(user) },
			Informers:    informers.NewSharedInformerFactory(c.client, 0),
			ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd73:6b65:7042::/48")},
			ServiceCIDRs: serviceCIDRs, RootCA: ca.CAPEM(), ServiceAccountKey: key, Log: log,
			// No agent renews these nodes' leases, however long a test takes.
			NodeTiming: nodelifecycle.Timing{Grace: time.Hour, StartupGrace: time.Hour},
		})
	}()
	t.Cleanup(func() {
		stop()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("controllers: %v", err)
			}
		case <-time.After(generous):
			t.Error("controllers do not stop")
		}
	})
	return c
}

func unlimited(config *rest.Config) *rest.Config {
	config.QPS = -1
	return config
}

// eventually waits until check returns nil.
func (c *cluster) eventually(what string, check func(ctx context.Context) error) {
	c.Helper()
	ctx, cancel := context.WithTimeout(c.Context(), generous)
	defer cancel()
	start := time.Now()
	for {
		err := check(ctx)
		if err == nil {
			c.Logf("%s: %v", what, time.Since(start).Round(time.Millisecond))
			return
		}
		select {
		case <-ctx.Done():
			c.Fatalf("%s: %v", what, err)
		case <-time.After(25 * time.Millisecond):
		}
	}
}

func (c *cluster) addNode(name string) {
	c.Helper()
	ctx := c.Context()
	_, err := c.client.CoreV1().Nodes().Create(ctx, &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelTopologyZone: "z1", corev1.LabelOSStable: "linux"}},
		Status:     corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastHeartbeatTime: metav1.Now()}}},
	}, metav1.CreateOptions{})
	if err != nil {
		c.Fatal(err)
	}
	c.eventually("pod ranges, labels and taints of the node", func(ctx context.Context) error {
		node, err := c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		switch {
		case err != nil:
			return err
		case len(node.Spec.PodCIDRs) != 2 || node.Spec.PodCIDR != "10.42.0.0/24" || node.Spec.PodCIDRs[1] != "fd73:6b65:7042::/64":
			return fmt.Errorf("podCIDRs %v", node.Spec.PodCIDRs)
		case node.Labels["beta.kubernetes.io/os"] != "linux":
			return fmt.Errorf("labels %v", node.Labels)
		case len(node.Spec.Taints) != 0:
			return fmt.Errorf("taints %v", node.Spec.Taints)
		}
		return nil
	})
}

// TestCluster walks through what people do with a cluster, with the API server's real validation, defaulting,
// admission and authorization.
func TestCluster(t *testing.T) {
	c := newCluster(t)
	t.Run("bootstrap", func(*testing.T) { c.checkBootstrap() })
	c.addNode("n1")
	c.checkBudget()
	c.kubelet("n1")

	const ns = "shop"
	ctx := t.Context()
	if _, err := c.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("service account and root certificate", func(ctx context.Context) error {
		if _, err := c.client.CoreV1().ServiceAccounts(ns).Get(ctx, "default", metav1.GetOptions{}); err != nil {
			return err
		}
		_, err := c.client.CoreV1().ConfigMaps(ns).Get(ctx, "kube-root-ca.crt", metav1.GetOptions{})
		return err
	})
	c.createApp(ns)
	c.waitComplete(ns, "1", "app:1")
	c.waitSlices(ns, 3)

	c.updateApp(ns, func(d *appsv1.Deployment) { d.Spec.Template.Spec.Containers[0].Image = "app:2" })
	c.waitComplete(ns, "2", "app:2")
	c.waitSlices(ns, 3)

	c.undo(ns)
	c.waitComplete(ns, "3", "app:1")

	c.updateApp(ns, func(d *appsv1.Deployment) { *d.Spec.Replicas = 5 })
	c.waitComplete(ns, "3", "app:1")
	c.waitSlices(ns, 5)
	c.checkEvents(ns,
		"deployment-controller ScalingReplicaSet Scaled up replica set web-", "from 0 to 3", "from 3 to 5",
		"deployment-controller ScalingReplicaSet Scaled down replica set web-",
		"replicaset-controller SuccessfulCreate Created pod: web-",
		"replicaset-controller SuccessfulDelete Deleted pod: web-")
	c.checkToken(ns)
	c.checkAggregation()

	c.deleteOnePod(ns)
	c.waitSlices(ns, 5)

	if err := c.client.AppsV1().Deployments(ns).Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("what the deployment owned to go", func(ctx context.Context) error {
		pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		if err == nil && len(pods.Items) > 0 {
			return fmt.Errorf("%d pods are left", len(pods.Items))
		}
		return err
	})
	c.waitSlices(ns, 0)

	if err := c.client.CoreV1().Namespaces().Delete(ctx, ns, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("namespace to go", func(ctx context.Context) error {
		got, err := c.client.CoreV1().Namespaces().Get(ctx, ns, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("namespace is still there: %v %w", got.Status, err)
	})
}

func (c *cluster) checkBudget() {
	c.Helper()
	now := measure()
	grown := usage{now.heap - c.before.heap, now.goroutines - c.before.goroutines}
	c.Logf("controllers keep %.1f MB and %d goroutines", float64(grown.heap)/(1<<20), grown.goroutines)
	if grown.heap > heapBudget {
		c.Errorf("controllers keep %d MB of live heap, the budget is %d", grown.heap>>20, heapBudget>>20)
	}
}

func (c *cluster) checkBootstrap() {
	c.eventually("DNS service and ingress class", func(ctx context.Context) error {
		dns, err := c.client.CoreV1().Services("kube-system").Get(ctx, api.DNSServiceName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if got := strings.Join(dns.Spec.ClusterIPs, " "); got != "10.43.0.10 fd73:6b65:7043::a" {
			return fmt.Errorf("cluster IPs %s", got)
		}
		_, err = c.client.NetworkingV1().IngressClasses().Get(ctx, api.IngressClassName, metav1.GetOptions{})
		return err
	})
	// Deleted, it comes back at once with the same addresses, time and again.
	for range 10 {
		c.deleteDNS()
	}
}

func (c *cluster) deleteDNS() {
	c.Helper()
	if err := c.client.CoreV1().Services("kube-system").Delete(c.Context(), api.DNSServiceName, metav1.DeleteOptions{}); err != nil {
		c.Fatal(err)
	}
	c.eventually("DNS service to come back", func(ctx context.Context) error {
		dns, err := c.client.CoreV1().Services("kube-system").Get(ctx, api.DNSServiceName, metav1.GetOptions{})
		if err == nil && dns.Spec.ClusterIP != "10.43.0.10" {
			return fmt.Errorf("cluster IP %s", dns.Spec.ClusterIP)
		}
		return err
	})
}

func (c *cluster) createApp(ns string) {
	c.Helper()
	labels := map[string]string{"app": "web"}
	replicas := int32(3)
	_, err := c.client.AppsV1().Deployments(ns).Create(c.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas,
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{Containers: []corev1.Container{{
					Name: "web", Image: "app:1", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
				}}},
			},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		c.Fatal(err)
	}
	policy := corev1.IPFamilyPolicyPreferDualStack
	_, err = c.client.CoreV1().Services(ns).Create(c.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: corev1.ServiceSpec{
			Selector: labels, IPFamilyPolicy: &policy,
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("http")}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		c.Fatal(err)
	}
}

func (c *cluster) updateApp(ns string, change func(*appsv1.Deployment)) {
	c.Helper()
	c.eventually("update of the deployment", func(ctx context.Context) error {
		d, err := c.client.AppsV1().Deployments(ns).Get(ctx, "web", metav1.GetOptions{})
		if err != nil {
			return err
		}
		change(d)
		_, err = c.client.AppsV1().Deployments(ns).Update(ctx, d, metav1.UpdateOptions{})
		return err
	})
}

// waitComplete asks what `kubectl rollout status` asks.
func (c *cluster) waitComplete(ns, revision, image string) {
	c.Helper()
	c.eventually("rollout of "+image, func(ctx context.Context) error {
		d, err := c.client.AppsV1().Deployments(ns).Get(ctx, "web", metav1.GetOptions{})
		if err != nil {
			return err
		}
		n := *d.Spec.Replicas
		s := d.Status
		if s.ObservedGeneration < d.Generation || s.UpdatedReplicas != n || s.Replicas != n || s.AvailableReplicas != n || s.UnavailableReplicas != 0 {
			return fmt.Errorf("status %+v", s)
		}
		if got := d.Annotations["deployment.kubernetes.io/revision"]; got != revision {
			return fmt.Errorf("revision %s, want %s", got, revision)
		}
		pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
		if err != nil {
			return err
		}
		for _, pod := range pods.Items {
			if pod.DeletionTimestamp == nil && pod.Spec.Containers[0].Image != image {
				return fmt.Errorf("pod %s still runs %s", pod.Name, pod.Spec.Containers[0].Image)
			}
		}
		return nil
	})
}

func (c *cluster) waitSlices(ns string, want int) {
	c.Helper()
	c.eventually("endpoint slices", func(ctx context.Context) error {
		slices, err := c.client.DiscoveryV1().EndpointSlices(ns).List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=web"})
		if err != nil {
			return err
		}
		ready := map[discoveryv1.AddressType]int{}
		for _, slice := range slices.Items {
			for _, e := range slice.Endpoints {
				if *e.Conditions.Ready && *e.Zone == "z1" && *e.NodeName == "n1" && *slice.Ports[0].Port == 8080 {
					ready[slice.AddressType]++
				}
			}
		}
		if ready[discoveryv1.AddressTypeIPv4] != want || ready[discoveryv1.AddressTypeIPv6] != want {
			return fmt.Errorf("ready endpoints %v, want %d in each family", ready, want)
		}
		endpoints, err := c.client.CoreV1().Endpoints(ns).Get(ctx, "web", metav1.GetOptions{}) //lint:ignore SA1019 people still read it
		if err != nil {
			return err
		}
		if want > 0 && len(endpoints.Subsets) != 1 || want == 0 && len(endpoints.Subsets) != 0 {
			return fmt.Errorf("legacy endpoints %v", endpoints.Subsets)
		}
		if want > 0 && len(endpoints.Subsets[0].Addresses) != want {
			return fmt.Errorf("legacy endpoints %v", endpoints.Subsets)
		}
		return nil
	})
}

// undo rolls the Deployment back.
func (c *cluster) undo(ns string) {
	c.Helper()
	d, err := c.client.AppsV1().Deployments(ns).Get(c.Context(), "web", metav1.GetOptions{})
	if err != nil {
		c.Fatal(err)
	}
	c.rollBack("Deployment", d)
}

// rollBack runs kubectl's own code. The object, of a kind of the group apps, must have its revisions 1 and 2.
func (c *cluster) rollBack(kind string, obj interface {
	runtimeapi.Object
	metav1.Object
}) {
	c.Helper()
	gk := schema.GroupKind{Group: "apps", Kind: kind}
	history, err := polymorphichelpers.HistoryViewerFor(gk, c.client)
	if err != nil {
		c.Fatal(err)
	}
	if text, err := history.ViewHistory(obj.GetNamespace(), obj.GetName(), 0); err != nil || !strings.Contains(text, "1 ") || !strings.Contains(text, "2 ") {
		c.Errorf("history %q: %v", text, err)
	}
	rollbacker, err := polymorphichelpers.RollbackerFor(gk, c.client)
	if err != nil {
		c.Fatal(err)
	}
	if _, err := rollbacker.Rollback(obj, nil, 0, 0); err != nil {
		c.Fatal(err)
	}
}

// isRolledOut asks what `kubectl rollout status` asks.
func isRolledOut(kind string, obj any) error {
	viewer, err := polymorphichelpers.StatusViewerFor(schema.GroupKind{Group: "apps", Kind: kind})
	if err != nil {
		return err
	}
	fields, err := runtimeapi.DefaultUnstructuredConverter.ToUnstructured(obj)
	if err != nil {
		return err
	}
	text, done, err := viewer.Status(&unstructured.Unstructured{Object: fields}, 0)
	if err == nil && !done {
		return errors.New(text)
	}
	return err
}

func (c *cluster) checkEvents(ns string, wanted ...string) {
	c.Helper()
	c.eventually("events", func(ctx context.Context) error {
		events, err := c.client.CoreV1().Events(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		var all []string
		for _, e := range events.Items {
			all = append(all, e.Source.Component+" "+e.Reason+" "+e.Message)
		}
		text := strings.Join(all, "\n")
		for _, want := range wanted {
			if !strings.Contains(text, want) {
				return fmt.Errorf("no event says %q in:\n%s", want, text)
			}
		}
		return nil
	})
}

func (c *cluster) checkToken(ns string) {
	c.Helper()
	_, err := c.client.CoreV1().Secrets(ns).Create(c.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "t", Annotations: map[string]string{corev1.ServiceAccountNameKey: "default"}},
		Type:       corev1.SecretTypeServiceAccountToken,
	}, metav1.CreateOptions{})
	if err != nil {
		c.Fatal(err)
	}
	c.eventually("token", func(ctx context.Context) error {
		secret, err := c.client.CoreV1().Secrets(ns).Get(ctx, "t", metav1.GetOptions{})
		if err == nil && len(secret.Data[corev1.ServiceAccountTokenKey]) == 0 {
			return fmt.Errorf("secret has no token")
		}
		return err
	})
}

func (c *cluster) checkAggregation() {
	c.Helper()
	c.eventually("cluster role view", func(ctx context.Context) error {
		view, err := c.client.RbacV1().ClusterRoles().Get(ctx, "view", metav1.GetOptions{})
		if err == nil && len(view.Rules) == 0 {
			return fmt.Errorf("view grants nothing")
		}
		return err
	})
}

func (c *cluster) deleteOnePod(ns string) {
	c.Helper()
	pods, err := c.client.CoreV1().Pods(ns).List(c.Context(), metav1.ListOptions{})
	if err != nil || len(pods.Items) == 0 {
		c.Fatal("no pods", err)
	}
	victim := pods.Items[0]
	if err := c.client.CoreV1().Pods(ns).Delete(c.Context(), victim.Name, metav1.DeleteOptions{}); err != nil {
		c.Fatal(err)
	}
	c.eventually("pod to be replaced", func(ctx context.Context) error {
		pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		seen := map[types.UID]bool{}
		for _, pod := range pods.Items {
			seen[pod.UID] = true
		}
		if seen[victim.UID] || len(seen) != 5 {
			return fmt.Errorf("pods %d, victim still there: %v", len(seen), seen[victim.UID])
		}
		return nil
	})
}
