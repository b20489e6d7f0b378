// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"bufio"
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
	// Lost are the failed ones by the address that their connection led to, behind any service; "" where that cannot
	// be told: the kernel had ended the connection.
	Lost map[string]int `json:",omitempty"`
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
	count := flags.Int("count", 0, "end after so many requests; 0: when told to")
	host := flags.String("host", "", "Host header")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("load: one URL is needed")
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	l := &load{url: flags.Arg(0), host: *host, pause: *pause, count: *count, enough: cancel}
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
	if *count == 0 {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}
	all.Wait()
	return json.NewEncoder(os.Stdout).Encode(l.report)
}

type load struct {
	url, host string
	pause     time.Duration
	count     int // of requests until enough is called
	enough    func()

	mu     sync.Mutex
	report LoadReport
}

func (l *load) note(change func(*LoadReport)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change(&l.report)
	if l.count > 0 && l.report.Requests+l.report.Failed >= l.count {
		l.enough()
	}
}

func (l *load) client(ctx context.Context, keep bool, answered func()) {
	// Whoever waits for the first answers must not wait for a client that ended without one.
	defer answered()
	k := &keptConnection{load: l, keep: keep}
	defer k.close()
	for {
		// One request comes after the end, so that a connection that died just before it is found.
		last := ctx.Err() != nil
		err := k.request()
		if err == nil {
			l.note(func(r *LoadReport) { r.Requests++ })
			answered()
		} else {
			peer := k.peerNow()
			l.note(func(r *LoadReport) {
				if r.Lost == nil {
					r.Lost = map[string]int{}
				}
				r.Lost[peer]++
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
		if !keep {
			k.close()
		}
		select {
		case <-ctx.Done():
		case <-time.After(l.pause):
		}
	}
}

// limit of one request, connecting included.
const limit = 10 * time.Second

// keptConnection makes requests one after the other on one connection. It is not net/http's client:
// that one also gives up healthy connections, for instance when its own goroutines have to wait for
// a processor for 50 ms.
type keptConnection struct {
	load    *load
	keep    bool // for longer than a request
	conn    net.Conn
	reader  *bufio.Reader
	message *http.Request
	socket  *socket
	peer    string // where a kept connection leads to
}

// dial opens a connection to the load's target.
func (k *keptConnection) dial() error {
	request, err := http.NewRequest(http.MethodGet, k.load.url, nil)
	if err != nil {
		return err
	}
	if k.load.host != "" {
		request.Host = k.load.host
	}
	address := request.URL.Host
	if request.URL.Port() == "" {
		address = net.JoinHostPort(request.URL.Hostname(), "80")
	}
	k.load.note(func(r *LoadReport) { r.Connections++ })
	k.socket = &socket{}
	d := net.Dialer{Timeout: limit, Control: k.socket.hold}
	conn, err := d.Dial("tcp", address)
	if err != nil {
		return err
	}
	k.conn, k.message, k.reader = conn, request, bufio.NewReader(conn)
	if k.keep {
		k.peer = k.socket.peer()
	}
	return nil
}

// peerNow is the address that the connection leads to, or led to.
func (k *keptConnection) peerNow() string {
	if k.peer != "" || k.socket == nil {
		return k.peer
	}
	return k.socket.peer()
}

// close ends the connection; the next request has another.
func (k *keptConnection) close() {
	if k.conn != nil {
		_ = k.conn.Close() // whatever becomes of it, the answer is there
	}
	if k.socket != nil {
		k.socket.release()
	}
	k.conn, k.socket, k.peer = nil, nil, ""
}

// request is not cut short by the end of the load: a request that was sent gets its answer.
func (k *keptConnection) request() error {
	if k.conn == nil {
		if err := k.dial(); err != nil {
			return err
		}
	}
	if err := k.conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	if err := k.message.Write(k.conn); err != nil {
		return fmt.Errorf("%s -> %s: %w", k.conn.LocalAddr(), k.conn.RemoteAddr(), err)
	}
	response, err := http.ReadResponse(k.reader, k.message)
	if err != nil {
		return fmt.Errorf("%s -> %s: %w", k.conn.LocalAddr(), k.conn.RemoteAddr(), err)
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
