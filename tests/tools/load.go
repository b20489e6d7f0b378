// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

// LoadReport is what a load generator prints when it ends.
type LoadReport struct {
	Requests    int      // answered with 200
	Connections int      // opened
	Errors      []string // the first ones
	Failed      int      // all
}

const keptErrors = 10

// loadMain makes requests until its standard input ends: some clients each keep one connection,
// which must live as long as the load does; others open a new one for each request. It prints
// "ready" once each client had its first answer, and a LoadReport at the end.
func loadMain(args []string) error {
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	kept := flags.Int("kept", 4, "clients that keep their connection")
	fresh := flags.Int("new", 0, "clients that open a connection a request")
	pause := flags.Duration("pause", 2*time.Millisecond, "between a client's requests")
	host := flags.String("host", "", "Host header")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("load: one URL is needed")
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	l := &load{url: flags.Arg(0), host: *host, pause: *pause}
	var all, first sync.WaitGroup
	for i := range *kept + *fresh {
		all.Add(1)
		first.Add(1)
		go func() {
			defer all.Done()
			l.client(ctx, i < *kept, sync.OnceFunc(first.Done))
		}()
	}
	go func() {
		first.Wait()
		fmt.Println("ready")
	}()
	_, _ = io.Copy(io.Discard, os.Stdin)
	cancel()
	all.Wait()
	return json.NewEncoder(os.Stdout).Encode(l.report)
}

type load struct {
	url, host string
	pause     time.Duration

	mu     sync.Mutex
	report LoadReport
}

func (l *load) note(change func(*LoadReport)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change(&l.report)
}

func (l *load) client(ctx context.Context, keep bool, answered func()) {
	// Whoever waits for the first answers must not wait for a client that ended without one.
	defer answered()
	dials := 0
	dialer := net.Dialer{Timeout: 5 * time.Second}
	transport := &http.Transport{
		DisableKeepAlives: !keep, MaxConnsPerHost: 1, ResponseHeaderTimeout: 10 * time.Second,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if dials++; keep && dials > 1 {
				return nil, errors.New("the established connection broke")
			}
			l.note(func(r *LoadReport) { r.Connections++ })
			return dialer.DialContext(ctx, network, address)
		},
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	for {
		// One request comes after the end, so that a connection that died just before it is found.
		last := ctx.Err() != nil
		err := l.request(client)
		if err == nil {
			l.note(func(r *LoadReport) { r.Requests++ })
			answered()
		} else {
			l.note(func(r *LoadReport) {
				if r.Failed++; len(r.Errors) < keptErrors {
					r.Errors = append(r.Errors, time.Now().Format(time.StampMilli)+" "+err.Error())
				}
			})
			if keep {
				return // its one connection is lost
			}
		}
		if last {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(l.pause):
		}
	}
}

// request is not cut short by the end of the load: a request that was sent gets its answer.
func (l *load) request(client *http.Client) error {
	request, err := http.NewRequest(http.MethodGet, l.url, nil)
	if err != nil {
		return err
	}
	request.Host = l.host
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("status %s", response.Status)
	}
	return nil
}
