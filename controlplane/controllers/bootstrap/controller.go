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

// leakGrace is how long the API server gets to give an address back; it needs milliseconds.
const leakGrace = 2 * time.Second

// Keys of the queue.
const (
	dnsKey     = "dns-service"
	ingressKey = "ingress-class"
	storageKey = "storage-class"
)

// Controller ensures the objects. It does not wait for caches: DNS depends on it.
type Controller struct {
	runner.Deps
	queue *runner.Queue
	dns   *corev1.Service
	class *networkingv1.IngressClass
	// heldSince is when an address of a DNS Service that is gone was first seen. Only the sync of dnsKey uses it.
	heldSince time.Time
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
	c.queue.Add(storageKey)
	return c.queue.Run(ctx)
}

func (c *Controller) sync(ctx context.Context, key string) (time.Duration, error) {
	switch key {
	case dnsKey:
		return 0, c.ensureDNS(ctx)
	case storageKey:
		return 0, c.ensureStorage(ctx)
	}
	return 0, c.ensureClass(ctx)
}

func (c *Controller) ensureDNS(ctx context.Context) error {
	client := c.Client.CoreV1().Services(c.dns.Namespace)
	have, err := client.Get(ctx, c.dns.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		if err := c.freeAddresses(ctx); err != nil {
			return err
		}
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

// freeAddresses returns nil once nothing is left of an earlier DNS Service's addresses. The API server gives a
// deleted Service's addresses back one after the other, by name, and after its deletion is seen. A creation in
// between would take the first, fail with the second and keep the first (Kubernetes 1.36, txnAllocClusterIPs), so
// it waits; what is still there after leakGrace is such a leak, or a crash's, and is deleted.
func (c *Controller) freeAddresses(ctx context.Context) error {
	client := c.Client.NetworkingV1().IPAddresses()
	for _, ip := range c.dns.Spec.ClusterIPs {
		held, err := client.Get(ctx, ip, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read address %s: %w", ip, err)
		}
		if !IsHolder(held, c.dns) {
			return fmt.Errorf("address %s, which DNS needs, is held by another object: delete it: %+v", ip, held.Spec.ParentRef)
		}
		if c.heldSince.IsZero() {
			c.heldSince = c.Clock.Now()
		}
		if c.Clock.Since(c.heldSince) < leakGrace {
			return fmt.Errorf("address %s is not free yet: %w", ip, runner.ErrStaleCache)
		}
		c.Log.Warn("freeing an address that nothing uses", "address", ip)
		err = client.Delete(ctx, ip, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(held.UID))})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("free address %s: %w", ip, err)
		}
	}
	c.heldSince = time.Time{}
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
