// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// testWebhook calls a live mutating webhook over TLS.
func testWebhook(t *testing.T, s *testServer) {
	hook := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var review admissionv1.AdmissionReview
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			t.Error(err)
			return
		}
		patch := admissionv1.PatchTypeJSONPatch
		review.Response = &admissionv1.AdmissionResponse{
			UID: review.Request.UID, Allowed: true, PatchType: &patch,
			Patch: []byte(`[{"op":"add","path":"/data","value":{"from":"webhook"}}]`),
		}
		review.Request = nil
		_ = json.NewEncoder(w).Encode(review)
	}))
	cert, key, err := s.pki.IssueServer("hook", []string{"127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	hook.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	hook.StartTLS()
	defer hook.Close()

	config := fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingWebhookConfiguration
metadata: {name: hook}
webhooks:
- name: hook.example.test
  admissionReviewVersions: [v1]
  sideEffects: None
  clientConfig: {url: %q, caBundle: %s}
  objectSelector: {matchLabels: {mutate: me}}
  rules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]
`, hook.URL, base64.StdEncoding.EncodeToString(s.pki.CAPEM()))
	s.mustKubectl(t, config, "create", "-f", "-")
	defer s.mustKubectl(t, config, "delete", "-f", "-")
	eventually(t, func() error {
		cm, err := s.client.CoreV1().ConfigMaps("default").Create(t.Context(),
			&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "hooked-", Labels: map[string]string{"mutate": "me"}}}, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		if cm.Data["from"] != "webhook" {
			return errors.New("not mutated")
		}
		return nil
	})
}

// testFrontProxy is how an aggregated API server is told who asks: only the holder of the
// front-proxy certificate may say so.
func testFrontProxy(t *testing.T, s *testServer) {
	files, err := s.pki.FrontProxyClientFiles()
	if err != nil {
		t.Fatal(err)
	}
	front, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		t.Fatal(err)
	}
	c, k, err := s.pki.IssueClient("front-proxy-client", nil) // the right name of the wrong authority
	if err != nil {
		t.Fatal(err)
	}
	imposter, err := tls.X509KeyPair(c, k)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		cert   tls.Certificate
		status int
	}{{front, http.StatusOK}, {imposter, http.StatusForbidden}} {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.pki.CAPool(), Certificates: []tls.Certificate{tt.cert}}}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.address()+"/api/v1/secrets", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-Remote-User", "anybody")
		r.Header.Set("X-Remote-Group", "system:masters")
		resp, err := tr.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		tr.CloseIdleConnections()
		if resp.StatusCode != tt.status {
			t.Errorf("status %d, want %d", resp.StatusCode, tt.status)
		}
	}
}

func FuzzOpenAPIAccept(f *testing.F) {
	for _, s := range []string{"", "*/*", "application/json", "text/html", openAPIProto + ", application/json;q=0.5"} {
		f.Add(s)
	}
	g := &openAPIGroup{json: func() ([]byte, error) { return nil, nil }, proto: func() ([]byte, error) { return nil, nil }}
	f.Fuzz(func(t *testing.T, accept string) {
		contentType, get := g.representation(accept)
		if (contentType == "") != (get == nil) {
			t.Errorf("%q: type %q without content, or the reverse", accept, contentType)
		}
	})
}
