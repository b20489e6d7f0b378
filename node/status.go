// SPDX-License-Identifier: Apache-2.0

package node

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	"k8s.io/component-helpers/apimachinery/lease"
	nodeutil "k8s.io/component-helpers/node/util"
	"k8s.io/component-helpers/nodedeclaredfeatures/features/inplacepodresize"
	v1helper "k8s.io/kubernetes/pkg/apis/core/v1/helper"
	"k8s.io/utils/clock"

	"skep.io/skep/api"
	"skep.io/skep/node/pods"
	nodert "skep.io/skep/node/runtime"
)

const (
	// heartbeat is how often status is written although nothing has changed (kubelet: nodeStatusReportFrequency).
	heartbeat = 5 * time.Minute
	// checkPressure is how often memory, disk and processes are looked at: nothing tells when they run short.
	checkPressure = 10 * time.Second
	// leaseLife is how long a node may be silent (kubelet: nodeLeaseDurationSeconds), leaseShare which part of it passes
	// between two signs.
	leaseLife  = 40 * time.Second
	leaseShare = 4
	// maxImages is how many images status lists (kubelet: nodeStatusMaxImages).
	maxImages = 50
)

// pressure says what the host runs short of.
type pressure struct{ memory, disk, pids bool }

// facts is all that the node's status is made from.
type facts struct {
	host      *hostFacts
	now       time.Time
	name      string
	addresses []string
	port      int
	maxPods   int
	images    []nodert.Image
	pressure  pressure
	ownUsers  bool   // pods can have user namespaces
	notReady  string // why not; empty when ready
}

