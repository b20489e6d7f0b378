// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

// dialMain opens one connection and prints what became of it.
func dialMain(args []string) error {
	flags := flag.NewFlagSet("dial", flag.ContinueOnError)
	pattern := flags.String("until", "", "repeat until the outcome matches")
	limit := flags.Duration("limit", time.Minute, "how long to repeat")
	network := flags.String("net", "tcp", "tcp or udp")
	send := flags.String("send", "", "send this and print the reply")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("dial: one HOST:PORT is needed")
	}
	return until(*pattern, *limit, func(ctx context.Context) (string, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, *network, flags.Arg(0))
		if err != nil {
			return "", err
		}
		defer conn.Close()
		out := "connected to " + conn.RemoteAddr().String() + "\n"
		if *send == "" {
			return out, nil
		}
		deadline := time.Now().Add(2 * time.Second) // a lost datagram is sent again by -until
		_ = conn.SetDeadline(deadline)
		if _, err := io.WriteString(conn, *send); err != nil {
			return out, err
		}
		reply := make([]byte, 64<<10)
		n, err := conn.Read(reply)
		return out + string(reply[:n]) + "\n", err
	})
}

// serveMain is a host outside the cluster: it tells each client the address it sees. It ends with
// its standard input, unless that is to be passed over.
func serveMain(args []string) error {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	forever := flags.Bool("forever", false, "go on when standard input has ended")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("serve: one address to listen on is needed")
	}
	l, err := net.Listen("tcp", flags.Arg(0))
	if err != nil {
		return err
	}
	fmt.Println("listening on", l.Addr())
	if !*forever {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			_ = l.Close()
		}()
	}
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "you are %s\n", host)
	})}
	if err := server.Serve(l); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
