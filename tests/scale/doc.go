// SPDX-License-Identifier: Apache-2.0

// Command scale lets one server control many hollow nodes, and prints what that costs it.
//
// A hollow node is what the API sees of an agent, without containers, networks and a machine: it registers, renews its
// lease, follows its own pods and what every agent follows of the cluster, says of each new pod that it runs and is
// ready, and takes a deleted one away. All of them are this process; the server is a real one on a machine of the
// harness, and all that is measured is measured from outside of it.
package main
