// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/http"
	"net/http/pprof"
)

// profileOrders tell this host's root what the process does with its time and memory, for `go tool pprof`:
//
//	curl --unix-socket /run/skep/control/server.sock http://server/debug/pprof/heap > heap
func profileOrders(orders *http.ServeMux) {
	orders.HandleFunc("GET /debug/pprof/", pprof.Index)
	orders.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	orders.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
}
