// SPDX-License-Identifier: Apache-2.0

// Command prog is what the test images contain: a static program that does what a test asks of it.
package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "prog:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		args = []string{"wait"}
	}
	switch args[0] {
	case "wait": // until SIGTERM
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM)
		fmt.Println("ready")
		<-stop
		fmt.Println("bye")
	case "stubborn": // ignores SIGTERM
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("ready")
		time.Sleep(time.Hour)
	case "exit":
		code, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		fmt.Println("to stdout")
		fmt.Fprintln(os.Stderr, "to stderr")
		os.Exit(code)
	case "env":
		for _, e := range os.Environ() {
			fmt.Println(e)
		}
	case "args":
		fmt.Println(strings.Join(args[1:], "|"))
	case "id":
		groups, err := os.Getgroups()
		if err != nil {
			return err
		}
		host, _ := os.Hostname()
		dir, _ := os.Getwd()
		fmt.Println("uid", os.Getuid(), "gid", os.Getgid(), "groups", groups, "host", host, "dir", dir, "pid", os.Getpid())
	case "cat":
		for _, name := range args[1:] {
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			os.Stdout.Write(data)
		}
	case "owner": // of files
		for _, name := range args[1:] {
			st, err := os.Stat(name)
			if err != nil {
				return err
			}
			owner := st.Sys().(*syscall.Stat_t)
			fmt.Println(name, owner.Uid, owner.Gid, st.Mode())
		}
	case "touch":
		return os.WriteFile(args[1], []byte("x"), 0o644)
	case "addrs":
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			return err
		}
		for _, a := range addrs {
			fmt.Println(a)
		}
	case "eat": // memory, until killed
		var kept [][]byte
		for {
			b := make([]byte, 1<<20)
			for i := range b {
				b[i] = 1
			}
			kept = append(kept, b)
		}
	case "echo": // stdin to stdout, a line at a time
		in := bufio.NewScanner(os.Stdin)
		for in.Scan() {
			fmt.Println("echo", in.Text())
		}
		fmt.Println("end of input")
	case "copy":
		_, err := io.Copy(os.Stdout, os.Stdin)
		return err
	case "lines": // n numbered lines, then wait
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		for i := range n {
			fmt.Println("line", i)
		}
		time.Sleep(time.Hour)
	case "tick": // a numbered line each ms, for ever
		for i := 0; ; i++ {
			fmt.Println("tick", i)
			time.Sleep(time.Millisecond)
		}
	case "serve": // answers on a port of loopback
		l, err := net.Listen("tcp", "127.0.0.1:"+args[1])
		if err != nil {
			return err
		}
		fmt.Println("listening")
		for {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			go func() { defer c.Close(); io.WriteString(c, "hello "); io.Copy(c, c) }()
		}
	case "sleep":
		d, err := time.ParseDuration(args[1])
		if err != nil {
			return err
		}
		time.Sleep(d)
	default:
		return fmt.Errorf("what is %q?", args[0])
	}
	return nil
}
