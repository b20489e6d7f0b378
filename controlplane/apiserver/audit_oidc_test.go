// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bufio"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	auditv1 "k8s.io/apiserver/pkg/apis/audit/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// issuer signs tokens as an OpenID Connect provider does (OpenID Connect Core 1.0, JWT of RFC 7519).
type issuer struct {
	*httptest.Server
	key *rsa.PrivateKey
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{key: key}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q,"id_token_signing_alg_values_supported":["RS256"]}`, i.URL, i.URL+"/keys")
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) {
		n, e := base64.RawURLEncoding.EncodeToString(key.N.Bytes()), base64.RawURLEncoding.EncodeToString(big.NewInt(int64(key.E)).Bytes())
		fmt.Fprintf(w, `{"keys":[{"kty":"RSA","alg":"RS256","use":"sig","kid":"k","n":%q,"e":%q}]}`, n, e)
	})
	i.Server = httptest.NewTLSServer(mux)
	t.Cleanup(i.Close)
	return i
}

// token says that its bearer is subject, for client.
func (i *issuer) token(t *testing.T, subject, client string, groups ...string) string {
	t.Helper()
	claims, err := json.Marshal(map[string]any{
		"iss": i.URL, "sub": subject, "aud": client, "groups": groups, "exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix(),
	})
	if err != nil {
		t.Fatal(err)
	}
	text := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"RS256","kid":"k","typ":"JWT"}`)) + "." + base64.RawURLEncoding.EncodeToString(claims)
	sum := sha256.Sum256([]byte(text))
	signature, err := rsa.SignPKCS1v15(rand.Reader, i.key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}

const auditPolicy = `
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: None, userGroups: ["system:nodes"]}
- {level: Metadata, resources: [{group: "", resources: [secrets]}]}
- {level: RequestResponse, verbs: [create], resources: [{group: "", resources: [configmaps]}], namespaces: [default]}
- {level: None}
`

// An audit event is written at the level that the policy has for it, OIDC tokens say who somebody is, and whoever shows
// nothing is told about health and nothing else.
func TestAuditOIDCAndAnonymous(t *testing.T) {
	dir := t.TempDir()
	op := newIssuer(t)
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	log := filepath.Join(dir, "audit.log")
	access := NewAccess()
	flags := pflag.NewFlagSet("server", pflag.ContinueOnError)
	access.AddFlags(flags)
	err := flags.Parse([]string{
		"--audit-policy-file=" + file("policy.yaml", auditPolicy), "--audit-log-path=" + log, "--audit-log-maxsize=1",
		"--audit-log-maxbackup=2", "--audit-log-maxage=7",
		"--oidc-issuer-url=" + op.URL, "--oidc-client-id=skep", "--oidc-groups-claim=groups", "--oidc-username-prefix=oidc:",
		"--oidc-ca-file=" + file("ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: op.Certificate().Raw}))),
	})
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, filepath.Join(dir, "data"), func(c *Config) { c.Access = access })
	t.Run("oidc", func(t *testing.T) { testOIDC(t, s, op) })
	t.Run("anonymous", func(t *testing.T) { testAnonymous(t, s, op) })
	t.Run("audit", func(t *testing.T) { testAudit(t, s, log) })
}

// overTLS is a client that has nothing but the server's authority and a token.
func (s *testServer) overTLS(token string) *rest.Config {
	return &rest.Config{Host: s.host, BearerToken: token, TLSClientConfig: rest.TLSClientConfig{CAData: s.pki.CAPEM()}, QPS: -1}
}

func testOIDC(t *testing.T, s *testServer, op *issuer) {
	who := func(token string) (authenticationv1.UserInfo, error) {
		review, err := kubernetes.NewForConfigOrDie(s.overTLS(token)).AuthenticationV1().SelfSubjectReviews().Create(
			t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
		if err != nil {
			return authenticationv1.UserInfo{}, err
		}
		return review.Status.UserInfo, nil
	}
	eventually(t, func() error { // the issuer's keys are fetched in the background
		alice, err := who(op.token(t, "alice", "skep", "crew"))
		if err == nil && (alice.Username != "oidc:alice" || !slices.Contains(alice.Groups, "crew")) {
			return fmt.Errorf("%+v", alice)
		}
		return err
	})
	if _, err := who(op.token(t, "alice", "another")); err == nil {
		t.Error("a token for another client is accepted")
	}
	if _, err := who(newIssuer(t).token(t, "alice", "skep")); err == nil {
		t.Error("a token of another issuer is accepted")
	}
}

func testAnonymous(t *testing.T, s *testServer, op *issuer) {
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.pki.CAPool()}}}
	defer client.CloseIdleConnections()
	status := func(path, token string) int {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.host+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		answer, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		return answer.StatusCode
	}
	for path, want := range map[string]int{
		"/readyz": 200, "/livez": 200, "/healthz": 200,
		"/version": 401, "/": 401, "/api": 401, "/api/v1/namespaces": 401, "/openapi/v2": 401, "/metrics": 401, "/readyz/etcd": 401,
	} {
		if got := status(path, ""); got != want {
			t.Errorf("%s without credentials: %d, want %d", path, got, want)
		}
	}
	if got := status("/readyz", "nonsense"); got != 401 {
		t.Errorf("/readyz with a token that does not hold: %d", got)
	}
	if got := status("/version", op.token(t, "alice", "skep")); got != 200 {
		t.Errorf("/version with a token: %d", got)
	}
}

