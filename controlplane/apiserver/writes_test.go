// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"k8s.io/apimachinery/pkg/util/sets"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	genericapiserver "k8s.io/apiserver/pkg/server"
)

func TestReportWrites(t *testing.T) {
	const core, groups = "/api/v1/namespaces/default/", "/apis/"
	for _, c := range []struct {
		method, path string
		want         bool
	}{
		{http.MethodGet, core + "pods", false},
		{http.MethodPost, core + "pods", true},
		{http.MethodPatch, core + "pods/web/status", true},
		{http.MethodPut, "/api/v1/nodes/n1/status", true},
		{http.MethodDelete, groups + "apps/v1/namespaces/default/deployments/web", true},
		{http.MethodPost, core + "events", false},
		{http.MethodPatch, groups + "events.k8s.io/v1/namespaces/default/events/web.1", false},
		{http.MethodPut, groups + "coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n1", false},
		{http.MethodPut, groups + "example.com/v1/namespaces/default/leases/house", true},
	} {
		reported, served := 0, 0
		config := &genericapiserver.Config{
			RequestInfoResolver:   &apirequest.RequestInfoFactory{APIPrefixes: sets.NewString("api", "apis"), GrouplessAPIPrefixes: sets.NewString("api")},
			BuildHandlerChainFunc: func(api http.Handler, _ *genericapiserver.Config) http.Handler { return api },
		}
		reportWrites(config, func() { reported++ })
		api := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served++ })
		config.BuildHandlerChainFunc(api, config).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(c.method, c.path, nil))
		if (reported == 1) != c.want || served != 1 {
			t.Errorf("%s %s: reported %d times, served %d times, want a report: %v", c.method, c.path, reported, served, c.want)
		}
	}
}
