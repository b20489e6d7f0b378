// SPDX-License-Identifier: Apache-2.0

// Package cluster starts skep on machines that are namespaces: each node has its own network,
// mount, UTS and cgroup namespace, its own cgroup in every hierarchy, and no route out. Process ids
// are the host's, because a shim has to outlive the server that started it.
//
// A process of this package inside a node is the running binary calling itself, so a program that
// uses the package calls [Helper] first thing in main or TestMain.
package cluster

import (
	"fmt"
	"os"

	"skep.io/skep/tests/tools"
)

// helperArg marks a call of the binary to itself; it is no flag that anybody types.
const helperArg = "skep-cluster-helper"

// helpers are the roles that such a call can have, beside package tools' ones.
var helpers = map[string]func(args []string) error{
	"join":     joinMain,     // stage one of a node's init: enter fresh cgroups and namespaces
	"init":     initMain,     // stage two: mounts, then start and reap what it is told to
	"enter":    enterMain,    // run one command inside a node
	"leaks":    leaksMain,    // print what exists in the node, as JSON
	"registry": registryMain, // an image registry on the node
	"etcd":     etcdMain,     // an etcd on the node
}

// Helper runs the role that the command line names and ends the process; it returns at once in
// every other process.
func Helper() {
	if !isHelper() {
		return
	}
	run := helpers[os.Args[2]]
	if run == nil {
		run = tools.Tools[os.Args[2]]
	}
	if run == nil {
		fmt.Fprintf(os.Stderr, "unknown helper %q\n", os.Args[2])
		os.Exit(2)
	}
	if err := run(os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// isHelper tells a call of the binary to itself.
func isHelper() bool { return len(os.Args) >= 3 && os.Args[1] == helperArg }

// self is the command line of a helper.
func self(role string, args ...string) []string {
	return append([]string{"/proc/self/exe", helperArg, role}, args...)
}
