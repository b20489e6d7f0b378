// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"net/http"

	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	genericapiserver "k8s.io/apiserver/pkg/server"
)

// reportWrites calls onWrite before each request that changes what the cluster should do.
func reportWrites(c *genericapiserver.Config, onWrite func()) {
	if onWrite == nil {
		return
	}
	build := c.BuildHandlerChainFunc
	c.BuildHandlerChainFunc = func(api http.Handler, c *genericapiserver.Config) http.Handler {
		next := build(api, c)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if isWrite(r) && !isHousekeeping(c.RequestInfoResolver, r) {
				onWrite()
			}
			next.ServeHTTP(w, r)
		})
	}
}

func isWrite(r *http.Request) bool {
	switch r.Method {
	case http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete:
		return true
	}
	return false
}

// isHousekeeping is what an idle cluster writes all the time and nobody acts on: renewals of leases,
// and events.
func isHousekeeping(resolver apirequest.RequestInfoResolver, r *http.Request) bool {
	info, err := resolver.NewRequestInfo(r)
	if err != nil {
		return false // the server will refuse it
	}
	return info.APIGroup == "coordination.k8s.io" && info.Resource == "leases" || info.Resource == "events"
}
