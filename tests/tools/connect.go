// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Rate is what the "connect" tool prints.
type Rate struct {
	Connections int64
	Failed      int64
	Seconds     float64
	LastError   string `json:",omitempty"`
}

// PerSecond is the rate of connections that were answered.
func (r Rate) PerSecond() float64 { return float64(r.Connections) / r.Seconds }

// firstLimit bounds how long a first reply is waited for.
const firstLimit = 30 * time.Second

const exchange = "GET /livez HTTP/1.1\r\nHost: bench\r\n\r\n"

// connectMain opens connections as fast as a number of workers can: connect, one request, one
// reply, reset. The reset keeps ports out of TIME_WAIT, whose re-use would be measured instead.
func connectMain(args []string) error {
	flags := flag.NewFlagSet("connect", flag.ContinueOnError)
	workers := flags.Int("workers", 1, "at once")
	kept := flags.Bool("kept", false, "one connection a worker: requests are counted instead")
	period := flags.Duration("for", 3*time.Second, "how long")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("connect: one ADDRESS:PORT is needed")
	}
	address, err := net.ResolveTCPAddr("tcp", flags.Arg(0))
	if err != nil {
		return err
	}
	var done, failed atomic.Int64
	var last atomic.Value
	var all sync.WaitGroup
	begin := time.Now()
	for range *workers {
		all.Go(func() {
			note := func(err error) {
				if err != nil {
					failed.Add(1)
					last.Store(err.Error())
					return
				}
				done.Add(1)
			}
			buffer := make([]byte, 4096)
			if *kept {
				keep(address, buffer, begin.Add(*period), note)
				return
			}
			for time.Since(begin) < *period {
				note(once(address, buffer))
			}
		})
	}
	all.Wait()
	report := Rate{Connections: done.Load(), Failed: failed.Load(), Seconds: time.Since(begin).Seconds()}
	report.LastError, _ = last.Load().(string)
	return json.NewEncoder(os.Stdout).Encode(report)
}

func once(address *net.TCPAddr, buffer []byte) error {
	conn, err := net.DialTCP("tcp", nil, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetLinger(0); err != nil {
		return err
	}
	return ask(conn, buffer)
}

// keep makes requests on one connection until the end, or until one fails.
func keep(address *net.TCPAddr, buffer []byte, end time.Time, note func(error)) {
	conn, err := net.DialTCP("tcp", nil, address)
	if err != nil {
		note(err)
		return
	}
	defer conn.Close()
	for err == nil && time.Now().Before(end) {
		err = ask(conn, buffer)
		note(err)
	}
}

// ask sends a request; its reply fits into one segment.
func ask(conn *net.TCPConn, buffer []byte) error {
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, exchange); err != nil {
		return err
	}
	_, err := conn.Read(buffer)
	return err
}

// firstMain says "waiting", tries to connect again and again, and prints the time of the first
// reply in nanoseconds since 1970.
func firstMain(args []string) error {
	if len(args) != 1 {
		return errors.New("first: one ADDRESS:PORT is needed")
	}
	address, err := net.ResolveTCPAddr("tcp", args[0])
	if err != nil {
		return err
	}
	fmt.Println("waiting")
	buffer := make([]byte, 4096)
	for deadline := time.Now().Add(firstLimit); time.Now().Before(deadline); time.Sleep(500 * time.Microsecond) {
		if once(address, buffer) == nil {
			fmt.Println(time.Now().UnixNano())
			return nil
		}
	}
	return fmt.Errorf("no reply from %s within %s", address, firstLimit)
}
