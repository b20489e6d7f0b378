// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"skep.io/skep/api"
)

// address is the URL of the TLS port.
func (s *testServer) address() string { return s.host }

// withCert is a client that comes over TLS with a certificate of the cluster's CA.
func (s *testServer) withCert(t *testing.T, user string, groups ...string) kubernetes.Interface {
	t.Helper()
	cert, key, err := s.pki.IssueClient(user, groups)
	if err != nil {
		t.Fatal(err)
	}
	return kubernetes.NewForConfigOrDie(&rest.Config{Host: s.address(), TLSClientConfig: rest.TLSClientConfig{CAData: s.pki.CAPEM(), CertData: cert, KeyData: key}})
}

// testNodes is the Node authorizer and NodeRestriction: a node sees what its pods use, and no more.
func testNodes(t *testing.T, s *testServer) {
	ctx := t.Context()
	node := s.withCert(t, "system:node:n1", "system:nodes")
	if _, err := node.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}, metav1.CreateOptions{}); err != nil {
		t.Fatalf("a node registers: %v", err)
	}
	if _, err := node.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n2"}}, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a node registers another: %v", err)
	}
	for _, name := range []string{"used", "unused"} {
		if _, err := s.client.CoreV1().Secrets("default").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.client.CoreV1().ServiceAccounts("default").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: corev1.PodSpec{
		NodeName:   "n1",
		Containers: []corev1.Container{{Name: "c", Image: "i", SecurityContext: &corev1.SecurityContext{Privileged: new(true)}}},
		Volumes:    []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "used"}}}},
	}}
	created, err := s.client.CoreV1().Pods("default").Create(ctx, pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("privileged pod: %v", err)
	}
	if created.Spec.ServiceAccountName != "default" || len(created.Spec.Volumes) != 2 || created.Spec.Volumes[1].Projected == nil {
		t.Errorf("service-account admission: %+v", created.Spec.Volumes)
	}
	if len(created.Spec.Tolerations) != 2 {
		t.Errorf("default tolerations: %+v", created.Spec.Tolerations)
	}
	eventually(t, func() error {
		_, err := node.CoreV1().Secrets("default").Get(ctx, "used", metav1.GetOptions{})
		return err
	})
	if _, err := node.CoreV1().Secrets("default").Get(ctx, "unused", metav1.GetOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a node reads any secret: %v", err)
	}
	// What NetworkPolicies are about, a node sees everywhere; and only sees.
	if _, err := node.NetworkingV1().NetworkPolicies("").List(ctx, metav1.ListOptions{}); err != nil {
		t.Errorf("a node lists NetworkPolicies: %v", err)
	}
	if _, err := node.CoreV1().Namespaces().List(ctx, metav1.ListOptions{}); err != nil {
		t.Errorf("a node lists Namespaces: %v", err)
	}
	if _, err := node.CoreV1().Pods("").List(ctx, metav1.ListOptions{}); err != nil {
		t.Errorf("a node lists Pods: %v", err)
	}
	if err := node.NetworkingV1().NetworkPolicies("default").Delete(ctx, "any", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a node deletes a NetworkPolicy: %v", err)
	}
	if _, err := node.CoreV1().Secrets("").List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a node lists Secrets: %v", err)
	}
	// A token bound to its pod.
	tr, err := node.CoreV1().ServiceAccounts("default").CreateToken(ctx, "default", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: "p", UID: created.UID}}}, metav1.CreateOptions{})
	if err != nil || tr.Status.Token == "" {
		t.Errorf("token for a pod: %v", err)
	}
	if err := s.client.CoreV1().Pods("default").Delete(ctx, "p", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
		t.Fatal(err)
	}
}

