// SPDX-License-Identifier: Apache-2.0

package controllers

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/controlplane/controllers/nodelifecycle"
)

// logger is a DaemonSet as people write them.
func logger(ns string) *appsv1.DaemonSet {
	labels := map[string]string{"app": "log"}
	return &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "log"},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "log", Image: "log:1"}}},
			},
		},
	}
}

// addNodes adds ready nodes without waiting for what controllers make of them.
func (c *cluster) addNodes(names ...string) {
	c.Helper()
	for _, name := range names {
		if _, err := c.client.CoreV1().Nodes().Create(c.Context(), readyNode(name), metav1.CreateOptions{}); err != nil {
			c.Fatal(err)
		}
	}
}

func readyNode(name string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name)},
		Status:     corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastHeartbeatTime: metav1.Now()}}},
	}
}

// taintNode sets a node's only taint of that key; without an effect it has none.
func (c *cluster) taintNode(name, key string, effect corev1.TaintEffect) {
	c.Helper()
	c.eventually("taint of node "+name, func(ctx context.Context) error {
		node, err := c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		node.Spec.Taints = slices.DeleteFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == key })
		if effect != "" {
			node.Spec.Taints = append(node.Spec.Taints, corev1.Taint{Key: key, Effect: effect})
		}
		_, err = c.client.CoreV1().Nodes().Update(ctx, node, metav1.UpdateOptions{})
		return err
	})
}

// waitDaemons waits until exactly these nodes have one pod each, all running image, and the rollout is complete. It
// returns the pods by node.
func (c *cluster) waitDaemons(ns, image string, nodes ...string) map[string]corev1.Pod {
	c.Helper()
	var on map[string]corev1.Pod
	c.eventually(fmt.Sprintf("%s on %v", image, nodes), func(ctx context.Context) error {
		ds, err := c.client.AppsV1().DaemonSets(ns).Get(ctx, "log", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if err := isRolledOut("DaemonSet", ds); err != nil {
			return err
		}
		n := int32(len(nodes))
		if s := ds.Status; s.DesiredNumberScheduled != n || s.NumberAvailable != n || s.UpdatedNumberScheduled != n || s.NumberUnavailable != 0 || s.NumberMisscheduled != 0 {
			return fmt.Errorf("status %+v", s)
		}
		pods, err := c.client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: "app=log"})
		if err != nil {
			return err
		}
		on = map[string]corev1.Pod{}
		for _, pod := range pods.Items {
			if pod.Spec.Containers[0].Image != image || !metav1.IsControlledBy(&pod, ds) {
				return fmt.Errorf("pod %s runs %s, owners %v", pod.Name, pod.Spec.Containers[0].Image, pod.OwnerReferences)
			}
			on[pod.Spec.NodeName] = pod
		}
		if got := slices.Sorted(maps.Keys(on)); !slices.Equal(got, nodes) || len(pods.Items) != len(nodes) {
			return fmt.Errorf("%d pods on %v", len(pods.Items), got)
		}
		return nil
	})
	return on
}

func (c *cluster) updateDaemons(ns string, change func(*appsv1.DaemonSet)) {
	c.Helper()
	c.eventually("update of the daemon set", func(ctx context.Context) error {
		ds, err := c.client.AppsV1().DaemonSets(ns).Get(ctx, "log", metav1.GetOptions{})
		if err != nil {
			return err
		}
		change(ds)
		_, err = c.client.AppsV1().DaemonSets(ns).Update(ctx, ds, metav1.UpdateOptions{})
		return err
	})
}

