// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/gorilla/websocket"
)

// headers collects repeated -H flags.
type headers http.Header

func (h headers) String() string { return "" }

func (h headers) Set(line string) error {
	name, value, ok := strings.Cut(line, ":")
	if !ok {
		return fmt.Errorf("header %q has no colon", line)
	}
	http.Header(h).Add(strings.TrimSpace(name), strings.TrimSpace(value))
	return nil
}

// until repeats try until its outcome, output and error together, matches pattern. An empty pattern
// tries once.
func until(pattern string, limit time.Duration, try func(context.Context) (string, error)) error {
	re, err := regexp.Compile("(?ms)" + pattern)
	if err != nil {
		return fmt.Errorf("pattern: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for {
		attempt, done := context.WithTimeout(ctx, 5*time.Second)
		out, err := try(attempt)
		done()
		if pattern == "" {
			fmt.Print(out)
			return err
		}
		outcome := out
		if err != nil {
			outcome += "\n" + err.Error()
		}
		if re.MatchString(outcome) {
			fmt.Println(outcome)
			return nil
		}
		select {
		case <-ctx.Done():
			fmt.Println(outcome)
			return fmt.Errorf("no answer like %q within %s", pattern, limit)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// httpMain makes one request, or as many as it takes, and prints status, headers and body.
func httpMain(args []string) error {
	flags := flag.NewFlagSet("http", flag.ContinueOnError)
	pattern := flags.String("until", "", "repeat until the answer matches")
	limit := flags.Duration("limit", time.Minute, "how long to repeat")
	method := flags.String("X", http.MethodGet, "method")
	body := flags.String("d", "", "body")
	host := flags.String("host", "", "Host header, and TLS server name, when the URL has an address")
	ca := flags.String("ca", "", "PEM file of the authority to trust; without it any certificate will do")
	ws := flags.String("ws", "", "open a WebSocket, send this, print the reply")
	local := flags.String("source", "", "address to call from")
	header := headers{}
	flags.Var(header, "H", "header, repeatable")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("http: one URL is needed")
	}
	url := flags.Arg(0)
	dialer := &net.Dialer{}
	if *local != "" {
		dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(*local)}
	}
	tlsConfig := &tls.Config{ServerName: *host, InsecureSkipVerify: *ca == ""}
	if *ca != "" {
		pem, err := os.ReadFile(*ca)
		if err != nil {
			return err
		}
		tlsConfig.RootCAs = x509.NewCertPool()
		if !tlsConfig.RootCAs.AppendCertsFromPEM(pem) {
			return fmt.Errorf("no certificate in %s", *ca)
		}
	}
	if *ws != "" {
		return until(*pattern, *limit, func(ctx context.Context) (string, error) {
			d := websocket.Dialer{NetDialContext: dialer.DialContext, TLSClientConfig: tlsConfig}
			h := http.Header(header).Clone()
			if *host != "" {
				h.Set("Host", *host)
			}
			return echoWebSocket(ctx, d, url, h, *ws)
		})
	}
	return until(*pattern, *limit, func(ctx context.Context) (string, error) {
		client := &http.Client{
			Transport: &http.Transport{
				DialContext: dialer.DialContext, TLSClientConfig: tlsConfig, DisableKeepAlives: true, ForceAttemptHTTP2: true,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
		request, err := http.NewRequestWithContext(ctx, *method, url, strings.NewReader(*body))
		if err != nil {
			return "", err
		}
		request.Header = http.Header(header).Clone()
		request.Host = *host
		response, err := client.Do(request)
		if err != nil {
			return "", err
		}
		defer response.Body.Close()
		content, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
		return render(response, content), err
	})
}

func render(response *http.Response, content []byte) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s\n", response.Proto, response.Status)
	if response.TLS != nil && len(response.TLS.PeerCertificates) > 0 {
		fmt.Fprintf(&b, "certificate: %s %v\n", response.TLS.PeerCertificates[0].Subject, response.TLS.PeerCertificates[0].DNSNames)
	}
	names := make([]string, 0, len(response.Header))
	for name := range response.Header {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(&b, "%s: %s\n", name, strings.Join(response.Header[name], ", "))
	}
	fmt.Fprintf(&b, "\n%s", content)
	return b.String()
}

func echoWebSocket(ctx context.Context, d websocket.Dialer, url string, h http.Header, message string) (string, error) {
	conn, response, err := d.DialContext(ctx, url, h)
	if err != nil {
		if response != nil {
			return response.Status, err
		}
		return "", err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetReadDeadline(deadline)
	}
	if err := conn.WriteMessage(websocket.TextMessage, []byte(message)); err != nil {
		return "", err
	}
	_, reply, err := conn.ReadMessage()
	return "websocket: " + string(reply) + "\n", err
}
