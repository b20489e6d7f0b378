// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/record"
)

// planStatus returns copies of the Ingresses whose status does not show addrs yet, with the status
// they should have.
func planStatus(ours []*networkingv1.Ingress, addrs []netip.Addr) []*networkingv1.Ingress {
	sorted := slices.SortedFunc(slices.Values(addrs), netip.Addr.Compare)
	var want []networkingv1.IngressLoadBalancerIngress
	for _, a := range slices.Compact(sorted) {
		want = append(want, networkingv1.IngressLoadBalancerIngress{IP: a.Unmap().String()})
	}
	var out []*networkingv1.Ingress
	for _, ing := range ours {
		if equality.Semantic.DeepEqual(ing.Status.LoadBalancer.Ingress, want) {
			continue
		}
		ing = ing.DeepCopy()
		ing.Status.LoadBalancer.Ingress = want
		out = append(out, ing)
	}
	return out
}

// writeStatus stores planned statuses. A conflict or a deleted object is no failure: its change
// comes as an event and is planned anew.
func writeStatus(ctx context.Context, client kubernetes.Interface, planned []*networkingv1.Ingress) error {
	var errs []error
	for _, ing := range planned {
		_, err := client.NetworkingV1().Ingresses(ing.Namespace).UpdateStatus(ctx, ing, metav1.UpdateOptions{})
		if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("writing the status of Ingress %s: %w", nameOf(ing), err))
		}
	}
	return errors.Join(errs...)
}

// planProblems lists what is wrong with the references of our Ingresses: Services and ports that
// do not exist, Secrets that are missing or hold no certificate.
func planProblems(ours []*networkingv1.Ingress, t *Table, service func(namespace, name string) *corev1.Service,
	failed map[types.NamespacedName]error) []Problem {
	out := slices.Clone(t.Problems)
	for _, r := range t.Routes {
		if r.Backend.Service == "" {
			continue
		}
		s := service(r.Backend.Namespace, r.Backend.Service)
		switch {
		case s == nil:
			out = append(out, Problem{r.Ingress, "ServiceNotFound", fmt.Sprintf("Service %q does not exist", r.Backend.Service)})
		case !hasPort(s, r.Backend.Port):
			port := r.Backend.Port.Name
			if port == "" {
				port = fmt.Sprint(r.Backend.Port.Number)
			}
			out = append(out, Problem{r.Ingress, "PortNotFound", fmt.Sprintf("Service %q has no port %s", r.Backend.Service, port)})
		}
	}
	for _, ing := range ours {
		for _, section := range ing.Spec.TLS {
			if err := failed[types.NamespacedName{Namespace: ing.Namespace, Name: section.SecretName}]; err != nil {
				out = append(out, Problem{nameOf(ing), "BadCertificate",
					fmt.Sprintf("Secret %q cannot be used, its hosts get a self-signed certificate: %v", section.SecretName, err)})
			}
		}
	}
	return out
}

func hasPort(s *corev1.Service, port networkingv1.ServiceBackendPort) bool {
	return slices.ContainsFunc(s.Spec.Ports, func(p corev1.ServicePort) bool {
		if port.Name != "" {
			return p.Name == port.Name
		}
		return p.Port == port.Number
	})
}

// reporter turns problems into events, each once for as long as it lasts.
type reporter struct {
	recorder record.EventRecorder
	told     map[Problem]bool
}

func (r *reporter) report(ours []*networkingv1.Ingress, problems []Problem) {
	byName := map[types.NamespacedName]*networkingv1.Ingress{}
	for _, ing := range ours {
		byName[nameOf(ing)] = ing
	}
	now := map[Problem]bool{}
	for _, p := range problems {
		ing := byName[p.Ingress]
		if now[p] || ing == nil {
			continue
		}
		now[p] = true
		if !r.told[p] {
			r.recorder.Event(ing, corev1.EventTypeWarning, p.Reason, p.Message)
		}
	}
	r.told = now
}
