// SPDX-License-Identifier: Apache-2.0

// Command skep-cluster keeps nodes of the test harness running, to look at it by hand.
//
//	skep-cluster up [-name N] [-agents COUNT] [-no-server] [-images DIR] [-- SERVER-FLAGS...]  until ^C; then reset and leak check
//	skep-cluster exec [-name N] [-outside | -agent 1..COUNT] COMMAND...  inside the node, at its client, or inside an agent
//	skep-cluster server [-name N] kill|restart
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"skep.io/skep/tests/cluster"
)

func main() {
	cluster.Helper()
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "skep-cluster:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return errors.New("usage: skep-cluster up|exec|server ...")
	}
	flags := flag.NewFlagSet(args[0], flag.ExitOnError)
	name := flags.String("name", "try", "of the node")
	outside := flags.Bool("outside", false, "at the client")
	agents := flags.Int("agents", 0, "how many machines join the server")
	agent := flags.Int("agent", 0, "in the agent of that number")
	images := flags.String("images", "", "directory of archives to import in place of the test images")
	bare := flags.Bool("no-server", false, "start no server")
	_ = flags.Parse(args[1:]) // exits on errors
	dir := filepath.Join(os.TempDir(), "skep-cluster-"+*name)
	switch args[0] {
	case "up":
		return up(*name, dir, *images, *bare, *agents, flags.Args())
	case "exec":
		place := "node"
		switch {
		case *outside:
			place = "outside"
		case *agent > 0:
			place = agentName(*agent)
		}
		where, err := os.ReadFile(filepath.Join(dir, place))
		if err != nil {
			return err
		}
		for key, value := range map[string]string{
			"PATH": os.Getenv("SKEP_BIN") + ":" + readOr(filepath.Join(dir, "bin")) + ":" + os.Getenv("PATH"), "HOME": "/var/home", "KUBECONFIG": "/etc/skep/kubeconfig",
		} {
			if err := os.Setenv(key, value); err != nil {
				return err
			}
		}
		if argv := flags.Args(); len(argv) > 0 && (argv[0] == "http" || argv[0] == "dial" || argv[0] == "load") {
			return cluster.EnterTool(string(where), argv[0], argv[1:])
		}
		return cluster.EnterFrom(string(where), flags.Args())
	case "server":
		var pid int
		if _, err := fmt.Sscan(readOr(filepath.Join(dir, "pid")), &pid); err != nil {
			return err
		}
		signals := map[string]unix.Signal{"kill": unix.SIGUSR1, "restart": unix.SIGUSR2}
		sig, ok := signals[strings.Join(flags.Args(), " ")]
		if !ok {
			return errors.New("server: kill or restart")
		}
		return unix.Kill(pid, sig)
	}
	return fmt.Errorf("unknown command %s", args[0])
}

func readOr(path string) string {
	raw, _ := os.ReadFile(path) // absent: empty
	return string(raw)
}

func agentName(number int) string { return fmt.Sprintf("agent%d", number) }

// addAgents makes machines that join the server n.
func addAgents(ctx context.Context, n *cluster.Node, dir string, count int) (agents []*cluster.Node, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for i := range count {
		name := agentName(i + 1)
		token, err := n.Token(ctx)
		if err != nil {
			return agents, err
		}
		a, err := cluster.Start(ctx, cluster.Options{
			Name: n.Name + "-" + name, Dir: filepath.Join(dir, name+".d"), Bin: n.Bin, ImagesDir: n.ImagesDir, Of: n, Args: []string{"--token", token},
		})
		if err != nil {
			return agents, err
		}
		agents = append(agents, a)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(a.Place()), 0o600); err != nil {
			return agents, err
		}
		if err := a.WaitReady(ctx); err != nil {
			return agents, err
		}
		fmt.Printf("node %s is Ready at %s; log in %s\n", a.Name, a.Addrs[0], a.LogPath())
	}
	return agents, nil
}

func up(name, dir, images string, bare bool, count int, serverArgs []string) error {
	ctx := context.Background()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2)
	built, err := cluster.Build(ctx, ".build/e2e")
	if err != nil {
		return err
	}
	if images == "" {
		images = built.Images
	}
	n, err := cluster.NewNode(ctx, cluster.Options{Name: name, Dir: dir, Bin: built.Bin, ImagesDir: images, Args: serverArgs})
	if err != nil {
		return err
	}
	defer func() {
		if err := n.Discard(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}()
	for file, content := range map[string]string{
		"node": n.Place(), "outside": n.LAN.Place(), "bin": built.Bin, "pid": fmt.Sprint(os.Getpid()),
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
			return err
		}
	}
	restart := func() {
		begin := time.Now()
		ready, cancel := context.WithTimeout(ctx, 2*time.Minute)
		defer cancel()
		if err := n.Restart(ready); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return
		}
		fmt.Printf("node %s is Ready after %s; log in %s\n", name, time.Since(begin).Round(time.Millisecond), n.LogPath())
	}
	if !bare {
		restart()
	}
	agents, err := addAgents(ctx, n, dir, count)
	defer func() {
		for _, a := range agents {
			if err := a.Discard(ctx); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}
	}()
	if err != nil {
		return err
	}
	for sig := range signals {
		switch sig {
		case unix.SIGUSR1:
			if err := n.Kill(ctx); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		case unix.SIGUSR2:
			restart()
		default:
			for _, a := range agents {
				err = errors.Join(err, a.Stop(ctx))
			}
			return errors.Join(err, n.Stop(ctx))
		}
	}
	return nil
}
