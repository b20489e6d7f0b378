// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"skep.io/skep/controlplane/store"
)

// TestAPI drives one server as a person and as a program would.
func TestAPI(t *testing.T) {
	s := start(t, t.TempDir())
	for name, test := range map[string]func(*testing.T, *testServer){
		"Discovery":        testDiscovery,
		"Objects":          testObjects,
		"Services":         testServices,
		"BadInput":         testBadInput,
		"Namespaces":       testNamespaces,
		"Watch":            testWatch,
		"CustomResources":  testCustomResources,
		"ServiceAccounts":  testServiceAccounts,
		"Nodes":            testNodes,
		"Parts":            testParts,
		"Logs":             testLogs,
		"Admission":        testAdmission,
		"OpenAPI":          testOpenAPI,
		"Health":           testHealth,
		"Storage":          testStorage,
		"InProcessClients": testInProcessClients,
		"Webhook":          testWebhook,
		"FrontProxy":       testFrontProxy,
		"Rotation":         testRotation,
	} {
		t.Run(name, func(t *testing.T) { test(t, s) })
	}
}

func testDiscovery(t *testing.T, s *testServer) {
	if out := s.mustKubectl(t, "", "version"); !strings.Contains(out, "Server Version: "+kubernetesVersion+"+skep") {
		t.Errorf("version says %q", out)
	}
	out := s.mustKubectl(t, "", "api-versions")
	// What upstream enables by default, and metrics; nothing else.
	want := `admissionregistration.k8s.io/v1 apiextensions.k8s.io/v1 apiregistration.k8s.io/v1 apps/v1
		authentication.k8s.io/v1 authorization.k8s.io/v1 autoscaling/v1 autoscaling/v2 batch/v1
		certificates.k8s.io/v1 coordination.k8s.io/v1 discovery.k8s.io/v1 events.k8s.io/v1
		flowcontrol.apiserver.k8s.io/v1 metrics.k8s.io/v1beta1 networking.k8s.io/v1 node.k8s.io/v1 policy/v1
		rbac.authorization.k8s.io/v1 resource.k8s.io/v1 scheduling.k8s.io/v1 storage.k8s.io/v1 v1`
	var builtin []string
	for _, gv := range strings.Fields(out) {
		if !strings.HasSuffix(gv, ".example.test/v1") {
			builtin = append(builtin, gv)
		}
	}
	if got := strings.Join(builtin, " "); got != strings.Join(strings.Fields(want), " ") {
		t.Errorf("serves %s", got)
	}
}

