// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/emicklei/go-restful/v3"
	apiopenapi "k8s.io/apiserver/pkg/endpoints/openapi"
	"k8s.io/apiserver/pkg/server/mux"
	"k8s.io/kube-openapi/pkg/builder"
	"k8s.io/kube-openapi/pkg/builder3"
	"k8s.io/kube-openapi/pkg/cached"
	"k8s.io/kube-openapi/pkg/common"
	"k8s.io/kube-openapi/pkg/common/restfuladapter"
	"k8s.io/kube-openapi/pkg/handler"
	"k8s.io/kube-openapi/pkg/handler3"
	"k8s.io/kube-openapi/pkg/spec3"
	"k8s.io/kube-openapi/pkg/validation/spec"
)

// Upstream describes every built-in type at start, twice: a third of the time to ready, and some
// 40 MB that stay, for documents that most clusters are asked for once a day. Here the description
// of the built-in groups (those of CustomResources stay upstream's) is made when somebody asks.

// operationID does what the builders do by default. Their own default is a closure that is kept in
// the configuration and holds the first builder with all its types, some 12 MB, for ever.
func operationID(r common.Route) (string, []string, error) {
	route, ok := r.(*restfuladapter.RouteAdapter)
	if !ok {
		return "", nil, fmt.Errorf("OpenAPI: route %s is a %T", r.Path(), r)
	}
	return apiopenapi.GetOperationIDAndTags(route.Route)
}

// installOpenAPIV2 serves /openapi/v2 of services on m, built on the first request.
func installOpenAPIV2(services []*restful.WebService, config *common.Config, m *mux.PathRecorderMux) {
	build := func() (*spec.Swagger, string, error) {
		s, err := builder.BuildOpenAPISpecFromRoutes(restfuladapter.AdaptWebServices(services), config)
		if err != nil {
			return nil, "", fmt.Errorf("OpenAPI v2: %w", err)
		}
		s.Definitions = handler.PruneDefaults(s.Definitions)
		return s, openAPIEtag("v2", services), nil
	}
	handler.NewOpenAPIServiceLazy(cached.Once(cached.Func(build))).RegisterOpenAPIVersionedService("/openapi/v2", m)
}

// openAPIV3 serves /openapi/v3 of the built-in groups.
type openAPIV3 struct {
	config    *common.OpenAPIV3Config
	started   time.Time
	discovery []byte
	groups    map[string]*openAPIGroup // by path, as in "apis/apps/v1"
}

type openAPIGroup struct {
	etag     string
	services []*restful.WebService
	json     func() ([]byte, error)
	proto    func() ([]byte, error)
}

// installOpenAPIV3 serves /openapi/v3 and everything under it on m.
func installOpenAPIV3(services []*restful.WebService, config *common.OpenAPIV3Config, m *mux.PathRecorderMux) error {
	o := &openAPIV3{config: config, started: time.Now(), groups: map[string]*openAPIGroup{}}
	doc := handler3.OpenAPIV3Discovery{Paths: map[string]handler3.OpenAPIV3DiscoveryGroupVersion{}}
	for _, ws := range services {
		gv := strings.TrimPrefix(ws.RootPath(), "/")
		g := &openAPIGroup{services: []*restful.WebService{ws}}
		g.etag = openAPIEtag("v3", g.services)
		g.json = sync.OnceValues(func() ([]byte, error) { return o.build(gv, g) })
		g.proto = sync.OnceValues(func() ([]byte, error) {
			j, err := g.json()
			if err != nil {
				return nil, err
			}
			return handler3.ToV3ProtoBinary(j)
		})
		o.groups[gv] = g
		doc.Paths[gv] = handler3.OpenAPIV3DiscoveryGroupVersion{ServerRelativeURL: openAPIURL(gv, g.etag)}
	}
	var err error
	if o.discovery, err = json.Marshal(doc); err != nil {
		return err
	}
	m.HandleFunc("/openapi/v3", o.serveDiscovery)
	m.HandlePrefix("/openapi/v3/", http.HandlerFunc(o.serveGroup))
	return nil
}

func (o *openAPIV3) serveDiscovery(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	http.ServeContent(w, r, "", o.started, bytes.NewReader(o.discovery))
}