// nodeStatus says what the API should show of the node. It starts from old, which others write too.
func nodeStatus(old corev1.NodeStatus, f facts) corev1.NodeStatus {
	s := *old.DeepCopy()
	others := extended(s.Capacity)
	s.Capacity, s.Allocatable = f.host.capacity(f.maxPods), f.host.allocatable(f.maxPods)
	maps.Copy(s.Capacity, others)
	maps.Copy(s.Allocatable, others)
	s.Addresses = nil
	for _, a := range f.addresses {
		s.Addresses = append(s.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	s.Addresses = append(s.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: f.host.name})
	s.NodeInfo = f.host.info
	s.DeclaredFeatures = declaredFeatures()
	s.RuntimeHandlers = nil
	for _, name := range []string{"", pods.RuntimeHandler} {
		s.RuntimeHandlers = append(s.RuntimeHandlers, corev1.NodeRuntimeHandler{Name: name,
			Features: &corev1.NodeRuntimeHandlerFeatures{RecursiveReadOnlyMounts: new(true), UserNamespaces: new(f.ownUsers)}})
	}
	s.DaemonEndpoints.KubeletEndpoint.Port = int32(f.port)
	s.Images = shownImages(f.images)
	set := func(t corev1.NodeConditionType, on bool, reason, message string) {
		c := corev1.NodeCondition{Type: t, Status: corev1.ConditionFalse, Reason: reason, Message: message,
			LastHeartbeatTime: metav1.NewTime(f.now), LastTransitionTime: metav1.NewTime(f.now)}
		if on {
			c.Status = corev1.ConditionTrue
		}
		for i := range s.Conditions {
			if s.Conditions[i].Type == t {
				if s.Conditions[i].Status == c.Status {
					c.LastTransitionTime = s.Conditions[i].LastTransitionTime
				}
				s.Conditions[i] = c
				return
			}
		}
		s.Conditions = append(s.Conditions, c)
	}
	pick := func(on bool, yes, no [2]string) (bool, string, string) {
		if on {
			return on, yes[0], yes[1]
		}
		return on, no[0], no[1]
	}
	on, reason, message := pick(f.pressure.memory,
		[2]string{"KubeletHasInsufficientMemory", "kubelet has insufficient memory available"},
		[2]string{"KubeletHasSufficientMemory", "kubelet has sufficient memory available"})
	set(corev1.NodeMemoryPressure, on, reason, message)
	on, reason, message = pick(f.pressure.disk,
		[2]string{"KubeletHasDiskPressure", "kubelet has disk pressure"},
		[2]string{"KubeletHasNoDiskPressure", "kubelet has no disk pressure"})
	set(corev1.NodeDiskPressure, on, reason, message)
	on, reason, message = pick(f.pressure.pids,
		[2]string{"KubeletHasInsufficientPID", "kubelet has insufficient PID available"},
		[2]string{"KubeletHasSufficientPID", "kubelet has sufficient PID available"})
	set(corev1.NodePIDPressure, on, reason, message)
	on, reason, message = pick(f.notReady == "",
		[2]string{"KubeletReady", "kubelet is posting ready status"},
		[2]string{"KubeletNotReady", f.notReady})
	set(corev1.NodeReady, on, reason, message)
	return s
}

// extended are the resources that others say the node has, an administrator for example. Pods may have all of them.
// (https://kubernetes.io/docs/tasks/administer-cluster/extended-resource-node/)
func extended(list corev1.ResourceList) corev1.ResourceList {
	out := corev1.ResourceList{}
	for name, q := range list {
		if v1helper.IsExtendedResourceName(name) {
			out[name] = q
		}
	}
	return out
}

// shownImages are the biggest ones.
func shownImages(list []nodert.Image) []corev1.ContainerImage {
	list = slices.Clone(list)
	slices.SortStableFunc(list, func(a, b nodert.Image) int {
		return cmp.Or(cmp.Compare(b.Size, a.Size), cmp.Compare(a.ID, b.ID))
	})
	if len(list) > maxImages {
		list = list[:maxImages]
	}
	var out []corev1.ContainerImage
	for _, i := range list {
		names := slices.Clone(i.Tags)
		if i.Digest != "" {
			names = append([]string{i.Digest}, names...)
		}
		slices.Sort(names)
		names = slices.Compact(names)
		out = append(out, corev1.ContainerImage{Names: names[:min(len(names), 5)], SizeBytes: i.Size})
	}
	return out
}

// nodeLabels are the labels that a node gives itself.
func nodeLabels(hostname string, more map[string]string) map[string]string {
	l := map[string]string{
		corev1.LabelHostname: hostname, corev1.LabelOSStable: "linux", corev1.LabelArchStable: runtime.GOARCH,
		"beta.kubernetes.io/os": "linux", "beta.kubernetes.io/arch": runtime.GOARCH,
	}
	maps.Copy(l, more)
	return l
}

// register makes the Node, or takes over the one that is there.
func (a *Agent) register(ctx context.Context) error {
	labels := nodeLabels(a.cfg.NodeName, a.cfg.Labels)
	delay := 50 * time.Millisecond
	for {
		node, err := a.tryRegister(ctx, labels)
		if err == nil {
			a.status.seen(node)
			a.status.recorder.Eventf(a.status.ref(), corev1.EventTypeNormal, "Starting", "Starting kubelet.")
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		a.log.Warn("register the node", "node", a.cfg.NodeName, "retry", delay, "error", err)
		t := time.NewTimer(delay)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
		delay = min(2*delay, 7*time.Second)
	}
}

func (a *Agent) tryRegister(ctx context.Context, labels map[string]string) (*corev1.Node, error) {
	nodes := a.cfg.Client.CoreV1().Nodes()
	annotations := map[string]string{api.LocalPathAnnotation: a.localPath()}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: a.cfg.NodeName, Labels: labels, Annotations: annotations}}
	node.Status = nodeStatus(node.Status, a.status.facts(ctx))
	made, err := nodes.Create(ctx, node, metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		return made, err
	}
	have, err := nodes.Get(ctx, a.cfg.NodeName, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	want := have.DeepCopy()
	if want.Labels == nil {
		want.Labels = map[string]string{}
	}
	if want.Annotations == nil {
		want.Annotations = map[string]string{}
	}
	maps.Copy(want.Labels, labels)
	maps.Copy(want.Annotations, annotations)
	if equality.Semantic.DeepEqual(want.ObjectMeta, have.ObjectMeta) {
		return have, nil
	}
	return nodes.Update(ctx, want, metav1.UpdateOptions{})
}

// statusLoop writes the node's status: at once when something changes, and every heartbeat.
type statusLoop struct {
	a        *Agent
	recorder record.EventRecorder
	wake     chan struct{}

	mu       sync.Mutex
	node     *corev1.Node
	gone     bool  // the Node was deleted: it is to be made anew
	netErr   error // why the network is not ready
	netReady bool
	pressure pressure
	ending   bool // the machine is about to be shut down

	images *imageCollector // the loop's alone
	full   bool            // it was said that no image could be removed
}

func newStatusLoop(a *Agent) *statusLoop {
	return &statusLoop{a: a, wake: make(chan struct{}, 1), images: &imageCollector{policy: a.cfg.ImageGC.complete()}}
}

// changed has the status looked at now.
func (l *statusLoop) changed() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// seen takes in the Node as the API has it. Where somebody gave it a resource, or took one away, pods are told.
func (l *statusLoop) seen(n *corev1.Node) {
	l.mu.Lock()
	l.node, l.gone = n, false
	l.mu.Unlock()
	if !equality.Semantic.DeepEqual(extended(n.Status.Capacity), extended(n.Status.Allocatable)) {
		l.changed()
	}
}

// current is the Node as the API has it; nil before it is registered.
func (l *statusLoop) current() *corev1.Node {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.node
}

func (l *statusLoop) deleted() {
	l.mu.Lock()
	l.gone = true
	l.mu.Unlock()
	l.changed()
}

// network tells whether the pod network works.
func (l *statusLoop) network(err error) {
	l.mu.Lock()
	l.netErr = err
	l.netReady = l.netReady || err == nil
	l.mu.Unlock()
	l.changed()
}

func (l *statusLoop) ref() *corev1.ObjectReference {
	// Like kubelet's: the uid is the name, which is how `kubectl describe node` finds events.
	return &corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: l.a.cfg.NodeName, UID: types.UID(l.a.cfg.NodeName)}
}

