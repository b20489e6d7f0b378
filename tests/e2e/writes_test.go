// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"skep.io/skep/tests/cluster"
)

// writes is a client that writes numbered objects and remembers which were acknowledged.
type writes struct {
	cancel context.CancelFunc
	ended  chan struct{}
	prefix string // of the objects' names
	acked  atomic.Int64
	names  []string // of acknowledged objects; to be read when ended
	moved  int      // to another server
}

// writePause lies between two writes: without it the store, and not what happens to it, would take the processor.
const writePause = 5 * time.Millisecond

// writeLimit is how long one server may take for an answer.
const writeLimit = 3 * time.Second

func (w *writes) run(ctx context.Context, clients []kubernetes.Interface) {
	defer close(w.ended)
	at := 0
	for n := 0; ctx.Err() == nil; n++ {
		object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("%s%d", w.prefix, n)}}
		for ctx.Err() == nil {
			try, cancel := context.WithTimeout(ctx, writeLimit)
			_, err := clients[at].CoreV1().ConfigMaps(metav1.NamespaceDefault).Create(try, object, metav1.CreateOptions{})
			cancel()
			if err == nil || apierrors.IsAlreadyExists(err) { // an earlier try has arrived
				w.names = append(w.names, object.Name)
				w.acked.Add(1)
				time.Sleep(writePause)
				break
			}
			at = (at + 1) % len(clients)
			w.moved++
			select {
			case <-time.After(20 * time.Millisecond): // a dead server refuses at once
			case <-ctx.Done():
			}
		}
	}
}

// missing are the acknowledged objects that the cluster does not have.
func (w *writes) missing(ctx context.Context, client kubernetes.Interface) ([]string, error) {
	list, err := client.CoreV1().ConfigMaps(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	have := map[string]bool{}
	for i := range list.Items {
		have[list.Items[i].Name] = true
	}
	var out []string
	for _, name := range w.names {
		if !have[name] {
			out = append(out, name)
		}
	}
	return out, nil
}

func writesCommand(ts *testscript.TestScript, neg bool, args []string) {
	positive(ts, neg)
	if len(args) != 1 {
		ts.Fatalf("usage: writes start|go|stop")
	}
	s := state(ts)
	ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
	defer cancel()
	if args[0] != "start" && s.writes == nil {
		ts.Fatalf("there are no writes")
	}
	switch args[0] {
	case "start":
		w, err := startWrites(s.servers())
		ts.Check(err)
		s.writes = w
	case "go":
		ts.Check(s.writes.more(ctx))
	case "stop":
		w := s.writes
		s.writes = nil
		ts.Check(w.stop(ctx, s.servers()))
		ts.Logf("%d writes were acknowledged; the client changed servers %d times", len(w.names), w.moved)
	default:
		ts.Fatalf("writes: unknown %q", args[0])
	}
}

// startWrites begins to write through whichever of the servers answers.
func startWrites(servers []*cluster.Node) (*writes, error) {
	var clients []kubernetes.Interface
	for _, n := range servers {
		client, err := n.Kubernetes()
		if err != nil {
			return nil, err
		}
		clients = append(clients, client)
	}
	running, stop := context.WithCancel(context.Background())
	w := &writes{cancel: stop, ended: make(chan struct{}), prefix: fmt.Sprintf("write-%d-", time.Now().UnixNano())}
	go w.run(running, clients)
	return w, nil
}

// more waits until ten more have been acknowledged.
func (w *writes) more(ctx context.Context) error {
	for want := w.acked.Load() + 10; w.acked.Load() < want; {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("no write is acknowledged: %d are so far", w.acked.Load())
		}
	}
	return nil
}

// stop ends the writes, and is an error if one that was acknowledged is missing on a server that runs.
func (w *writes) stop(ctx context.Context, servers []*cluster.Node) error {
	w.cancel()
	<-w.ended
	for _, n := range servers {
		if n.ServerPid() == 0 {
			continue
		}
		client, err := n.Kubernetes()
		if err != nil {
			return err
		}
		missing, err := w.missing(ctx, client)
		if err != nil {
			return err
		}
		if len(missing) > 0 {
			return fmt.Errorf("%s lacks %d of %d acknowledged writes: %q", n.Name, len(missing), len(w.names), missing)
		}
	}
	return nil
}

// servers are the cluster's servers, the first one first.
func (s *script) servers() []*cluster.Node {
	out := []*cluster.Node{s.node}
	for _, a := range s.agents {
		if a.Peer {
			out = append(out, a)
		}
	}
	return out
}