func testAudit(t *testing.T, s *testServer, log string) {
	ctx := t.Context()
	s.secret(t, "audited")
	create := func(name, value string) {
		t.Helper()
		cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"k": value}}
		if _, err := s.client.CoreV1().ConfigMaps("default").Create(ctx, cm, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	create("written", "what it says")
	if _, err := s.client.CoreV1().ConfigMaps("default").Get(ctx, "written", metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	// An event is written before its request is answered (mode blocking), but for the last stage.
	var secret, configMap *auditv1.Event
	eventually(t, func() error {
		secret, configMap = nil, nil
		for _, e := range auditEvents(t, log) {
			switch {
			case e.ObjectRef == nil || e.Verb == "get" && e.ObjectRef.Resource == "configmaps":
				t.Fatalf("the policy does not want %+v", e)
			case e.ObjectRef.Resource == "secrets" && e.Verb == "create" && e.ObjectRef.Name == "audited":
				secret = &e
			case e.ObjectRef.Resource == "configmaps" && e.ObjectRef.Name == "written":
				configMap = &e
			}
		}
		if secret == nil || configMap == nil {
			return fmt.Errorf("not there yet")
		}
		return nil
	})
	if secret.Level != auditv1.LevelMetadata || secret.RequestObject != nil || secret.User.Username != "test-admin" || secret.ResponseStatus.Code != 201 {
		t.Errorf("%+v", secret)
	}
	if configMap.Level != auditv1.LevelRequestResponse || configMap.ResponseObject == nil || !strings.Contains(string(configMap.RequestObject.Raw), "what it says") {
		t.Errorf("%+v", configMap)
	}
	if info, err := os.Stat(log); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	// 5 MB of it fit into a file of 1 MB with two older ones.
	for i := range 10 {
		create(fmt.Sprint("large-", i), strings.Repeat("x", 250_000))
	}
	eventually(t, func() error {
		files, err := filepath.Glob(filepath.Join(filepath.Dir(log), "audit*.log"))
		if err == nil && len(files) != 3 {
			return fmt.Errorf("%q", files)
		}
		return err
	})
}

func auditEvents(t *testing.T, log string) []auditv1.Event {
	t.Helper()
	f, err := os.Open(log)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all []auditv1.Event
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 4<<20)
	for lines.Scan() {
		var e auditv1.Event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			break // still being written
		}
		all = append(all, e)
	}
	return all
}

// What an AuthenticationConfiguration says about anonymous requests takes the place of skep's default.
func TestAuthenticationConfig(t *testing.T) {
	dir := t.TempDir()
	op := newIssuer(t)
	ca := strings.ReplaceAll(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: op.Certificate().Raw})), "\n", "\n      ")
	file := filepath.Join(dir, "authentication.yaml")
	err := os.WriteFile(file, fmt.Appendf(nil, `
apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
anonymous: {enabled: true, conditions: [{path: /version}]}
jwt:
- issuer:
    url: %s
    audiences: [skep]
    certificateAuthority: |
      %s
  claimMappings:
    username: {expression: '"staff:" + claims.sub'}
`, op.URL, ca), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	access := NewAccess()
	flags := pflag.NewFlagSet("server", pflag.ContinueOnError)
	access.AddFlags(flags)
	if err := flags.Parse([]string{"--authentication-config=" + file}); err != nil {
		t.Fatal(err)
	}
	s := start(t, filepath.Join(dir, "data"), func(c *Config) { c.Access = access })
	anyone := kubernetes.NewForConfigOrDie(s.overTLS("")).Discovery().RESTClient()
	if _, err := anyone.Get().AbsPath("/version").DoRaw(t.Context()); err != nil {
		t.Errorf("/version: %v", err)
	}
	if _, err := anyone.Get().AbsPath("/livez").DoRaw(t.Context()); !apierrors.IsUnauthorized(err) {
		t.Errorf("/livez: %v", err)
	}
	eventually(t, func() error {
		review, err := kubernetes.NewForConfigOrDie(s.overTLS(op.token(t, "bob", "skep"))).AuthenticationV1().SelfSubjectReviews().Create(
			t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
		if err == nil && review.Status.UserInfo.Username != "staff:bob" {
			return fmt.Errorf("%+v", review.Status.UserInfo)
		}
		return err
	})
}

// What does not fit together is refused with what to do about it.
func TestAccessMistakes(t *testing.T) {
	for says, args := range map[string][]string{
		"--audit-policy-file: without a policy nothing is audited":      {"--audit-log-path=/tmp/x"},
		"--audit-log-path: say where audit events go":                   {"--audit-policy-file=/tmp/x"},
		"oidc-issuer-url and oidc-client-id must be specified together": {"--oidc-issuer-url=https://a.example"},
	} {
		access := NewAccess()
		flags := pflag.NewFlagSet("server", pflag.ContinueOnError)
		access.AddFlags(flags)
		if err := flags.Parse(args); err != nil {
			t.Fatal(err)
		}
		if err := access.Validate(); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", args, err)
		}
	}
}