const deployment = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: default}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: "web:1"}]}
`

func testObjects(t *testing.T, s *testServer) {
	s.mustKubectl(t, deployment, "apply", "--server-side", "-f", "-")
	if out := s.mustKubectl(t, "", "get", "deployment", "web"); !strings.Contains(out, "READY   UP-TO-DATE   AVAILABLE   AGE") || !strings.Contains(out, "web    0/3") {
		t.Errorf("table:\n%s", out)
	}
	if out := s.mustKubectl(t, "", "get", "deployment", "web", "-o", "jsonpath={.spec.strategy.type} {.spec.revisionHistoryLimit}"); out != "RollingUpdate 10" {
		t.Errorf("defaults: %s", out)
	}
	// Another manager's change of an owned field is a conflict; forced, it is taken over.
	other := strings.Replace(deployment, "replicas: 3", "replicas: 5", 1)
	if out, err := s.kubectl(t, other, "apply", "--server-side", "--field-manager=other", "-f", "-"); err == nil || !strings.Contains(out, `conflict with "kubectl"`) {
		t.Errorf("conflict: %v %s", err, out)
	}
	s.mustKubectl(t, other, "apply", "--server-side", "--field-manager=other", "--force-conflicts", "-f", "-")
	// Client-side apply, patch, scale, label, edit by replace, delete.
	cm := `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"c"},"data":{"a":"1","b":"2"}}`
	s.mustKubectl(t, cm, "apply", "-f", "-")
	s.mustKubectl(t, strings.Replace(cm, `,"b":"2"`, "", 1), "apply", "-f", "-")
	if out := s.mustKubectl(t, "", "get", "cm", "c", "-o", "jsonpath={.data}"); out != `{"a":"1"}` {
		t.Errorf("data after apply: %s", out)
	}
	s.mustKubectl(t, "", "patch", "cm", "c", "--type=json", "-p", `[{"op":"add","path":"/data/z","value":"26"}]`)
	s.mustKubectl(t, "", "scale", "deployment", "web", "--replicas=2")
	s.mustKubectl(t, "", "label", "cm", "c", "x=y")
	if out := s.mustKubectl(t, "", "get", "cm", "-l", "x=y", "-o", "name"); strings.TrimSpace(out) != "configmap/c" {
		t.Errorf("by label: %s", out)
	}
	s.mustKubectl(t, "", "delete", "cm", "c")
	if out, err := s.kubectl(t, "", "get", "cm", "c"); err == nil || !strings.Contains(out, `configmaps "c" not found`) {
		t.Errorf("after delete: %v %s", err, out)
	}
	if out := s.mustKubectl(t, "", "diff", "-f", "-"); out != "" {
		t.Errorf("diff of nothing: %s", out)
	}
}

func testServices(t *testing.T, s *testServer) {
	manifest := `{"apiVersion":"v1","kind":"Service","metadata":{"name":"np"},"spec":{"type":"NodePort","ipFamilyPolicy":"PreferDualStack","selector":{"a":"b"},"ports":[{"port":80}]}}`
	s.mustKubectl(t, manifest, "create", "-f", "-")
	svc, err := s.client.CoreV1().Services("default").Get(t.Context(), "np", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(svc.Spec.ClusterIPs) != 2 || !strings.HasPrefix(svc.Spec.ClusterIPs[0], "10.43.") || !strings.HasPrefix(svc.Spec.ClusterIPs[1], "fd73:6b65:7043::") {
		t.Errorf("ClusterIPs %v", svc.Spec.ClusterIPs)
	}
	if p := svc.Spec.Ports[0].NodePort; p < 30000 || p > 32767 {
		t.Errorf("NodePort %d", p)
	}
	again := strings.NewReplacer(`"np"`, `"np2"`, `"spec":{`, `"spec":{"clusterIP":"`+svc.Spec.ClusterIP+`",`).Replace(manifest)
	if out, err := s.kubectl(t, again, "create", "-f", "-"); err == nil || !strings.Contains(out, "provided IP is already allocated") {
		t.Errorf("taken address: %v %s", err, out)
	}
	s.mustKubectl(t, "", "delete", "svc", "np")

	eventually(t, func() error {
		ep, err := s.client.DiscoveryV1().EndpointSlices("default").Get(t.Context(), "kubernetes", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(ep.Endpoints) != 1 || ep.Endpoints[0].Addresses[0] != "192.0.2.1" {
			return errors.New("endpoints of kubernetes: " + ep.String())
		}
		return nil
	})
}

func testBadInput(t *testing.T, s *testServer) {
	tests := map[string]struct{ manifest, want string }{
		"unknown field":     {`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"bad"},"dada":{}}`, `strict decoding error: unknown field "dada"`},
		"bad name":          {`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"Bad_Name"}}`, `is invalid: metadata.name: Invalid value: "Bad_Name"`},
		"wrong type":        {`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"bad"},"data":{"a":{"b":"c"}}}`, `cannot unmarshal`},
		"missing namespace": {`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"bad","namespace":"nowhere"}}`, `namespaces "nowhere" not found`},
		"unknown kind":      {`{"apiVersion":"v1","kind":"Nonsense","metadata":{"name":"bad"}}`, `no matches for kind "Nonsense"`},
		"bad spec":          {strings.Replace(deployment, "app: web}}\n", "app: other}}\n", 1), "`selector` does not match template `labels`"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			// The server's own check: kubectl's is asked to keep out of it.
			out, err := s.kubectl(t, tt.manifest, "create", "--validate=strict", "-f", "-")
			if err == nil || !strings.Contains(strings.ReplaceAll(out, `\"`, `"`), tt.want) {
				t.Errorf("got %v %s\nwant %s", err, out, tt.want)
			}
		})
	}
	// kubectl would drop the first of two equal keys itself.
	err := s.client.CoreV1().RESTClient().Post().Namespace("default").Resource("configmaps").Param("fieldValidation", "Strict").
		SetHeader("Content-Type", "application/json").Body([]byte(`{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":"bad"},"data":{"a":"1","a":"2"}}`)).
		Do(t.Context()).Error()
	if err == nil || !strings.Contains(err.Error(), "duplicate field") {
		t.Errorf("duplicate field: %v", err)
	}
	if out := s.mustKubectl(t, "", "get", "cm", "-A", "-o", "name"); strings.Contains(strings.ToLower(out), "bad") {
		t.Errorf("stored: %s", out)
	}
}