// testParts is what skep's own parts may do: nobody but the administrator may do everything.
func testParts(t *testing.T, s *testServer) {
	ctx, core := t.Context(), s.client.CoreV1()
	as := func(name string, groups ...string) kubernetes.Interface {
		return kubernetes.NewForConfigOrDie(s.ClientConfig(name, groups...))
	}
	caches, ingress, bootstrap := as(api.InformersUser), as(api.IngressUser), as(api.BootstrapUser)
	if _, err := caches.CoreV1().Secrets("").List(ctx, metav1.ListOptions{}); err != nil {
		t.Errorf("the shared caches list Secrets: %v", err)
	}
	configMap := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "part"}}
	for who, client := range map[string]kubernetes.Interface{"the shared caches": caches, "ingress": ingress, "bootstrap": bootstrap} {
		if _, err := client.CoreV1().ConfigMaps("default").Create(ctx, configMap, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("%s write a ConfigMap: %v", who, err)
		}
	}
	for _, name := range []string{"served", "private"} {
		if _, err := core.Secrets("default").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	ing := &networkingv1.Ingress{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: networkingv1.IngressSpec{
		TLS:            []networkingv1.IngressTLS{{Hosts: []string{"a.example"}, SecretName: "served"}},
		DefaultBackend: &networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: "web", Port: networkingv1.ServiceBackendPort{Number: 80}}},
	}}
	ing, err := s.client.NetworkingV1().Ingresses("default").Create(ctx, ing, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// At once: whoever asks may have seen the Ingress before the server's own cache has.
	node := s.withCert(t, "system:node:n1", "system:nodes")
	for who, client := range map[string]kubernetes.Interface{"ingress": ingress, "a node": node} {
		secrets := client.CoreV1().Secrets("default")
		if _, err := secrets.List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=served"}); err != nil {
			t.Errorf("%s reads an Ingress's Secret: %v", who, err)
		}
		for _, selector := range []string{"", "metadata.name=private", "metadata.name!=private"} {
			if _, err := secrets.List(ctx, metav1.ListOptions{FieldSelector: selector}); !apierrors.IsForbidden(err) {
				t.Errorf("%s lists Secrets by %q: %v", who, selector, err)
			}
		}
		if err := secrets.Delete(ctx, "served", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("%s deletes an Ingress's Secret: %v", who, err)
		}
	}
	if _, err := as("somebody").CoreV1().Secrets("default").Get(ctx, "served", metav1.GetOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("somebody reads an Ingress's Secret: %v", err)
	}
	ing.Status.LoadBalancer.Ingress = []networkingv1.IngressLoadBalancerIngress{{IP: "192.0.2.1"}}
	if _, err := ingress.NetworkingV1().Ingresses("default").UpdateStatus(ctx, ing, metav1.UpdateOptions{}); err != nil {
		t.Errorf("ingress writes its status: %v", err)
	}
	// What no Ingress names any more is closed again.
	if err := s.client.NetworkingV1().Ingresses("default").Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if _, err := node.CoreV1().Secrets("default").Get(ctx, "served", metav1.GetOptions{}); !apierrors.IsForbidden(err) {
			return fmt.Errorf("a node reads a Secret that was an Ingress's: %w", err)
		}
		return nil
	})
}

// testLogs puts a node API behind a Node object and reads logs through the server: it must come
// with its own client certificate, to the InternalIP, and must refuse a certificate of another CA.
func testLogs(t *testing.T, s *testServer) {
	ctx := t.Context()
	var saw atomic.Value
	kubelet := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		saw.Store(r.TLS.PeerCertificates[0].Subject.CommonName + " " + r.URL.Path)
		fmt.Fprintln(w, "hello from the node")
	}))
	cert, key, err := s.pki.IssueServer("system:node:logs", []string{"127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	kubelet.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: s.pki.CAPool(), ClientAuth: tls.RequireAndVerifyClientCert}
	kubelet.StartTLS()
	defer kubelet.Close()

	node, err := s.client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "logs"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: "unresolvable.invalid"}, {Type: corev1.NodeInternalIP, Address: "127.0.0.1"}}
	node.Status.DaemonEndpoints.KubeletEndpoint.Port = int32(kubelet.Listener.Addr().(*net.TCPAddr).Port)
	if _, err := s.client.CoreV1().Nodes().UpdateStatus(ctx, node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.CoreV1().ServiceAccounts("default").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "talks"}, Spec: corev1.PodSpec{NodeName: "logs", Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
	if _, err := s.client.CoreV1().Pods("default").Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if out := s.mustKubectl(t, "", "logs", "talks"); out != "hello from the node\n" {
		t.Errorf("logs: %q", out)
	}
	if got, want := saw.Load(), kubeletClientUser+" /containerLogs/default/talks/c"; got != want {
		t.Errorf("node saw %q, want %q", got, want)
	}
	s.mustKubectl(t, "", "delete", "pod", "talks", "--force", "--grace-period=0")
}

