// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	authgroup "k8s.io/apiserver/pkg/authentication/group"
	"k8s.io/apiserver/pkg/authentication/request/bearertoken"
	"k8s.io/client-go/kubernetes"
	corev1listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/kubernetes/plugin/pkg/auth/authenticator/token/bootstrap"
)

// A stranger who guesses tokens causes at most so many reads of the store.
const (
	freshTokenReads = 10 // a second
	freshTokenBurst = 100
	freshTokenWait  = 10 * time.Second
)

// newFreshTokens accepts a bootstrap token that this server's cache of Secrets, which upstream's own
// authenticator asks, does not have yet: one made a moment ago, here or on another server. It
// belongs behind that one.
func newFreshTokens(client kubernetes.Interface, audiences authenticator.Audiences) authenticator.Request {
	secrets := storedSecrets{client: client, reads: flowcontrol.NewTokenBucketRateLimiter(freshTokenReads, freshTokenBurst)}
	tokens := authenticator.WrapAudienceAgnosticToken(audiences, bootstrap.NewTokenAuthenticator(secrets))
	return authgroup.NewAuthenticatedGroupAdder(bearertoken.New(tokens))
}

// storedSecrets reads the Secrets of kube-system from the store, a bounded number of times a second;
// beyond that it knows none.
type storedSecrets struct {
	corev1listers.SecretNamespaceLister // nil: an authenticator lists nothing

	client kubernetes.Interface
	reads  flowcontrol.RateLimiter
}

// Get has no context in a lister's signature, hence the time limit of its own.
func (s storedSecrets) Get(name string) (*corev1.Secret, error) {
	if !s.reads.TryAccept() {
		return nil, apierrors.NewNotFound(corev1.Resource("secrets"), name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), freshTokenWait)
	defer cancel()
	return s.client.CoreV1().Secrets(metav1.NamespaceSystem).Get(ctx, name, metav1.GetOptions{})
}
