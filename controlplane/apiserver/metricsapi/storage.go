// SPDX-License-Identifier: Apache-2.0

package metricsapi

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	genericapirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/kubernetes"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	"k8s.io/metrics/pkg/apis/metrics"
	"k8s.io/metrics/pkg/apis/metrics/install"
	"k8s.io/metrics/pkg/apis/metrics/v1beta1"
)

// answerLimit bounds how long a node may take: one that is down must not keep the others' usage from being shown.
const answerLimit = 5 * time.Second

// Scheme has the types of the group.
func Scheme() *runtime.Scheme {
	scheme := runtime.NewScheme()
	install.Install(scheme)
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"}) // the options of requests
	return scheme
}

// Install adds the group to a server. client is the server's own.
func Install(server *genericapiserver.GenericAPIServer, client kubernetes.Interface, log *slog.Logger) error {
	scheme := Scheme()
	info := genericapiserver.NewDefaultAPIGroupInfo(metrics.GroupName, scheme, metav1.ParameterCodec, serializer.NewCodecFactory(scheme))
	s := newSource(func(ctx context.Context, node string) (*stats.Summary, error) { return summary(ctx, client, node) })
	failed := func(node string, err error) { log.Debug("usage of a node is not known", "node", node, "error", err) }
	info.VersionedResourcesStorageMap[v1beta1.SchemeGroupVersion.Version] = map[string]rest.Storage{
		"nodes": &nodes{client: client, source: s, failed: failed},
		"pods":  &pods{client: client, source: s, failed: failed},
	}
	return server.InstallAPIGroup(&info)
}

// summary asks a node for its counters, through the API server's own way to nodes.
func summary(ctx context.Context, client kubernetes.Interface, node string) (*stats.Summary, error) {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	raw, err := client.CoreV1().RESTClient().Get().Resource("nodes").Name(node).SubResource("proxy").Suffix("stats/summary").Param("only_cpu_and_memory", "true").DoRaw(ctx)
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", node, err)
	}
	out := &stats.Summary{}
	if err := json.Unmarshal(raw, out); err != nil {
		return nil, fmt.Errorf("statistics of node %s: %w", node, err)
	}
	return out, nil
}

func list(u use) corev1.ResourceList {
	return corev1.ResourceList{
		corev1.ResourceCPU:    *resource.NewScaledQuantity(u.cpu, resource.Nano),
		corev1.ResourceMemory: *resource.NewQuantity(u.memory, resource.BinarySI),
	}
}

// selection is the part of the options of a list that applies to the objects whose usage is asked for.
func selection(o *internalversion.ListOptions) metav1.ListOptions {
	var out metav1.ListOptions
	if o != nil && o.LabelSelector != nil {
		out.LabelSelector = o.LabelSelector.String()
	}
	if o != nil && o.FieldSelector != nil {
		out.FieldSelector = o.FieldSelector.String()
	}
	return out
}

// nodes is the resource nodes of the group.
type nodes struct {
	client kubernetes.Interface
	source *source
	failed func(node string, err error)
}

var (
	_ rest.Lister               = (*nodes)(nil)
	_ rest.Getter               = (*nodes)(nil)
	_ rest.Scoper               = (*nodes)(nil)
	_ rest.KindProvider         = (*nodes)(nil)
	_ rest.SingularNameProvider = (*nodes)(nil)
	_ rest.Lister               = (*pods)(nil)
	_ rest.Getter               = (*pods)(nil)
	_ rest.Scoper               = (*pods)(nil)
	_ rest.KindProvider         = (*pods)(nil)
	_ rest.SingularNameProvider = (*pods)(nil)
)

func (*nodes) New() runtime.Object     { return &metrics.NodeMetrics{} }
func (*nodes) NewList() runtime.Object { return &metrics.NodeMetricsList{} }
func (*nodes) Destroy()                {}
func (*nodes) Kind() string            { return "NodeMetrics" }
func (*nodes) NamespaceScoped() bool   { return false }
func (*nodes) GetSingularName() string { return "node" }

func (n *nodes) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	node, err := n.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	if all := n.of(ctx, []corev1.Node{*node}); len(all) > 0 {
		return &all[0], nil
	}
	return nil, apierrors.NewNotFound(metrics.Resource("nodes"), name)
}