// TestDaemonSet follows one against a real API server: its nodes come, go and change, its template rolls out and
// back, it is orphaned and adopts.
func TestDaemonSet(t *testing.T) {
	const ns = metav1.NamespaceDefault
	c := newCluster(t)
	c.addNodes("n1", "n2")
	c.kubelet("nowhere")
	ctx := t.Context()
	sets := c.client.AppsV1().DaemonSets(ns)
	if _, err := sets.Create(ctx, logger(ns), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	first := c.waitDaemons(ns, "log:1", "n1", "n2")
	for _, pod := range first {
		tolerated := 0
		for _, toleration := range pod.Spec.Tolerations {
			if strings.HasPrefix(toleration.Key, "node.kubernetes.io/") {
				tolerated++
			}
		}
		if tolerated != 6 || pod.Labels[appsv1.ControllerRevisionHashLabelKey] == "" || pod.Labels["pod-template-generation"] != "1" {
			t.Errorf("pod has labels %v and tolerates %v", pod.Labels, pod.Spec.Tolerations)
		}
	}

	// A new node gets its pod; one that repels it loses it and gets it back; one that is gone has none.
	c.addNodes("n3")
	c.waitDaemons(ns, "log:1", "n1", "n2", "n3")
	c.taintNode("n3", "t", corev1.TaintEffectNoExecute)
	c.waitDaemons(ns, "log:1", "n1", "n2")
	c.taintNode("n3", "t", "")
	c.waitDaemons(ns, "log:1", "n1", "n2", "n3")
	if err := c.client.CoreV1().Nodes().Delete(ctx, "n3", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	// Its pod is bound, and so the pod garbage collector's, after its quarantine.
	c.deleteDaemon(ns, "n3")
	c.waitDaemons(ns, "log:1", "n1", "n2")

	// A pod that failed is replaced.
	failing := first["n1"]
	failing.Status.Phase = corev1.PodFailed
	if _, err := c.client.CoreV1().Pods(ns).UpdateStatus(ctx, &failing, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("a new pod on n1", func(context.Context) error {
		if c.waitDaemons(ns, "log:1", "n1", "n2")["n1"].UID == failing.UID {
			return fmt.Errorf("pod %s is still there", failing.Name)
		}
		return nil
	})

	// Forward and back again.
	c.updateDaemons(ns, func(ds *appsv1.DaemonSet) { ds.Spec.Template.Spec.Containers[0].Image = "log:2" })
	c.waitDaemons(ns, "log:2", "n1", "n2")
	ds, err := sets.Get(ctx, "log", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c.rollBack("DaemonSet", ds)
	c.waitDaemons(ns, "log:1", "n1", "n2")
	c.checkRevisions(ns, "log:2=2", "log:1=3")

	// Of three former templates the oldest is forgotten.
	c.updateDaemons(ns, func(ds *appsv1.DaemonSet) {
		*ds.Spec.RevisionHistoryLimit = 1
		ds.Spec.Template.Spec.Containers[0].Image = "log:3"
	})
	c.waitDaemons(ns, "log:3", "n1", "n2")
	c.checkRevisions(ns, "log:1=3", "log:3=4")

	// Orphaned, its pods go on, and who comes after it adopts them without a restart.
	orphan := metav1.DeletePropagationOrphan
	before := c.waitDaemons(ns, "log:3", "n1", "n2")
	if err := sets.Delete(ctx, "log", metav1.DeleteOptions{PropagationPolicy: &orphan}); err != nil {
		t.Fatal(err)
	}
	successor := logger(ns)
	successor.Spec.Template.Spec.Containers[0].Image = "log:3"
	c.eventually("the successor", func(ctx context.Context) error {
		_, err := sets.Create(ctx, successor, metav1.CreateOptions{})
		return err
	})
	after := c.waitDaemons(ns, "log:3", "n1", "n2")
	if before["n1"].UID != after["n1"].UID || before["n2"].UID != after["n2"].UID {
		t.Error("adopted pods were replaced")
	}
	c.checkRevisions(ns, "log:1=3", "log:3=4")

	c.checkEvents(ns,
		"daemonset-controller SuccessfulCreate Created pod: log-",
		"daemonset-controller SuccessfulDelete Deleted pod: log-",
		"daemonset-controller FailedDaemonPod Found failed daemon pod default/"+failing.Name+" on node n1, will try to kill it")
}

func (c *cluster) deleteDaemon(ns, node string) {
	c.Helper()
	now := metav1.NewDeleteOptions(0)
	if err := c.client.CoreV1().Pods(ns).DeleteCollection(c.Context(), *now, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node}); err != nil {
		c.Fatal(err)
	}
}

// checkRevisions waits until there are exactly these revisions, each written IMAGE=NUMBER, by number.
func (c *cluster) checkRevisions(ns string, want ...string) {
	c.Helper()
	c.eventually("revisions", func(ctx context.Context) error {
		revisions, err := c.client.AppsV1().ControllerRevisions(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		slices.SortFunc(revisions.Items, func(a, b appsv1.ControllerRevision) int { return int(a.Revision - b.Revision) })
		var got []string
		for _, revision := range revisions.Items {
			_, image, _ := strings.Cut(string(revision.Data.Raw), `"image":"`)
			image, _, _ = strings.Cut(image, `"`)
			if metav1.GetControllerOf(&revision) == nil {
				return fmt.Errorf("revision %s has no owner", revision.Name)
			}
			got = append(got, fmt.Sprintf("%s=%d", image, revision.Revision))
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("revisions %v, want %v", got, want)
		}
		return nil
	})
}

// A DaemonSet that is looked at again and again, while the cache has not seen its pods yet, creates none twice.
func TestNoDaemonTwiceWhileTheCacheIsBehind(t *testing.T) {
	f := newFakeCluster(t, own(), nodelifecycle.DefaultTiming,
		readyNode("n1"), readyNode("n2"))
	ctx := t.Context()
	f.podEvents.Lock()
	ds := logger("ns")
	limit := int32(10)
	ds.Spec.RevisionHistoryLimit = &limit
	ds.Spec.UpdateStrategy.Type = appsv1.OnDeleteDaemonSetStrategyType
	if _, err := f.client.AppsV1().DaemonSets("ns").Create(ctx, ds, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	f.eventually("two pods", func(context.Context) error {
		if n := f.created.Load(); n != 2 {
			return fmt.Errorf("%d pods were created", n)
		}
		return nil
	})
	for i := range 10 {
		before := f.syncs("daemonset")
		f.updateDaemons("ns", func(ds *appsv1.DaemonSet) { ds.Annotations = map[string]string{"look": fmt.Sprint(i)} })
		f.eventually("another look", func(context.Context) error {
			if f.syncs("daemonset") == before {
				return fmt.Errorf("the daemon set was synced %d times", before)
			}
			return nil
		})
	}
	if n := f.created.Load(); n != 2 {
		t.Errorf("%d pods were created while the cache was behind", n)
	}
	f.podEvents.Unlock()
	f.eventually("status", func(ctx context.Context) error {
		cur, err := f.client.AppsV1().DaemonSets("ns").Get(ctx, "log", metav1.GetOptions{})
		if err == nil && cur.Status.CurrentNumberScheduled != 2 {
			return fmt.Errorf("status %+v", cur.Status)
		}
		return err
	})
	seen := map[types.UID]bool{}
	for _, pod := range f.pods() {
		seen[pod.UID] = true
	}
	if len(seen) != 2 || f.created.Load() != 2 {
		t.Errorf("%d pods were created in the end, %d are left", f.created.Load(), len(seen))
	}
}
