// SPDX-License-Identifier: Apache-2.0

package inprocess

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func roundTrip(t *testing.T, ctx context.Context, h http.HandlerFunc, method, body string) (*http.Response, error) {
	t.Helper()
	tr := New(slog.New(slog.DiscardHandler))
	tr.Serve(h)
	req, err := http.NewRequestWithContext(ctx, method, "https://host:1/path?q=1", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	return tr.RoundTrip(req)
}

func TestTransportCarriesRequestAndResponse(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	resp, err := roundTrip(t, t.Context(), func(w http.ResponseWriter, r *http.Request) {
		in, _ := io.ReadAll(r.Body)
		w.Header().Set("X", "y")
		w.WriteHeader(http.StatusTeapot)
		w.Header().Set("Late", "z")
		fmt.Fprintf(w, "%s %s %s %s", r.Method, r.RequestURI, r.Host, in)
	}, http.MethodPut, "body")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err != nil || string(out) != "PUT /path?q=1 host:1 body" {
		t.Errorf("body %q, %v", out, err)
	}
	if resp.StatusCode != http.StatusTeapot || resp.Header.Get("X") != "y" || resp.Header.Get("Late") != "" {
		t.Errorf("status %d, header %v", resp.StatusCode, resp.Header)
	}
}

func TestTransportWithoutHandlerRefuses(t *testing.T) {
	tr := New(nil)
	req, _ := http.NewRequest(http.MethodGet, "https://host/", nil)
	if _, err := tr.RoundTrip(req); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("got %v", err)
	}
}

type key struct{}

func TestTransportPassesTheEndOfAContextButNotItsValues(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "secret"))
	ended := make(chan any, 1)
	resp, err := roundTrip(t, ctx, func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush() // headers of a watch
		<-r.Context().Done()
		ended <- r.Context().Value(key{})
	}, http.MethodGet, "")
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if v := <-ended; v != nil {
		t.Errorf("handler saw %v", v)
	}
	if _, err := io.ReadAll(resp.Body); !errors.Is(err, context.Canceled) {
		t.Errorf("read: %v", err)
	}
	resp.Body.Close()
}

func TestTransportEndsBeforeHeaders(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(time.Millisecond, cancel)
	_, err := roundTrip(t, ctx, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, http.MethodGet, "")
	// Whoever notices first: the caller its context, or the handler, which then answers nothing.
	if err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestTransportHoldsBackAWriterWhoseReaderIsSlow(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	const chunk, chunks = 64 << 10, 64
	wrote := make(chan int, chunks+1)
	resp, err := roundTrip(t, t.Context(), func(w http.ResponseWriter, r *http.Request) {
		for i := range chunks {
			if _, err := w.Write(make([]byte, chunk)); err != nil {
				t.Error(err)
			}
			wrote <- i
		}
	}, http.MethodGet, "")
	if err != nil {
		t.Fatal(err)
	}
	for range bodyLimit / chunk {
		<-wrote
	}
	select {
	case i := <-wrote:
		t.Errorf("chunk %d was written before any was read", i)
	case <-time.After(20 * time.Millisecond): // nothing can announce that nothing happens
	}
	out, err := io.ReadAll(resp.Body)
	if err != nil || len(out) != chunk*chunks {
		t.Errorf("%d bytes, %v", len(out), err)
	}
	resp.Body.Close()
}

func TestTransportEndsAWriterWhoseReaderLeft(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ended := make(chan error, 1)
	resp, err := roundTrip(t, t.Context(), func(w http.ResponseWriter, r *http.Request) {
		var err error
		for err == nil {
			_, err = w.Write(make([]byte, 64<<10))
		}
		ended <- err
	}, http.MethodGet, "")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if err := <-ended; !errors.Is(err, errReaderGone) {
		t.Errorf("got %v", err)
	}
}

func TestTransportSurvivesAPanic(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	for _, p := range []any{"boom", http.ErrAbortHandler} {
		resp, err := roundTrip(t, t.Context(), func(http.ResponseWriter, *http.Request) { panic(p) }, http.MethodGet, "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(resp.Body); resp.StatusCode != http.StatusInternalServerError || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%v: status %d, %v", p, resp.StatusCode, err)
		}
		resp.Body.Close()
	}
}
