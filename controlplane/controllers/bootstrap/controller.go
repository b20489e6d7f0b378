// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skep.io/skep/api"
	"skep.io/skep/controlplane/controllers/runner"
)

// Keys of the queue.
const (
	dnsKey     = "dns-service"
	ingressKey = "ingress-class"
)

// Controller ensures the objects. It does not wait for caches: DNS depends on it.
type Controller struct {
	runner.Deps
	queue *runner.Queue
	dns   *corev1.Service
	class *networkingv1.IngressClass
}

// New registers the controller with the shared informers.
func New(deps runner.Deps, serviceCIDRs []netip.Prefix) (*Controller, error) {
	dns, err := DNSService(serviceCIDRs)
	if err != nil {
		return nil, err
	}
	c := &Controller{Deps: deps, dns: dns, class: IngressClass()}
	c.queue = runner.New("bootstrap", 2, deps, c.sync)
	onService := func(s *corev1.Service) {
		if s.Namespace == dns.Namespace && s.Name == dns.Name {
			c.queue.Add(dnsKey)
		}
	}
	if _, err := runner.Watch(deps.Informers.Core().V1().Services().Informer(), runner.Handlers[*corev1.Service]{
		Update: func(_, s *corev1.Service) { onService(s) }, Delete: onService,
	}); err != nil {
		return nil, err
	}
	onClass := func(class *networkingv1.IngressClass) {
		if class.Name == api.IngressClassName {
			c.queue.Add(ingressKey)
		}
	}
	if _, err := runner.Watch(deps.Informers.Networking().V1().IngressClasses().Informer(), runner.Handlers[*networkingv1.IngressClass]{
		Update: func(_, class *networkingv1.IngressClass) { onClass(class) }, Delete: onClass,
	}); err != nil {
		return nil, err
	}
	return c, nil
}

// Run works until ctx ends, beginning at once.
func (c *Controller) Run(ctx context.Context) error {
	c.queue.Add(dnsKey)
	c.queue.Add(ingressKey)
	return c.queue.Run(ctx)
}

func (c *Controller) sync(ctx context.Context, key string) (time.Duration, error) {
	if key == dnsKey {
		return 0, c.ensureDNS(ctx)
	}
	return 0, c.ensureClass(ctx)
}

func (c *Controller) ensureDNS(ctx context.Context) error {
	client := c.Client.CoreV1().Services(c.dns.Namespace)
	have, err := client.Get(ctx, c.dns.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		if _, err = client.Create(ctx, c.dns.DeepCopy(), metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create DNS service: %w", err)
		}
		c.Log.Info("DNS service created", "clusterIPs", c.dns.Spec.ClusterIPs)
		return nil
	}
	if err != nil {
		return fmt.Errorf("read DNS service: %w", err)
	}
	write, repair := RepairService(have, c.dns)
	switch repair {
	case Update:
		_, err = client.Update(ctx, write, metav1.UpdateOptions{})
	case Replace:
		// Its deletion's event creates it anew, with the right address.
		err = client.Delete(ctx, have.Name, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(have.UID))})
	}
	if err != nil {
		return fmt.Errorf("repair DNS service: %w", err)
	}
	return nil
}

func (c *Controller) ensureClass(ctx context.Context) error {
	client := c.Client.NetworkingV1().IngressClasses()
	have, err := client.Get(ctx, c.class.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		if _, err = client.Create(ctx, c.class.DeepCopy(), metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create ingress class %s: %w", c.class.Name, err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("read ingress class %s: %w", c.class.Name, err)
	}
	if _, repair := RepairIngressClass(have, c.class); repair == Replace {
		if err := client.Delete(ctx, have.Name, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(have.UID))}); err != nil {
			return fmt.Errorf("replace ingress class %s: %w", c.class.Name, err)
		}
	}
	return nil
}
