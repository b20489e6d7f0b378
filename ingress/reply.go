// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
)

// pages are what skep itself answers. They say what an operator should look at, and nothing about
// the inside of the cluster.
var pages = map[int]string{
	http.StatusBadRequest:            "400 bad request: skep does not forward this\n",
	http.StatusNotFound:              "404 not found: no Ingress has a rule for this host and path\n",
	http.StatusRequestTimeout:        "408 request time-out: the request's body did not arrive\n",
	http.StatusRequestEntityTooLarge: "413 request body too large: see the annotation skep.io/proxy-body-size\n",
	http.StatusBadGateway:            "502 bad gateway: the application could not be reached or did not answer properly\n",
	http.StatusServiceUnavailable:    "503 service unavailable: the application has no ready endpoints\n",
	http.StatusGatewayTimeout:        "504 gateway time-out: the application did not answer in time\n",
}

// page answers the request without a backend.
func (x *exchange) page(code int) {
	h := x.w.Header()
	clear(h)
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	if code == http.StatusServiceUnavailable {
		h.Set("Retry-After", "1")
	}
	body := pages[code]
	h.Set("Content-Length", strconv.Itoa(len(body)))
	unread := x.r.ContentLength != 0 && (x.body == nil || !x.body.eof.Load())
	if (unread || code == http.StatusBadRequest) && x.r.ProtoMajor == 1 {
		h.Set("Connection", "close") // what follows is a body nobody reads
	}
	x.status = code
	x.w.WriteHeader(code)
	if x.r.Method != http.MethodHead {
		n, err := x.w.Write([]byte(body))
		x.sent = int64(n)
		x.why = cmpErr(x.why, err)
	}
}

// redirect sends the client to the same place over HTTPS.
func (x *exchange) redirect(host string) {
	if a := net.ParseIP(host); a != nil && a.To4() == nil {
		host = "[" + host + "]"
	}
	if p := x.p.httpsPort; p != 443 {
		host = host + ":" + strconv.Itoa(int(p))
	}
	target := x.r.RequestURI
	if target[0] != '/' {
		target = x.r.URL.RequestURI()
	}
	h := x.w.Header()
	h.Set("Location", "https://"+host+target)
	h.Set("Content-Length", "0")
	if x.r.ContentLength != 0 && x.r.ProtoMajor == 1 {
		h.Set("Connection", "close")
	}
	x.status = http.StatusPermanentRedirect
	x.w.WriteHeader(x.status)
}

// statusClientGone is what nginx logs for a client that left before it had a reply.
const statusClientGone = 499

// fail answers for an error that came before the reply's head.
func (x *exchange) fail(err error) {
	x.why = err
	var ce *clientError
	switch {
	case errors.Is(err, errBodyTooLarge):
		x.page(http.StatusRequestEntityTooLarge)
	case errors.As(err, &ce) && isTimeout(err):
		x.page(http.StatusRequestTimeout)
	case errors.As(err, &ce) && x.r.Context().Err() == nil && !errors.Is(err, io.ErrUnexpectedEOF):
		x.page(http.StatusBadRequest) // not a proper body
	case ce != nil, errors.Is(err, context.Canceled):
		x.status = statusClientGone
		panic(http.ErrAbortHandler)
	case errors.Is(err, errNoEndpoints):
		x.page(http.StatusServiceUnavailable)
	case isTimeout(err):
		x.page(http.StatusGatewayTimeout)
	default:
		x.page(http.StatusBadGateway)
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || (errors.As(err, &ne) && ne.Timeout())
}

// idempotent says which methods may be sent again when the first attempt got no reply (RFC 9110, 9.2.2).
func idempotent(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return false
}
