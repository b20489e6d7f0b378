// SPDX-License-Identifier: Apache-2.0

package csrapproval

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	certificateslisters "k8s.io/client-go/listers/certificates/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"skep.io/skep/controlplane/controllers/runner"
)

// joinTime is how long a machine that was let in may take until it registers.
const joinTime = 10 * time.Minute

// Controller decides requests as Decide says. It has one worker, so that of two machines that ask for one
// name the second sees what the first got.
type Controller struct {
	runner.Deps
	queue    *runner.Queue
	requests certificateslisters.CertificateSigningRequestLister
	nodes    corelisters.NodeLister
	reserved []netip.Prefix
	synced   []cache.InformerSynced
	// approved are requests that were approved and that the cache may not show so yet, by UID.
	approved map[string]*certificatesv1.CertificateSigningRequest
}

// New registers the controller with the shared informers. reserved are the cluster's own ranges.
func New(deps runner.Deps, reserved []netip.Prefix) (*Controller, error) {
	requests, nodes := deps.Informers.Certificates().V1().CertificateSigningRequests(), deps.Informers.Core().V1().Nodes()
	c := &Controller{Deps: deps, requests: requests.Lister(), nodes: nodes.Lister(), reserved: reserved,
		approved: map[string]*certificatesv1.CertificateSigningRequest{}}
	c.queue = runner.New("csrapproval", 1, deps, c.sync)
	synced, err := runner.Watch(requests.Informer(), runner.Handlers[*certificatesv1.CertificateSigningRequest]{
		Add: func(csr *certificatesv1.CertificateSigningRequest) { c.queue.Add(csr.Name) },
	})
	if err != nil {
		return nil, err
	}
	c.synced = []cache.InformerSynced{synced, nodes.Informer().HasSynced}
	return c, nil
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error { return c.queue.Run(ctx, c.synced...) }

func (c *Controller) sync(ctx context.Context, name string) (time.Duration, error) {
	csr, err := c.requests.Get(name)
	if apierrors.IsNotFound(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read request %s: %w", name, err)
	}
	if has(csr, certificatesv1.CertificateApproved) || has(csr, certificatesv1.CertificateDenied) {
		return 0, nil
	}
	facts, err := c.facts()
	if err != nil {
		return 0, err
	}
	v := Decide(csr, facts)
	if v.Action == Leave {
		return 0, nil
	}
	csr = csr.DeepCopy()
	kind := certificatesv1.CertificateApproved
	if v.Action == Deny {
		kind = certificatesv1.CertificateDenied
	}
	csr.Status.Conditions = append(csr.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
		Type: kind, Status: corev1.ConditionTrue, Reason: v.Reason, Message: v.Message, LastUpdateTime: metav1.NewTime(c.Clock.Now()),
	})
	done, err := c.Client.CertificatesV1().CertificateSigningRequests().UpdateApproval(ctx, name, csr, metav1.UpdateOptions{})
	if err != nil {
		return 0, fmt.Errorf("decide request %s: %w", name, err)
	}
	if v.Action == Approve {
		c.approved[string(done.UID)] = done
	}
	c.Log.Info("certificate request decided", "request", name, "by", csr.Spec.Username, "decision", kind, "why", v.Message)
	return 0, nil
}

func (c *Controller) facts() (Facts, error) {
	nodes, err := c.nodes.List(labels.Everything())
	if err != nil {
		return Facts{}, fmt.Errorf("list nodes: %w", err)
	}
	others, err := c.requests.List(labels.Everything())
	if err != nil {
		return Facts{}, fmt.Errorf("list requests: %w", err)
	}
	for _, o := range others {
		if has(o, certificatesv1.CertificateApproved) {
			delete(c.approved, string(o.UID))
		}
	}
	for _, o := range c.approved {
		others = append(others, o)
	}
	return Facts{Nodes: nodes, Others: others, Reserved: c.reserved}, nil
}