// serveGroup answers JSON or protobuf. A URL with the right hash may be cached for ever, as its
// content is a function of the hash; one with another hash is sent to the right one.
func (o *openAPIV3) serveGroup(w http.ResponseWriter, r *http.Request) {
	gv := strings.TrimPrefix(r.URL.Path, "/openapi/v3/")
	g, ok := o.groups[gv]
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Vary", "Accept")
	contentType, get := g.representation(r.Header.Get("Accept"))
	if get == nil {
		w.WriteHeader(http.StatusNotAcceptable)
		return
	}
	if hash := r.URL.Query().Get("hash"); hash != "" {
		if hash != g.etag {
			http.Redirect(w, r, openAPIURL(gv, g.etag), http.StatusMovedPermanently)
			return
		}
		w.Header().Set("Cache-Control", "public, immutable")
		w.Header().Set("Expires", time.Now().AddDate(1, 0, 0).UTC().Format(http.TimeFormat))
	}
	data, err := get()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Etag", `"`+g.etag+`"`)
	http.ServeContent(w, r, "", o.started, bytes.NewReader(data))
}

const openAPIProto = "application/com.github.proto-openapi.spec.v3.v1.0+protobuf"

// representation picks what an Accept header asks for. Clients list one type, or protobuf before
// JSON; weights do not occur.
func (g *openAPIGroup) representation(accept string) (contentType string, get func() ([]byte, error)) {
	for clause := range strings.SplitSeq(accept, ",") {
		mime, _, _ := strings.Cut(clause, ";")
		switch strings.TrimSpace(mime) {
		case "", "*/*", "application/*", "application/json":
			return "application/json", g.json
		case openAPIProto, "application/com.github.proto-openapi.spec.v3@v1.0+protobuf":
			return openAPIProto, g.proto
		}
	}
	return "", nil
}

func (o *openAPIV3) build(gv string, g *openAPIGroup) ([]byte, error) {
	s, err := builder3.BuildOpenAPISpecFromRoutes(restfuladapter.AdaptWebServices(g.services), o.config)
	if err != nil {
		return nil, fmt.Errorf("OpenAPI v3 of %s: %w", gv, err)
	}
	narrowSharedKinds(s, gv)
	return json.Marshal(s)
}

// narrowSharedKinds leaves, of the sixty groups in which DeleteOptions and WatchEvent are
// registered, the one at hand and the core group.
func narrowSharedKinds(s *spec3.OpenAPI, gv string) {
	parts := strings.Split(gv, "/")
	var group, version string
	switch {
	case len(parts) == 2 && parts[0] == "api":
		version = parts[1]
	case len(parts) == 3 && parts[0] == "apis":
		group, version = parts[1], parts[2]
	default:
		return
	}
	if s.Components == nil {
		return
	}
	const key = "x-kubernetes-group-version-kind"
	for _, schema := range s.Components.Schemas {
		kinds, ok := schema.Extensions[key].([]any)
		if !ok || len(kinds) < 2 {
			continue
		}
		if first, ok := kinds[0].(map[string]any); !ok || (first["kind"] != "DeleteOptions" && first["kind"] != "WatchEvent") {
			continue
		}
		schema.Extensions[key] = slices.DeleteFunc(slices.Clone(kinds), func(k any) bool {
			m, ok := k.(map[string]any)
			own := m["group"] == group && m["version"] == version
			core := m["group"] == "" && m["version"] == "v1"
			return !ok || !own && !core
		})
	}
}

func openAPIURL(gv, etag string) string {
	u := url.URL{Path: path.Join("/openapi/v3", gv), RawQuery: url.Values{"hash": {etag}}.Encode()}
	return u.String()
}

// openAPIEtag names a description without making it: it follows from the version of the types,
// from the feature gates, which hide fields, and from the routes.
func openAPIEtag(kind string, services []*restful.WebService) string {
	h := sha256.New()
	fmt.Fprintln(h, kind, kubernetesVersion)
	for _, gate := range slices.Sorted(maps.Keys(featureGates)) {
		fmt.Fprintln(h, gate, featureGates[gate])
	}
	for _, ws := range services {
		var routes []string
		for _, r := range ws.Routes() {
			routes = append(routes, r.Method+" "+r.Path)
		}
		slices.Sort(routes)
		fmt.Fprintln(h, ws.RootPath(), routes)
	}
	return strings.ToUpper(hex.EncodeToString(h.Sum(nil)))
}