func (l *statusLoop) facts(ctx context.Context) facts {
	images, err := l.a.runtime.Images().List(ctx)
	if err != nil && ctx.Err() == nil {
		l.a.log.Error("list images", "error", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	f := facts{host: &l.a.host, now: time.Now(), name: l.a.cfg.NodeName, port: l.a.cfg.Port, maxPods: l.a.cfg.MaxPods, images: images, pressure: l.pressure, ownUsers: l.a.noUserNamespaces == nil}
	for _, ip := range l.a.cfg.NodeIPs {
		f.addresses = append(f.addresses, ip.Unmap().String())
	}
	switch {
	case l.ending:
		f.notReady = "node is shutting down"
	case err != nil:
		f.notReady = fmt.Sprintf("container runtime is down: %v", err)
	case l.netErr != nil:
		f.notReady = fmt.Sprintf("container runtime network not ready: %v", l.netErr)
	case !l.netReady:
		f.notReady = "container runtime network not ready: the node has no pod address range yet"
	}
	return f
}

func (l *statusLoop) run(ctx context.Context) {
	check := time.NewTicker(checkPressure)
	defer check.Stop()
	var written time.Time
	retry := time.NewTimer(time.Hour)
	defer retry.Stop()
	for {
		ok := l.write(ctx, &written)
		if !ok {
			retry.Reset(time.Second)
		}
		select {
		case <-l.wake:
		case <-retry.C:
		case <-check.C:
		case <-ctx.Done():
			return
		}
	}
}

// resuming tells that this agent has taken over a Ready node and does not know yet whether its
// network works. What the earlier agent set up still does: to report the node unready for the
// moment of a restart would take every pod of it out of its services.
func (l *statusLoop) resuming(node *corev1.Node) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.netReady && l.netErr == nil && readyOf(node.Status) && node.Status.NodeInfo.BootID == l.a.host.bootID
}

// write patches the status if it differs, or a heartbeat is due.
func (l *statusLoop) write(ctx context.Context, written *time.Time) (ok bool) {
	l.mu.Lock()
	node, gone := l.node, l.gone
	l.mu.Unlock()
	if gone {
		if err := l.a.register(ctx); err != nil {
			return false
		}
		l.a.podCIDRs.Store(nil) // a new Node gets ranges anew
		l.mu.Lock()
		node = l.node
		l.mu.Unlock()
	}
	if node == nil {
		return true
	}
	if l.resuming(node) {
		return true
	}
	f := l.facts(ctx)
	want := node.DeepCopy()
	want.Status = nodeStatus(node.Status, f)
	if sameButHeartbeat(node.Status, want.Status) && f.now.Sub(*written) < heartbeat && !written.IsZero() {
		return true
	}
	got, _, err := nodeutil.PatchNodeStatus(l.a.cfg.Client.CoreV1(), types.NodeName(node.Name), node, want)
	if err != nil {
		if ctx.Err() == nil {
			l.a.log.Error("write node status", "node", node.Name, "error", err)
		}
		return false
	}
	*written = f.now
	l.mu.Lock()
	if l.node == node {
		l.node = got
	}
	l.mu.Unlock()
	if was := readyOf(node.Status); was != readyOf(want.Status) {
		reason := "NodeNotReady"
		if !was {
			reason = "NodeReady"
		}
		l.recorder.Eventf(l.ref(), corev1.EventTypeNormal, reason, "Node %s status is now: %s", node.Name, reason)
	}
	if f.notReady == "" {
		l.a.readyOnce.Do(func() {
			l.a.log.Info("node is ready", "node", node.Name)
			close(l.a.ready)
		})
	}
	return true
}

func readyOf(s corev1.NodeStatus) bool {
	for _, c := range s.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func sameButHeartbeat(a, b corev1.NodeStatus) bool {
	x, y := a.DeepCopy(), b.DeepCopy()
	for _, s := range []*corev1.NodeStatus{x, y} {
		for i := range s.Conditions {
			s.Conditions[i].LastHeartbeatTime = metav1.Time{}
			s.Conditions[i].LastTransitionTime = metav1.Time{}
		}
	}
	return equality.Semantic.DeepEqual(x, y)
}

// shutdown says whether the machine is about to be shut down.
func (l *statusLoop) shutdown(ending bool) {
	l.mu.Lock()
	l.ending = ending
	l.mu.Unlock()
	l.changed()
}

// setPressure says what the node is short of now.
func (l *statusLoop) setPressure(p pressure) {
	l.mu.Lock()
	changed := l.pressure != p
	l.pressure = p
	l.mu.Unlock()
	if changed {
		l.changed()
	}
}

// renewLease says four times in a lease's life that this node lives.
func (a *Agent) renewLease(ctx context.Context) {
	life := cmp.Or(a.cfg.LeaseLife, leaseLife)
	c := lease.NewController(clock.RealClock{}, a.cfg.Client, a.cfg.NodeName, int32(life/time.Second), nil, life/leaseShare,
		a.cfg.NodeName, corev1.NamespaceNodeLease, func(l *coordinationv1.Lease) error {
			// Deleting the Node takes the lease with it.
			if len(l.OwnerReferences) > 0 {
				return nil
			}
			a.status.mu.Lock()
			node := a.status.node
			a.status.mu.Unlock()
			if node != nil {
				l.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}}
			}
			return nil
		})
	c.Run(ctx)
}

// declaredFeatures are those of what the API allows on nodes that say they can do it, in alphabetical order.
func declaredFeatures() []string {
	return []string{inplacepodresize.PodLevelResourcesResizeFeature.Name()}
}
