// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/tests/cluster"
)

// serviceSection measures from the creation of a service, whose pod is there, to the first reply that
// a pod gets through it.
func serviceSection(ctx context.Context, b *bench) (err error) {
	n, err := b.node(ctx, "service")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Discard(context.WithoutCancel(ctx))) }()
	client, _, err := twoPods(ctx, n)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, n.Diagnose(ctx, ""))
	}
	var took []time.Duration
	for i := range b.samples(30) {
		d, err := oneService(ctx, n, client, i)
		if err != nil {
			return fmt.Errorf("%w\n%s", err, n.Diagnose(ctx, ""))
		}
		took = append(took, d)
	}
	b.add("service created to first reply, median", milliseconds(median(took)), "", "", "20 ms")
	b.add("the same, p99", milliseconds(quantile(took, 0.99)), "", "", "")
	return nil
}

func oneService(ctx context.Context, n *cluster.Node, client string, i int) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	api, err := n.Kubernetes()
	if err != nil {
		return 0, err
	}
	services := api.CoreV1().Services(metav1.NamespaceDefault)
	// The client knows the address before the service exists, and tries all the time.
	name, address := fmt.Sprintf("svc-%d", i), fmt.Sprintf("10.43.77.%d", i+1)
	cmd, err := n.PodTool(ctx, client, "first", address+":80")
	if err != nil {
		return 0, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	out := bufio.NewReader(stdout)
	if line, err := out.ReadString('\n'); err != nil {
		return 0, fmt.Errorf("client said %q: %w", line, err)
	}
	begin := time.Now()
	if _, err := services.Create(ctx, webService(name, "server", address), metav1.CreateOptions{}); err != nil {
		return 0, err
	}
	line, err := out.ReadString('\n')
	if err != nil {
		return 0, fmt.Errorf("no reply from service %s: %w", name, err)
	}
	if err := cmd.Wait(); err != nil {
		return 0, err
	}
	nanos, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
	if err != nil {
		return 0, err
	}
	return time.Unix(0, nanos).Sub(begin), services.Delete(ctx, name, metav1.DeleteOptions{})
}
