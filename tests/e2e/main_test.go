// SPDX-License-Identifier: Apache-2.0

// Package e2e runs scripts that use skep as a person would. Those in testdata/shared have a namespace
// each on one node; those in testdata/own make and break nodes of their own.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"skep.io/skep/api"
	"skep.io/skep/tests/cluster"
	"skep.io/skep/tests/tools"
)

// The scripts' way to the machines.
const (
	nodeEnv    = "SKEP_TEST_NODE"    // place of the node
	outsideEnv = "SKEP_TEST_OUTSIDE" // place of the client on the node's LAN
	pathEnv    = "SKEP_TEST_PATH"    // PATH on the node
	kubectlEnv = "SKEP_TEST_KUBECTL" // the kubectl of whoever runs the tests
)

func TestMain(m *testing.M) {
	cluster.Helper()
	// Before testscript puts this binary's own kubectl first in PATH, and only once.
	if _, known := os.LookupEnv(kubectlEnv); !known {
		file, _ := exec.LookPath("kubectl")
		if err := os.Setenv(kubectlEnv, file); err != nil {
			panic(err)
		}
	}
	testscript.Main(m, map[string]func(){
		"skep":    command(nodeEnv, "skep"),
		"kubectl": command(nodeEnv, "kubectl"),
		"node":    command(nodeEnv),
		"outside": command(outsideEnv),
		"on":      onAgent,
	})
}

// command is a program for scripts that runs its arguments, after first, elsewhere.
func command(where string, first ...string) func() {
	return func() {
		if err := elsewhere(os.Getenv(where), append(first, os.Args[1:]...)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

// onAgent runs a command on the agent that the first argument names.
func onAgent() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: on AGENT COMMAND...")
		os.Exit(2)
	}
	if err := elsewhere(os.Getenv(agentEnv(os.Args[1])), os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// agentEnv is the variable with the place of an agent.
func agentEnv(name string) string { return nodeEnv + "_" + name }

func elsewhere(place string, argv []string) error {
	if place == "" {
		return errors.New("there is no node yet: the script needs `server start` or `machine`")
	}
	if len(argv) == 0 {
		return errors.New("a command is needed")
	}
	if err := os.Setenv("PATH", os.Getenv(pathEnv)); err != nil {
		return err
	}
	if tools.Tools[argv[0]] != nil {
		return cluster.EnterTool(place, argv[0], argv[1:])
	}
	if argv[0] == "kubectl" {
		if argv[0] = os.Getenv(kubectlEnv); argv[0] == "" {
			return errors.New("no kubectl in PATH: install one, or run `make test`, which builds it")
		}
		if os.Getenv("KUBECONFIG") == "" {
			if err := os.Setenv("KUBECONFIG", api.KubeconfigPath); err != nil {
				return err
			}
		}
	}
	return cluster.EnterFrom(place, argv)
}

// limits of one step; generous, because tests share two cores.
const (
	readyLimit = 3 * time.Minute
	stepLimit  = 90 * time.Second
)

func newNode(ctx context.Context, built cluster.Built, name, dir string, args ...string) (*cluster.Node, error) {
	return cluster.NewNode(ctx, cluster.Options{
		Name: fmt.Sprintf("%s-%d", name, os.Getpid()), Dir: dir, Bin: built.Bin, ImagesDir: built.Images, Args: args,
	})
}
