// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"

	"skep.io/skep/tests/cluster"
)

func main() {
	cluster.Helper()
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	flags := flag.NewFlagSet("scale", flag.ContinueOnError)
	nodes := flags.Int("nodes", 1000, "hollow nodes in the end")
	perNode := flags.Int("pods-per-node", 30, "pods for each")
	dirOfProfiles := flags.String("profiles", "", "write profiles of server and hollow nodes, for go tool pprof, into this directory")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *nodes < 1 || *perNode < 1 || *perNode > maxPods {
		return fmt.Errorf("%d nodes of %d pods are not possible: at least one of each, at most %d pods a node", *nodes, *perNode, maxPods)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	built, err := cluster.Build(ctx, ".build/e2e")
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "skep-scale-")
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, tableHead)
	before := 0
	err = grow(ctx, built, dir, plan{steps: tenfold(*nodes), perNode: *perNode, probes: 200, idle: 20 * time.Second, profiles: *dirOfProfiles}, func(r Report) error {
		fmt.Fprintln(w, r.row(r.Pods-before))
		before = r.Pods
		if err := w.Flush(); err != nil {
			return err
		}
		for _, f := range r.Failures {
			fmt.Fprintln(out, "  failed:", f)
		}
		return nil
	})
	return errors.Join(err, os.RemoveAll(dir))
}

// tenfold are the sizes on the way to the last.
func tenfold(last int) []int {
	var steps []int
	for n := 10; n < last; n *= 10 {
		steps = append(steps, n)
	}
	return append(steps, last)
}

// plan of a run.
type plan struct {
	steps   []int // nodes, growing
	perNode int
	probes  int
	idle    time.Duration
	// profiles is the directory for them; empty: none.
	profiles string
}

// namespace of all pods.
const namespace = "scale"

// grow starts a server and lets its cluster grow; each reached size is told.
func grow(ctx context.Context, built cluster.Built, dir string, p plan, tell func(Report) error) (err error) {
	n, err := cluster.NewNode(ctx, cluster.Options{
		Name: fmt.Sprintf("scale-%d", os.Getpid()), Dir: filepath.Join(dir, "node"), Bin: built.Bin,
		// A /24 a node: 1,000 nodes need 250,000 addresses.
		Args: []string{"--cluster-cidr=10.128.0.0/12"},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Stop(context.WithoutCancel(ctx))) }()
	if err := n.Restart(ctx); err != nil {
		return err
	}
	config, err := n.Config()
	if err != nil {
		return err
	}
	config.ContentType, config.AcceptContentTypes = "application/vnd.kubernetes.protobuf", "application/vnd.kubernetes.protobuf,application/json"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	// Pods that this machine would really run are not to be made.
	if _, err := client.CoreV1().Nodes().Patch(ctx, n.Name, types.MergePatchType, []byte(`{"spec":{"unschedulable":true}}`), metav1.PatchOptions{}); err != nil {
		return err
	}
	if _, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{}); err != nil {
		return err
	}
	living, end := context.WithCancel(ctx)
	group, living := errgroup.WithContext(living)
	defer func() {
		end()
		err = errors.Join(err, group.Wait())
	}()
	var failed failures
	have := 0
	for _, want := range p.steps {
		r := Report{Nodes: want, Pods: want * p.perNode}
		if err := addNodes(living, group, client, have, want, &failed); err != nil {
			return err
		}
		profiled, err := profiles{p.profiles, n}.during(living, want)
		if err != nil {
			return err
		}
		begin := time.Now()
		if err := fill(living, client, have*p.perNode, r.Pods, want); err != nil {
			return err
		}
		r.Filled = time.Since(begin)
		if err := profiled(); err != nil {
			return err
		}
		if err := use(living, n, p.idle, &r); err != nil {
			return err
		}
		if err := measure(living, client, p.probes, &r); err != nil {
			return err
		}
		r.FailedRequests, r.Failures = failed.all()
		if err := tell(r); err != nil {
			return err
		}
		have = want
	}
	return nil
}

// addNodes lets nodes live, and returns when all are registered.
func addNodes(ctx context.Context, group *errgroup.Group, client kubernetes.Interface, from, to int, failed *failures) error {
	var registered sync.WaitGroup
	for i := from; i < to; i++ {
		// Nobody reaches these: RFC 2544's range for benchmarks, which exists nowhere.
		h := &hollow{name: fmt.Sprintf("hollow-%05d", i), client: client, failed: failed, addr: netip.AddrFrom4([4]byte{198, 18 + byte(i>>9)&1, byte(i >> 1), byte(i&1) * 128})}
		registered.Add(1)
		ready := sync.OnceFunc(registered.Done)
		group.Go(func() error {
			defer ready()
			return h.run(ctx, ready)
		})
	}
	registered.Wait()
	return ctx.Err()
}

// fill makes deployments of pods, and returns when all of them run.
func fill(ctx context.Context, client kubernetes.Interface, from, to, nodes int) error {
	running, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	go func() { done <- awaitRunning(running, client, to) }()
	const each = 300
	for at := from; at < to; at += each {
		replicas := int32(min(each, to-at))
		labels := map[string]string{"app": fmt.Sprintf("app-%d-%d", nodes, at)}
		_, err := client.AppsV1().Deployments(namespace).Create(ctx, &appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: labels["app"]},
			Spec: appsv1.DeploymentSpec{
				Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels},
				Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "hollow"}}}},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		if _, err := client.CoreV1().Services(namespace).Create(ctx, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: labels["app"]},
			Spec:       corev1.ServiceSpec{Selector: labels, Ports: []corev1.ServicePort{{Port: 80}}},
		}, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	return <-done
}

// awaitRunning follows all pods until so many run.
func awaitRunning(ctx context.Context, client kubernetes.Interface, want int) error {
	runs := map[types.UID]bool{}
	for ctx.Err() == nil {
		w, err := client.CoreV1().Pods(namespace).Watch(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for e := range w.ResultChan() {
			pod, ok := e.Object.(*corev1.Pod)
			if !ok {
				break // the watch was too slow: another begins with what there is
			}
			if e.Type == watch.Deleted {
				delete(runs, pod.UID)
			} else if pod.Status.Phase == corev1.PodRunning {
				runs[pod.UID] = true
			}
			if len(runs) == want {
				w.Stop()
				return nil
			}
		}
		w.Stop()
	}
	return ctx.Err()
}

// awaitEvent reads events until one of an object comes.
func awaitEvent(ctx context.Context, events <-chan watch.Event, name string) error {
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return errors.New("the watch ended")
			}
			if object, is := e.Object.(metav1.Object); is && object.GetName() == name && e.Type == watch.Added {
				return nil
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
