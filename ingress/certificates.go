// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/netip"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

var errSecretMissing = errors.New("no such Secret")

// certificates watches the Secrets that Ingresses name, each by itself: a permission for those
// names is all it takes, and no other Secret ever reaches this process.
type certificates struct {
	client  kubernetes.Interface
	changed func()

	mu      sync.Mutex
	watches map[types.NamespacedName]context.CancelFunc
	loaded  map[types.NamespacedName]loadedSecret // only what is known already
	wg      sync.WaitGroup
}

type loadedSecret struct {
	cert     *tls.Certificate
	crt, key []byte
	err      error
}

// watch makes refs the set of watched Secrets.
func (c *certificates) watch(ctx context.Context, refs map[types.NamespacedName]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, cancel := range c.watches {
		if !refs[name] {
			cancel()
			delete(c.watches, name)
			delete(c.loaded, name)
		}
	}
	for name := range refs {
		if c.watches[name] != nil {
			continue
		}
		wctx, cancel := context.WithCancel(ctx)
		c.watches[name] = cancel
		c.wg.Go(func() { c.follow(wctx, name) })
	}
}

// follow keeps one Secret's certificate up to date until ctx ends.
func (c *certificates) follow(ctx context.Context, name types.NamespacedName) {
	informer := coreinformers.NewFilteredSecretInformer(c.client, name.Namespace, 0, cache.Indexers{}, func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, name.Name).String()
	})
	take := func(obj any) {
		if s, ok := obj.(*corev1.Secret); ok && s.Name == name.Name {
			c.store(ctx, name, s)
		}
	}
	registration, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    take,
		UpdateFunc: func(_, obj any) { take(obj) },
		DeleteFunc: func(obj any) {
			if tomb, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = tomb.Obj
			}
			if s, ok := obj.(*corev1.Secret); ok && s.Name == name.Name {
				c.store(ctx, name, nil)
			}
		},
	})
	if err != nil {
		return // only after the informer has stopped
	}
	var wg sync.WaitGroup
	wg.Go(func() { informer.RunWithContext(ctx) })
	if cache.WaitFor(ctx, "", registration.HasSyncedChecker()) {
		c.mu.Lock()
		_, known := c.loaded[name]
		c.mu.Unlock()
		if !known {
			c.store(ctx, name, nil)
		}
	}
	wg.Wait()
}

// store takes over a Secret, or its absence.
func (c *certificates) store(ctx context.Context, name types.NamespacedName, s *corev1.Secret) {
	next := loadedSecret{err: errSecretMissing}
	if s != nil {
		next = loadSecret(s)
	}
	c.mu.Lock()
	if ctx.Err() != nil {
		c.mu.Unlock()
		return // no longer watched
	}
	before, known := c.loaded[name]
	same := known && bytes.Equal(before.crt, next.crt) && bytes.Equal(before.key, next.key) &&
		(before.err == nil) == (next.err == nil)
	if !same {
		c.loaded[name] = next
	}
	c.mu.Unlock()
	if !same {
		c.changed()
	}
}

func loadSecret(s *corev1.Secret) loadedSecret {
	l := loadedSecret{crt: s.Data[corev1.TLSCertKey], key: s.Data[corev1.TLSPrivateKeyKey]}
	if len(l.crt) == 0 || len(l.key) == 0 {
		l.err = fmt.Errorf("Secret has no %s or no %s", corev1.TLSCertKey, corev1.TLSPrivateKeyKey)
		return l
	}
	pair, err := tls.X509KeyPair(l.crt, l.key)
	if err != nil {
		l.err = fmt.Errorf("Secret holds no valid certificate and key: %w", err)
		return l
	}
	l.cert = &pair
	return l
}

// snapshot returns what is loaded, and why what is not could not be. A Secret that is in neither
// has not been read yet.
func (c *certificates) snapshot() (certs map[types.NamespacedName]*tls.Certificate, failed map[types.NamespacedName]error) {
	certs, failed = map[types.NamespacedName]*tls.Certificate{}, map[types.NamespacedName]error{}
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, l := range maps.All(c.loaded) {
		if l.err != nil {
			failed[name] = l.err
		} else {
			certs[name] = l.cert
		}
	}
	return certs, failed
}

// pending tells whether a watched Secret has not been read yet.
func (c *certificates) pending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.loaded) < len(c.watches)
}

// fallbackCertificate is what clients get for hosts without a certificate of their own, so that a
// TLS connection can say what is wrong instead of breaking off.
func fallbackCertificate(nodeIPs []netip.Addr) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the fallback certificate's key: %w", err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("making the fallback certificate's serial number: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "skep ingress fallback certificate", Organization: []string{"skep"}},
		DNSNames:     []string{"ingress.skep.invalid"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(10, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, a := range nodeIPs {
		template.IPAddresses = append(template.IPAddresses, net.IP(a.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("making the fallback certificate: %w", err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
