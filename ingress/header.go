// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"bufio"
	"crypto/rand"
	"encoding/hex"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// validTarget refuses request targets that would not be one word on a request line. HTTP/2 can
// carry them.
func validTarget(target string) bool {
	for i := range len(target) {
		if c := target[i]; c <= ' ' || c == 0x7f {
			return false
		}
	}
	return target != ""
}

// hopByHop says which fields concern one connection only (RFC 9110, 7.6.1). Names are canonical.
func hopByHop(name string) bool {
	switch name {
	case "Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization",
		"Te", "Trailer", "Transfer-Encoding", "Upgrade":
		return true
	}
	return false
}

// ownField says which request fields the proxy writes itself. A name with underscores is the same
// name to a CGI-like backend, so it does not pass either.
func ownField(name string) bool {
	if strings.Contains(name, "_") {
		name = http.CanonicalHeaderKey(strings.ReplaceAll(name, "_", "-"))
	}
	switch name {
	case "Host", "Content-Length", "Expect", "Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host",
		"X-Forwarded-Port", "X-Forwarded-Scheme", "X-Real-Ip", "X-Request-Id":
		return true
	}
	return false
}

// connectionTokens returns the names that a Connection field declares hop-by-hop.
func connectionTokens(h http.Header) []string {
	var out []string
	for _, v := range h["Connection"] {
		for token := range strings.SplitSeq(v, ",") {
			if token = strings.TrimSpace(token); token != "" {
				out = append(out, http.CanonicalHeaderKey(token))
			}
		}
	}
	return out
}

func contains(list []string, s string) bool {
	for _, v := range list {
		if v == s {
			return true
		}
	}
	return false
}

// upgradeOf returns the protocol that a message asks to switch to, or "".
func upgradeOf(h http.Header) string {
	if !httpguts.HeaderValuesContainsToken(h["Connection"], "Upgrade") {
		return ""
	}
	return h.Get("Upgrade")
}

func (x *exchange) fromTrusted() bool {
	for _, p := range x.p.trusted {
		if p.Contains(x.client) {
			return true
		}
	}
	return false
}

// scheme is what the client used, by its own connection or by what a trusted proxy says.
func (x *exchange) scheme() string {
	if x.r.TLS != nil {
		return "https"
	}
	if len(x.p.trusted) > 0 && x.fromTrusted() && strings.EqualFold(x.r.Header.Get("X-Forwarded-Proto"), "https") {
		return "https"
	}
	return "http"
}

// localPort is the port that the client connected to.
func (x *exchange) localPort() string {
	if a, ok := x.r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok {
		return strconv.Itoa(a.Port)
	}
	if x.r.TLS != nil {
		return "443"
	}
	return "80"
}

// writeHead writes the request line and fields for the backend and returns the protocol the client
// wants to switch to, if any. Errors stay in bw until it is flushed.
func (x *exchange) writeHead(bw *bufio.Writer) (upgrade string) {
	r := x.r
	ws := func(parts ...string) {
		for _, s := range parts {
			_, _ = bw.WriteString(s)
		}
	}
	field := func(name, value string) { ws(name, ": ", value, "\r\n") }

	target := r.RequestURI
	if target[0] != '/' && target != "*" {
		target = r.URL.RequestURI() // absolute form
	}
	host := r.Host
	if host == "" {
		host = x.backend.String()
	}
	ws(r.Method, " ", target, " HTTP/1.1\r\nHost: ", host, "\r\n")

	if r.ProtoMajor == 1 && x.body == nil {
		upgrade = upgradeOf(r.Header)
	}
	tokens := connectionTokens(r.Header)
	for name, values := range r.Header {
		if hopByHop(name) || ownField(name) || (len(tokens) > 0 && contains(tokens, name)) {
			continue
		}
		for _, v := range values {
			field(name, v)
		}
	}
	if httpguts.HeaderValuesContainsToken(r.Header["Te"], "trailers") {
		field("Te", "trailers") // gRPC insists
	}
	if upgrade != "" {
		field("Connection", "Upgrade")
		field("Upgrade", upgrade)
	}
	x.forwardedFields(field)

	switch {
	case x.body != nil && r.ContentLength > 0:
		field("Content-Length", strconv.FormatInt(r.ContentLength, 10))
	case x.body != nil:
		field("Transfer-Encoding", "chunked")
		if len(r.Trailer) > 0 {
			var names []string
			for name := range r.Trailer {
				names = append(names, name)
			}
			field("Trailer", strings.Join(names, ", "))
		}
	case r.Method == http.MethodPost || r.Method == http.MethodPut || r.Method == http.MethodPatch:
		field("Content-Length", "0")
	}
	ws("\r\n")
	return upgrade
}

// forwardedFields tells the backend about the client. What the client says about itself counts
// only when it is a trusted proxy.
func (x *exchange) forwardedFields(field func(name, value string)) {
	in := x.r.Header
	client := x.client.WithZone("").String()
	chain, realIP, proto, host, port := client, client, x.scheme(), x.r.Host, ""
	if len(x.p.trusted) > 0 && x.fromTrusted() {
		if prior := strings.Join(in["X-Forwarded-For"], ", "); prior != "" {
			chain = prior + ", " + client
			first, _, _ := strings.Cut(prior, ",")
			if a, err := netip.ParseAddr(strings.TrimSpace(first)); err == nil {
				realIP = a.String()
			}
		}
		if v := in.Get("X-Real-Ip"); v != "" {
			realIP = v
		}
		if v := in.Get("X-Forwarded-Host"); v != "" {
			host = v
		}
		port = in.Get("X-Forwarded-Port")
	}
	if port == "" {
		port = x.localPort()
	}
	field("X-Forwarded-For", chain)
	field("X-Forwarded-Proto", proto)
	field("X-Forwarded-Host", host)
	field("X-Forwarded-Port", port)
	field("X-Real-Ip", realIP)
	field("X-Request-Id", requestID(in))
}

// requestID keeps the client's identifier when it has a sensible size, for tracing across
// systems, or makes one.
func requestID(h http.Header) string {
	if id := h.Get("X-Request-Id"); id != "" && len(id) <= 128 {
		return id
	}
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

// copyReplyHeader takes over the end-to-end fields of a reply.
func copyReplyHeader(dst, src http.Header) {
	tokens := connectionTokens(src)
	for name, values := range src {
		if hopByHop(name) || (len(tokens) > 0 && contains(tokens, name)) {
			continue
		}
		dst[name] = values
	}
}

// inform passes an informational reply on (103 Early Hints).
func (x *exchange) inform(resp *http.Response) {
	if resp.StatusCode == http.StatusContinue || !x.r.ProtoAtLeast(1, 1) {
		return // the server itself answers "Expect: 100-continue" when the body is read
	}
	h := x.w.Header()
	copyReplyHeader(h, resp.Header)
	x.w.WriteHeader(resp.StatusCode)
	clear(h)
}
