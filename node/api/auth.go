// SPDX-License-Identifier: Apache-2.0

package api

import (
	"errors"
	"net/http"
	"slices"
	"strings"
)

const mastersGroup = "system:masters"

var errNoIdentity = errors.New("no client certificate and no token")

// guard lets through who may use the subresource of this node.
func (s *Server) guard(subresource string, next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, groups, err := s.identify(r)
		if err != nil {
			if !errors.Is(err, errNoIdentity) {
				s.cfg.Log.Warn("request to the node API is not authenticated", "remote", r.RemoteAddr, "error", err)
			}
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
			return
		}
		verb := verbOf(r.Method)
		allowed := slices.Contains(groups, mastersGroup) || slices.Contains(s.cfg.AllowedUsers, user)
		if !allowed && s.cfg.Authorize != nil {
			if allowed, err = s.cfg.Authorize(r.Context(), user, groups, verb, subresource); err != nil {
				s.cfg.Log.Error("request to the node API is not authorized", "user", user, "error", err)
				http.Error(w, "Authorization error (user="+user+", verb="+verb+", resource=nodes, subresource="+subresource+")", http.StatusInternalServerError)
				return
			}
		}
		if !allowed {
			http.Error(w, "Forbidden (user="+user+", verb="+verb+", resource=nodes, subresource="+subresource+")", http.StatusForbidden)
			return
		}
		next(w, r)
	})
}

// identify reads the verified client certificate, or asks about a bearer token.
func (s *Server) identify(r *http.Request) (user string, groups []string, err error) {
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		subject := r.TLS.VerifiedChains[0][0].Subject
		if subject.CommonName == "" {
			return "", nil, errors.New("client certificate has no common name")
		}
		return subject.CommonName, subject.Organization, nil
	}
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok || token == "" || s.cfg.Authenticate == nil {
		return "", nil, errNoIdentity
	}
	return s.cfg.Authenticate(r.Context(), token)
}

func verbOf(method string) string {
	switch method {
	case http.MethodPost:
		return "create"
	case http.MethodPut:
		return "update"
	case http.MethodPatch:
		return "patch"
	case http.MethodDelete:
		return "delete"
	}
	return "get"
}