func testAdmission(t *testing.T, s *testServer) {
	policy := `
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: no-evil}
spec:
  matchConstraints: {resourceRules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]}
  validations: [{expression: "!object.metadata.name.startsWith('evil')", message: "no evil here"}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: no-evil}
spec: {policyName: no-evil, validationActions: [Deny]}
`
	s.mustKubectl(t, policy, "create", "-f", "-")
	defer s.mustKubectl(t, policy, "delete", "-f", "-")
	eventually(t, func() error {
		out, err := s.kubectl(t, "", "create", "cm", "evil")
		if err == nil {
			s.mustKubectl(t, "", "delete", "cm", "evil")
			return errors.New("created")
		}
		if !strings.Contains(out, "no evil here") {
			return errors.New(out)
		}
		return nil
	})
	// Quota and pod security are asked too.
	s.mustKubectl(t, "", "create", "ns", "strict")
	s.mustKubectl(t, "", "label", "ns", "strict", "pod-security.kubernetes.io/enforce=restricted")
	s.mustKubectl(t, "", "create", "sa", "default", "-n", "strict")
	pod := `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","namespace":"strict"},"spec":{"containers":[{"name":"c","image":"i"}]}}`
	if out, err := s.kubectl(t, pod, "create", "-f", "-"); err == nil || !strings.Contains(out, `violates PodSecurity "restricted:latest"`) {
		t.Errorf("pod security: %v %s", err, out)
	}
	limits := `{"apiVersion":"v1","kind":"LimitRange","metadata":{"name":"l","namespace":"strict"},"spec":{"limits":[{"type":"PersistentVolumeClaim","max":{"storage":"1Gi"}}]}}`
	s.mustKubectl(t, limits, "create", "-f", "-")
	claim := `{"apiVersion":"v1","kind":"PersistentVolumeClaim","metadata":{"name":"big","namespace":"strict"},"spec":{"accessModes":["ReadWriteOnce"],"resources":{"requests":{"storage":"2Gi"}}}}`
	eventually(t, func() error {
		out, err := s.kubectl(t, claim, "create", "--dry-run=server", "-f", "-")
		if err == nil || !strings.Contains(out, "maximum storage usage per PersistentVolumeClaim is 1Gi") {
			return fmt.Errorf("limit range: %w %s", err, out)
		}
		return nil
	})
}

// testInProcessClients is ClientConfig: identity, watches, errors, and that nothing is shared that
// must not be.
func testInProcessClients(t *testing.T, s *testServer) {
	ctx := t.Context()
	bee := kubernetes.NewForConfigOrDie(s.ClientConfig("bee", "hive"))
	me, err := bee.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if u := me.Status.UserInfo; u.Username != "bee" || strings.Join(u.Groups, ",") != "hive,system:authenticated" {
		t.Errorf("is %+v", u)
	}
	if _, err := bee.CoreV1().Secrets("").List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("bee lists secrets: %v", err)
	}
	if a, b := s.ClientConfig("x", "g"), s.ClientConfig("x", "g", "h"); a.BearerToken == b.BearerToken {
		t.Error("different groups, same token")
	}
	if a, b := s.ClientConfig("x", "g", "h"), s.ClientConfig("x", "h", "g"); a.BearerToken != b.BearerToken {
		t.Error("same groups, different tokens")
	}

	// A shared informer sees an object come and go.
	factory := informers.NewSharedInformerFactoryWithOptions(s.client, 0, informers.WithNamespace("kube-public"))
	events := make(chan string, 16)
	_, err = factory.Core().V1().ConfigMaps().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { events <- "add " + o.(*corev1.ConfigMap).Name },
		DeleteFunc: func(o any) { events <- "delete " + o.(*corev1.ConfigMap).Name },
	})
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	defer factory.Shutdown()
	defer close(stop)
	factory.Start(stop)
	factory.WaitForCacheSync(stop)
	cms := s.client.CoreV1().ConfigMaps("kube-public")
	if _, err := cms.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "seen"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := cms.Delete(ctx, "seen", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"add seen", "delete seen"} {
		select {
		case got := <-events:
			if got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		case <-time.After(generous):
			t.Fatalf("no %q", want)
		}
	}

	// The same token works on the TLS port only as what it is; a guessed one does not.
	resp, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.pki.CAPool()}}}).Do(request(t, s.address()+"/api/v1/secrets", "guess"))
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("guessed token: %d %s", resp.StatusCode, body)
	}
}

func request(t *testing.T, url, token string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	return r
}
