// SPDX-License-Identifier: Apache-2.0

// Package tools has the small network programs that tests run on nodes, in pods and outside: a
// fresh machine may have no curl, and these wait for what a test wants to see.
package tools

// Tools by their names; each takes a command line, writes to standard output, and may read standard
// input to know when to end.
var Tools = map[string]func(args []string) error{
	"http":    httpMain,    // a small client
	"dial":    dialMain,    // one connection, and what became of it
	"serve":   serveMain,   // a server that tells each client the address it sees
	"echo":    echoMain,    // sends back what it gets, over TCP and UDP, with its host name in front
	"load":    loadMain,    // requests until told to stop
	"connect": connectMain, // connections as fast as can be
	"first":   firstMain,   // when something first replied
	"csi":     csiMain,     // a CSI driver
	"disk":    diskMain,    // a block device
	"health":  healthMain,  // what probes ask, over gRPC and HTTPS
}
