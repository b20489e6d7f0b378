// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/kubernetes/fake"
	bootstrapapi "k8s.io/cluster-bootstrap/token/api"
)

func tokenSecret(id, secret string, expires time.Time) *corev1.Secret {
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: bootstrapapi.BootstrapTokenSecretPrefix + id},
		Type:       bootstrapapi.SecretTypeBootstrapToken,
		Data: map[string][]byte{
			bootstrapapi.BootstrapTokenIDKey:               []byte(id),
			bootstrapapi.BootstrapTokenSecretKey:           []byte(secret),
			bootstrapapi.BootstrapTokenUsageAuthentication: []byte("true"),
			bootstrapapi.BootstrapTokenExpirationKey:       []byte(expires.UTC().Format(time.RFC3339)),
		},
	}
}

func bearing(token string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/api", nil)
	r.Header.Set("Authorization", "Bearer "+token)
	return r
}

func TestFreshTokensAreReadFromTheStore(t *testing.T) {
	soon := time.Now().Add(time.Hour)
	client := fake.NewClientset(
		tokenSecret("abcdef", "0123456789abcdef", soon),
		tokenSecret("gone00", "0123456789abcdef", time.Now().Add(-time.Hour)),
	)
	tokens := newFreshTokens(client, nil)

	answer, ok, err := tokens.AuthenticateRequest(bearing("abcdef.0123456789abcdef"))
	if err != nil || !ok {
		t.Fatalf("a token whose Secret is stored: accepted %v, %v", ok, err)
	}
	if got := answer.User.GetName(); got != bootstrapapi.BootstrapUserPrefix+"abcdef" {
		t.Errorf("it is %q", got)
	}
	for _, want := range []string{bootstrapapi.BootstrapDefaultGroup, user.AllAuthenticated} {
		if !slices.Contains(answer.User.GetGroups(), want) {
			t.Errorf("groups %v lack %s", answer.User.GetGroups(), want)
		}
	}
	for name, token := range map[string]string{
		"unknown":       "nobody.0123456789abcdef",
		"wrong secret":  "abcdef.fedcba9876543210",
		"expired":       "gone00.0123456789abcdef",
		"no such token": "a-service-account's",
	} {
		if _, ok, _ := tokens.AuthenticateRequest(bearing(token)); ok {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestGuessedTokensCauseBoundedReads(t *testing.T) {
	client := fake.NewClientset()
	tokens := newFreshTokens(client, nil)
	began := time.Now()
	const guesses = 10 * freshTokenBurst
	for range guesses {
		if _, ok, _ := tokens.AuthenticateRequest(bearing("abcdef.0123456789abcdef")); ok {
			t.Fatal("a guess was accepted")
		}
	}
	if most := freshTokenBurst + int(freshTokenReads*time.Since(began).Seconds()) + 1; len(client.Actions()) > most {
		t.Errorf("%d guesses caused %d reads, want %d at most", guesses, len(client.Actions()), most)
	}
}