func (n *nodes) List(ctx context.Context, o *internalversion.ListOptions) (runtime.Object, error) {
	all, err := n.client.CoreV1().Nodes().List(ctx, selection(o))
	if err != nil {
		return nil, err
	}
	if s := selection(o); s.LabelSelector == "" && s.FieldSelector == "" {
		names := make([]string, 0, len(all.Items))
		for i := range all.Items {
			names = append(names, all.Items[i].Name)
		}
		n.source.keep(names)
	}
	return &metrics.NodeMetricsList{Items: n.of(ctx, all.Items)}, nil
}

// of makes the objects of those nodes that answer.
func (n *nodes) of(ctx context.Context, list []corev1.Node) []metrics.NodeMetrics {
	names := make([]string, 0, len(list))
	for i := range list {
		names = append(names, list[i].Name)
	}
	known := n.source.usage(ctx, names, n.failed)
	out := make([]metrics.NodeMetrics, 0, len(list))
	for i := range list {
		if u, ok := known[list[i].Name]; ok && u.node != nil {
			out = append(out, nodeMetrics(&list[i], u))
		}
	}
	return out
}

func nodeMetrics(node *corev1.Node, u nodeUsage) metrics.NodeMetrics {
	return metrics.NodeMetrics{
		ObjectMeta: metav1.ObjectMeta{Name: node.Name, Labels: node.Labels, CreationTimestamp: metav1.NewTime(u.at)},
		Timestamp:  metav1.NewTime(u.at), Window: metav1.Duration{Duration: u.window}, Usage: list(*u.node),
	}
}

// pods is the resource pods of the group.
type pods struct {
	client kubernetes.Interface
	source *source
	failed func(node string, err error)
}

func (*pods) New() runtime.Object     { return &metrics.PodMetrics{} }
func (*pods) NewList() runtime.Object { return &metrics.PodMetricsList{} }
func (*pods) Destroy()                {}
func (*pods) Kind() string            { return "PodMetrics" }
func (*pods) NamespaceScoped() bool   { return true }
func (*pods) GetSingularName() string { return "pod" }

func (p *pods) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	pod, err := p.client.CoreV1().Pods(genericapirequest.NamespaceValue(ctx)).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	if all := p.of(ctx, []corev1.Pod{*pod}); len(all) > 0 {
		return &all[0], nil
	}
	return nil, apierrors.NewNotFound(metrics.Resource("pods"), pod.Namespace+"/"+name)
}

func (p *pods) List(ctx context.Context, o *internalversion.ListOptions) (runtime.Object, error) {
	all, err := p.client.CoreV1().Pods(genericapirequest.NamespaceValue(ctx)).List(ctx, selection(o))
	if err != nil {
		return nil, err
	}
	return &metrics.PodMetricsList{Items: p.of(ctx, all.Items)}, nil
}

// of makes the objects of those pods that run.
func (p *pods) of(ctx context.Context, list []corev1.Pod) []metrics.PodMetrics {
	var names []string
	for i := range list {
		if running(&list[i]) {
			names = append(names, list[i].Spec.NodeName)
		}
	}
	slices.Sort(names)
	known := p.source.usage(ctx, slices.Compact(names), p.failed)
	out := make([]metrics.PodMetrics, 0, len(list))
	for i := range list {
		pod := &list[i]
		u, ok := known[pod.Spec.NodeName]
		if !ok || !running(pod) {
			continue
		}
		if containers := u.pods[types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name}]; len(containers) > 0 {
			out = append(out, podMetrics(pod, u, containers))
		}
	}
	return out
}

func running(pod *corev1.Pod) bool {
	return pod.Spec.NodeName != "" && pod.Status.Phase == corev1.PodRunning
}

func podMetrics(pod *corev1.Pod, u nodeUsage, containers map[string]use) metrics.PodMetrics {
	m := metrics.PodMetrics{
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name, Labels: pod.Labels, CreationTimestamp: metav1.NewTime(u.at)},
		Timestamp:  metav1.NewTime(u.at), Window: metav1.Duration{Duration: u.window},
	}
	names := make([]string, 0, len(containers))
	for name := range containers {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		m.Containers = append(m.Containers, metrics.ContainerMetrics{Name: name, Usage: list(containers[name])})
	}
	return m
}