func testNamespaces(t *testing.T, s *testServer) {
	eventually(t, func() error {
		for _, ns := range []string{"default", "kube-system", "kube-public", "kube-node-lease"} {
			if _, err := s.client.CoreV1().Namespaces().Get(t.Context(), ns, metav1.GetOptions{}); err != nil {
				return err
			}
		}
		return nil
	})
	if out, err := s.kubectl(t, "", "delete", "ns", "kube-system", "--wait=false"); err == nil || !strings.Contains(out, "may not be deleted") {
		t.Errorf("delete kube-system: %v %s", err, out)
	}
	s.mustKubectl(t, "", "create", "ns", "gone")
	s.mustKubectl(t, "", "delete", "ns", "gone", "--wait=false")
	if out := s.mustKubectl(t, "", "get", "ns", "gone"); !strings.Contains(out, "Terminating") {
		t.Errorf("phase:\n%s", out)
	}
	if out, err := s.kubectl(t, "", "create", "cm", "x", "-n", "gone"); err == nil || !strings.Contains(out, "because it is being terminated") {
		t.Errorf("create in a namespace that ends: %v %s", err, out)
	}
	ns, err := s.client.CoreV1().Namespaces().Get(t.Context(), "gone", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ns.Spec.Finalizers = nil // what the namespace controller does when it is empty
	if _, err := s.client.CoreV1().Namespaces().Finalize(t.Context(), ns, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.CoreV1().Namespaces().Get(t.Context(), "gone", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("after finalize: %v", err)
	}
}

func testWatch(t *testing.T, s *testServer) {
	ctx, cancel := context.WithTimeout(t.Context(), generous)
	defer cancel()
	cmd := exec.CommandContext(ctx, "kubectl", "--kubeconfig", s.kubeconfig, "get", "cm", "-n", "kube-public", "--watch", "--output-watch-events", "--no-headers")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = cmd.Wait() }()
	lines := bufio.NewScanner(stdout)
	expect := func(prefix ...string) {
		t.Helper()
		if !lines.Scan() {
			t.Fatalf("watch ended: %v", lines.Err())
		}
		if f := strings.Fields(lines.Text()); len(f) < 2 || f[0] != prefix[0] || f[1] != prefix[1] {
			t.Errorf("got %q, want %v", lines.Text(), prefix)
		}
	}
	s.mustKubectl(t, "", "create", "cm", "w", "-n", "kube-public")
	expect("ADDED", "w")
	s.mustKubectl(t, "", "label", "cm", "w", "-n", "kube-public", "a=b")
	expect("MODIFIED", "w")
	s.mustKubectl(t, "", "delete", "cm", "w", "-n", "kube-public")
	expect("DELETED", "w")
}

func testCustomResources(t *testing.T, s *testServer) {
	crd := `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: hives.bees.example.test}
spec:
  group: bees.example.test
  scope: Namespaced
  names: {plural: hives, singular: hive, kind: Hive, shortNames: [hv]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    additionalPrinterColumns: [{name: Size, type: integer, jsonPath: .spec.size}]
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec: {type: object, properties: {size: {type: integer, minimum: 1, default: 7}}}
          status: {type: object, properties: {full: {type: boolean}}}
`
	s.mustKubectl(t, crd, "create", "-f", "-")
	s.mustKubectl(t, "", "wait", "--for=condition=Established", "crd/hives.bees.example.test")
	hive := "apiVersion: bees.example.test/v1\nkind: Hive\nmetadata: {name: h}\nspec: {}\n"
	s.mustKubectl(t, hive, "apply", "--server-side", "-f", "-")
	if out := s.mustKubectl(t, "", "get", "hv", "h", "--no-headers"); strings.Fields(out)[1] != "7" {
		t.Errorf("table with default: %s", out)
	}
	if out, err := s.kubectl(t, strings.Replace(hive, "{}", "{size: 0}", 1), "apply", "-f", "-"); err == nil || !strings.Contains(out, "should be greater than or equal to 1") {
		t.Errorf("schema: %v %s", err, out)
	}
	if out, err := s.kubectl(t, strings.Replace(hive, "{}", "{sice: 1}", 1), "apply", "-f", "-"); err == nil || !strings.Contains(out, `unknown field "spec.sice"`) {
		t.Errorf("strict: %v %s", err, out)
	}
	eventually(t, func() error {
		if out, err := s.kubectl(t, "", "explain", "hive.spec.size"); err != nil || !strings.Contains(out, "FIELD: size <integer>") {
			return errors.New("explain: " + out)
		}
		return nil
	})
	eventually(t, func() error { // v2 holds custom resources too
		if out := s.mustKubectl(t, "", "get", "--raw", "/openapi/v2"); !strings.Contains(out, "test.example.bees.v1.Hive") {
			return errors.New("OpenAPI v2 lacks Hive")
		}
		return nil
	})
	s.mustKubectl(t, "", "delete", "crd", "hives.bees.example.test")
}

func testServiceAccounts(t *testing.T, s *testServer) {
	s.mustKubectl(t, "", "create", "sa", "worker")
	token := strings.TrimSpace(s.mustKubectl(t, "", "create", "token", "worker"))
	as := func(args ...string) (string, error) {
		// A kubeconfig of its own: the administrator's certificate would win over the token.
		kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
		for _, step := range [][]string{
			{"config", "set-cluster", "c", "--server", s.address(), "--certificate-authority", s.pki.CAFile()},
			{"config", "set-credentials", "u", "--token", token},
			{"config", "set-context", "x", "--cluster", "c", "--user", "u"},
			{"config", "use-context", "x"},
		} {
			if out, err := exec.Command("kubectl", append([]string{"--kubeconfig", kubeconfig}, step...)...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		out, err := exec.CommandContext(t.Context(), "kubectl", append([]string{"--kubeconfig", kubeconfig}, args...)...).CombinedOutput()
		return string(out), err
	}
	if out, err := as("auth", "whoami", "-o", "jsonpath={.status.userInfo.username}"); err != nil || out != "system:serviceaccount:default:worker" {
		t.Errorf("whoami: %v %s", err, out)
	}
	out, err := as("get", "secrets")
	if want := `secrets is forbidden: User "system:serviceaccount:default:worker" cannot list resource "secrets" in API group "" in the namespace "default"`; err == nil || !strings.Contains(out, want) {
		t.Errorf("denial: %v %s", err, out)
	}
	s.mustKubectl(t, "", "create", "role", "reader", "--verb=get,list", "--resource=secrets")
	s.mustKubectl(t, "", "create", "rolebinding", "reader", "--role=reader", "--serviceaccount=default:worker")
	eventually(t, func() error {
		if out, err := as("get", "secrets"); err != nil {
			return errors.New(out)
		}
		return nil
	})
	if out, err := as("delete", "sa", "worker"); err == nil {
		t.Errorf("delete was allowed: %s", out)
	}
	// What pods with projected tokens rely on: issuer and keys for others to verify with.
	if out := s.mustKubectl(t, "", "get", "--raw", "/.well-known/openid-configuration"); !strings.Contains(out, `"issuer":"https://kubernetes.default.svc.cluster.local"`) {
		t.Errorf("discovery: %s", out)
	}
	if out := s.mustKubectl(t, "", "get", "--raw", "/openid/v1/jwks"); !strings.Contains(out, `"crv":"P-256"`) {
		t.Errorf("keys: %s", out)
	}
	// The account gone, so is the token.
	s.mustKubectl(t, "", "delete", "sa", "worker")
	eventually(t, func() error {
		if out, err := as("auth", "whoami"); err == nil {
			return errors.New("token still works: " + out)
		}
		return nil
	})
}

func testHealth(t *testing.T, s *testServer) {
	for _, path := range []string{"/healthz", "/livez", "/readyz"} {
		if out := s.mustKubectl(t, "", "get", "--raw", path); out != "ok" {
			t.Errorf("%s: %s", path, out)
		}
	}
	out := s.mustKubectl(t, "", "get", "--raw", "/metrics")
	for _, m := range []string{"apiserver_request_total", "etcd_request_duration_seconds_count", "apiserver_storage_objects"} {
		if !strings.Contains(out, m) {
			t.Errorf("/metrics lacks %s", m)
		}
	}
}

func testStorage(t *testing.T, s *testServer) {
	r, err := s.store.Client().Get(t.Context(), "/registry/namespaces/default")
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Kvs) != 1 || !bytes.HasPrefix(r.Kvs[0].Value, []byte("k8s\x00")) {
		t.Errorf("not protobuf: %+v", r.Kvs)
	}
	if _, err := store.Open(t.Context(), store.Config{DataDir: filepath.Dir(s.kubeconfig)}); !errors.Is(err, store.ErrLocked) {
		t.Errorf("second open: %v", err)
	}
}

func testOpenAPI(t *testing.T, s *testServer) {
	if out := s.mustKubectl(t, "", "explain", "deployment.spec.strategy.rollingUpdate.maxSurge"); !strings.Contains(out, "FIELD: maxSurge <IntOrString>") {
		t.Errorf("explain: %s", out)
	}
	var doc struct {
		Paths map[string]struct{ ServerRelativeURL string }
	}
	if err := json.Unmarshal([]byte(s.mustKubectl(t, "", "get", "--raw", "/openapi/v3")), &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Paths) < 25 {
		t.Errorf("%d documents", len(doc.Paths))
	}
	for gv, entry := range doc.Paths {
		if strings.Contains(gv, "example.test") { // another test's, perhaps deleted just now
			continue
		}
		var spec struct {
			OpenAPI string         `json:"openapi"`
			Paths   map[string]any `json:"paths"`
		}
		out := s.mustKubectl(t, "", "get", "--raw", entry.ServerRelativeURL)
		if err := json.Unmarshal([]byte(out), &spec); err != nil {
			t.Fatalf("%s: %v", gv, err)
		}
		if spec.OpenAPI != "3.0.0" || len(spec.Paths) == 0 {
			t.Errorf("%s: version %q, %d paths", gv, spec.OpenAPI, len(spec.Paths))
		}
	}
	var v2 struct {
		Swagger     string
		Info        struct{ Version string }
		Definitions map[string]any
		Paths       map[string]any
	}
	if err := json.Unmarshal([]byte(s.mustKubectl(t, "", "get", "--raw", "/openapi/v2")), &v2); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"io.k8s.api.core.v1.Pod", "io.k8s.api.apps.v1.Deployment", "io.k8s.kube-aggregator.pkg.apis.apiregistration.v1.APIService"} {
		if v2.Definitions[name] == nil {
			t.Errorf("OpenAPI v2 lacks %s", name)
		}
	}
	for _, path := range []string{"/api/v1/pods", "/apis/apps/v1/deployments", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", "/version/"} {
		if v2.Paths[path] == nil {
			t.Errorf("OpenAPI v2 lacks %s", path)
		}
	}
}

// TestRestart stops a server and starts another on the same data, with every object still there.
func TestRestart(t *testing.T) {
	dir := t.TempDir()
	s := start(t, dir)
	s.mustKubectl(t, deployment, "apply", "-f", "-")
	s.mustKubectl(t, "", "create", "sa", "worker")
	token := strings.TrimSpace(s.mustKubectl(t, "", "create", "token", "worker"))
	before := uids(t, s)
	config := s.ClientConfig("someone")
	s.stop()
	if _, err := kubernetes.NewForConfigOrDie(config).CoreV1().Namespaces().List(t.Context(), metav1.ListOptions{}); err == nil {
		t.Error("a stopped server answered")
	}

	s = start(t, dir)
	after := uids(t, s)
	for key, uid := range before {
		if after[key] != uid {
			t.Errorf("%s: %q before, %q after", key, uid, after[key])
		}
	}
	out, err := exec.Command("kubectl", "--kubeconfig", os.DevNull, "--server", s.address(), "--certificate-authority", s.pki.CAFile(), "--token", token,
		"auth", "whoami", "-o", "jsonpath={.status.userInfo.username}").CombinedOutput()
	if err != nil || string(out) != "system:serviceaccount:default:worker" {
		t.Errorf("a token from before the restart: %v %s", err, out)
	}
}

// uids lists objects of kinds that nobody but tests and start-up writes.
func uids(t *testing.T, s *testServer) map[string]string {
	t.Helper()
	out := map[string]string{}
	lines := s.mustKubectl(t, "", "get", "ns,deploy,sa,clusterroles,clusterrolebindings,roles,priorityclasses,apiservices,flowschemas,svc", "-A",
		"-o", `jsonpath={range .items[*]}{.kind}/{.metadata.namespace}/{.metadata.name} {.metadata.uid}{"\n"}{end}`)
	for line := range strings.Lines(lines) {
		if f := strings.Fields(line); len(f) == 2 {
			out[f[0]] = f[1]
		}
	}
	if len(out) < 150 {
		t.Fatalf("only %d objects:\n%s", len(out), lines)
	}
	return out
}

// Nothing of one server leaks into another of the same process.
func TestTwoServersInOneProcess(t *testing.T) {
	a, b := start(t, t.TempDir()), start(t, t.TempDir())
	if _, err := a.client.CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "only-a"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.client.CoreV1().ConfigMaps("default").Get(t.Context(), "only-a", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("b has a's object: %v", err)
	}
	a.stop()
	if _, err := b.client.CoreV1().Namespaces().List(t.Context(), metav1.ListOptions{}); err != nil {
		t.Errorf("b after a stopped: %v", err)
	}
}

// Old versions of objects leave the store, and objects stay.
func TestCompaction(t *testing.T) {
	s := start(t, t.TempDir(), func(c *Config) { c.CompactionInterval = 50 * time.Millisecond })
	cms := s.client.CoreV1().ConfigMaps("default")
	cm, err := cms.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "c"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	old := cm.ResourceVersion
	cm.Data = map[string]string{"a": "b"}
	if _, err := cms.Update(t.Context(), cm, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	rev, err := strconv.ParseInt(old, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		_, err := s.store.Client().Get(t.Context(), "/registry/configmaps/default/c", clientv3.WithRev(rev))
		if !errors.Is(err, rpctypes.ErrCompacted) {
			return fmt.Errorf("revision %d: %w", rev, err)
		}
		return nil
	})
	if cm, err = cms.Get(t.Context(), "c", metav1.GetOptions{}); err != nil || cm.Data["a"] != "b" {
		t.Errorf("after compaction: %v %v", cm, err)
	}
}
