// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"

	"skep.io/skep/tests/cluster"
)

// agentCommand makes and breaks nodes beside the script's server. For agent NAME it sets $NAME to the
// node's name, $NAME_IP and $NAME_IP6 to its addresses, NAME in capitals.
func agentCommand(ts *testscript.TestScript, neg bool, args []string) { machines(ts, neg, args, false) }

// peerCommand is agentCommand for further servers.
func peerCommand(ts *testscript.TestScript, neg bool, args []string) { machines(ts, neg, args, true) }

func machines(ts *testscript.TestScript, neg bool, args []string, peer bool) {
	positive(ts, neg)
	if len(args) < 2 {
		ts.Fatalf("usage: agent make|start|kill|stop|restart|ready|reset NAME [ARG...]")
	}
	s := state(ts)
	if !s.own || s.node == nil {
		ts.Fatalf("agents need a server of the script's own")
	}
	ctx, cancel := context.WithTimeout(context.Background(), readyLimit)
	defer cancel()
	name := args[1]
	a := s.agents[name]
	if a == nil && (args[0] == "make" || args[0] == "start") {
		var err error
		if a, err = s.newAgent(name, peer); err != nil {
			ts.Fatalf("make agent %s: %v", name, err)
		}
		if s.agents == nil {
			s.agents = map[string]*cluster.Node{}
		}
		s.agents[name] = a
		variable := strings.ToUpper(name)
		ts.Setenv(agentEnv(name), a.Place())
		ts.Setenv(variable, a.Name)
		ts.Setenv(variable+"_IP", a.Addrs[0].String())
		ts.Setenv(variable+"_IP6", a.Addrs[1].String())
	}
	if a == nil {
		ts.Fatalf("there is no agent %s", name)
	}
	switch args[0] {
	case "make":
	case "start":
		a.Args = args[2:]
		ts.Check(a.StartServer())
	case "restart":
		ts.Check(a.StartServer())
	case "kill":
		ts.Check(a.Kill(ctx))
	case "stop":
		ts.Check(a.Shutdown(ctx))
	case "ready":
		ts.Check(a.WaitReady(ctx))
	case "reset":
		ts.Check(a.Reset(ctx))
	default:
		ts.Fatalf("agent: unknown %q", args[0])
	}
}
