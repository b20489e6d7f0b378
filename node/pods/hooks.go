// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"

	"skep.io/skep/node/runtime"
)

// hooks runs postStart and preStop handlers.
type hooks struct {
	runtime runtime.Containers
	client  *http.Client
}

func newHooks(rt runtime.Containers) *hooks {
	return &hooks{runtime: rt, client: &http.Client{Transport: &http.Transport{
		// A handler answers with whatever certificate it has, as kubelet's callers expect.
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, //#nosec G402
		DisableKeepAlives: true,
	}}}
}

// maxHookAnswer bounds what is read of a hook's answer.
const maxHookAnswer = 10 << 10

// ask sends a hook's request. Whatever the answer: who was asked knows, which is all that a hook is for.
func (h *hooks) ask(req *http.Request) error {
	resp, err := h.client.Do(req)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, maxHookAnswer))
	return errors.Join(err, resp.Body.Close())
}

// plainAnswer reports whether a request failed because who was asked by HTTPS speaks HTTP. net/http has no other sign.
func plainAnswer(err error) bool {
	var failed *url.Error
	return errors.As(err, &failed) && strings.Contains(failed.Err.Error(), "server gave HTTP response to HTTPS client")
}

// run executes one handler and returns when it is done or ctx ends. fellBack hears of a host that was to be asked by
// HTTPS, but by HTTP only has answered; nil: nobody.
func (h *hooks) run(ctx context.Context, handler *corev1.LifecycleHandler, c *corev1.Container, id, podIP string, fellBack func(host string)) error {
	switch {
	case handler.Exec != nil:
		var limit time.Duration
		if d, ok := ctx.Deadline(); ok {
			limit = time.Until(d)
		}
		_, stderr, code, err := h.runtime.ExecSync(ctx, id, handler.Exec.Command, limit)
		if err != nil {
			return fmt.Errorf("exec hook of container %s: %w", c.Name, err)
		}
		if code != 0 {
			return fmt.Errorf("exec hook of container %s: command %q exited with %d: %.512s", c.Name, handler.Exec.Command, code, stderr)
		}
		return nil
	case handler.HTTPGet != nil:
		req, err := httpprobe.NewRequestForHTTPGetAction(handler.HTTPGet, c, podIP, "lifecycle")
		if err != nil {
			return fmt.Errorf("http hook of container %s: %w", c.Name, err)
		}
		err = h.ask(req.WithContext(ctx))
		if plainAnswer(err) {
			// Whoever declared HTTPS for what speaks HTTP is served, and told (kubelet: runHTTPHandler).
			plain := req.Clone(ctx)
			plain.URL.Scheme = "http"
			plain.Header.Del("Authorization")
			if err = h.ask(plain); err == nil && fellBack != nil {
				fellBack(req.URL.Host)
			}
		}
		if err != nil {
			return fmt.Errorf("http hook of container %s: %w", c.Name, err)
		}
		return nil
	case handler.Sleep != nil:
		t := time.NewTimer(time.Duration(handler.Sleep.Seconds) * time.Second)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
		return nil
	default:
		return fmt.Errorf("hook of container %s has no handler that a node runs", c.Name)
	}
}
