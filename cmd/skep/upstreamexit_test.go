// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"testing"
)

// TestUpstreamExit: a library that ends the process because it was interrupted ends its goroutine and nothing else.
func TestUpstreamExit(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	exit := upstreamExit(ctx)
	cancel()
	ended, wentOn := make(chan struct{}), false
	go func() {
		defer close(ended)
		exit(255)
		wentOn = true
	}()
	<-ended
	if wentOn {
		t.Error("who wanted to end the process went on")
	}
}
