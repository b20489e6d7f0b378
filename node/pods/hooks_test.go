// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// A hook that is declared to be HTTPS is asked by HTTP if that is what it speaks, without what only HTTPS may carry, and
// the pod's owner is told. Any answer will do.
func TestHookFallsBack(t *testing.T) {
	var asked []string
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.Path+" "+r.Header.Get("Authorization")+" "+r.Header.Get("X-Hive"))
		w.WriteHeader(http.StatusTeapot)
	})
	for _, c := range []struct {
		name   string
		serve  func(http.Handler) *httptest.Server
		scheme corev1.URIScheme
		want   string
		told   bool
	}{
		{"HTTPS", httptest.NewTLSServer, corev1.URISchemeHTTPS, "/hook secret bees", false},
		{"HTTP", httptest.NewServer, corev1.URISchemeHTTP, "/hook secret bees", false},
		{"HTTPS that is HTTP", httptest.NewServer, corev1.URISchemeHTTPS, "/hook  bees", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			asked = nil
			server := c.serve(handler)
			defer server.Close()
			at, err := url.Parse(server.URL)
			if err != nil {
				t.Fatal(err)
			}
			var told []string
			err = newHooks(nil).run(t.Context(), &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{
				Scheme: c.scheme, Host: at.Hostname(), Port: intstr.Parse(at.Port()), Path: "/hook",
				HTTPHeaders: []corev1.HTTPHeader{{Name: "Authorization", Value: "secret"}, {Name: "X-Hive", Value: "bees"}},
			}}, &corev1.Container{Name: "c"}, "id", "", func(host string) { told = append(told, host) })
			if err != nil || !slices.Equal(asked, []string{c.want}) {
				t.Errorf("asked %q, %v", asked, err)
			}
			if (len(told) == 1 && told[0] == at.Host) != c.told {
				t.Errorf("told of %q", told)
			}
		})
	}
	// Nobody there: that is no answer in another protocol.
	closed := httptest.NewServer(handler)
	closed.Close()
	at, _ := url.Parse(closed.URL)
	if err := newHooks(nil).run(t.Context(), &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{
		Scheme: corev1.URISchemeHTTPS, Host: at.Hostname(), Port: intstr.Parse(at.Port()),
	}}, &corev1.Container{Name: "c"}, "id", "", nil); err == nil {
		t.Error("a hook that nobody answers has not failed")
	}
}
