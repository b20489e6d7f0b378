// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"skep.io/skep/api"
	"skep.io/skep/node/join"
)

// What a server publishes is what an agent learns.
func TestClusterSettingsRoundTrip(t *testing.T) {
	s, err := parsed(t, "--cluster-domain=c.test", "--service-node-port-range=31000-31999", "--ingress-http-port=8080", "--node-monitor-grace-period=12s").complete(dualHost)
	if err != nil {
		t.Fatal(err)
	}
	got, err := clusterFrom(s.data(), true)
	if err != nil || !reflect.DeepEqual(got, s.clusterSettings) {
		t.Errorf("got %+v, want %+v, %v", got, s.clusterSettings, err)
	}
	if got, err = clusterFrom(s.data(), false); err != nil || len(got.clusterCIDRs) != 1 || len(got.clusterDNS) != 1 {
		t.Errorf("on a host without IPv6: %+v, %v", got, err)
	}
	before := s.data()
	delete(before, "node-monitor-grace-period")
	if got, err = clusterFrom(before, true); err != nil || got.nodeGrace != 40*time.Second {
		t.Errorf("from a server that does not tell of grace: %s, %v", got.nodeGrace, err)
	}
	for key := range s.data() {
		bad := s.data()
		bad[key] = "?"
		if _, err := clusterFrom(bad, true); err == nil {
			t.Errorf("%s: nonsense is taken", key)
		}
	}
}

func TestVersionSkew(t *testing.T) {
	for _, c := range []struct {
		agent, server string
		fits          bool
	}{
		{"v1.36.3+skep", "v1.36.3+skep", true}, {"v1.37.0", "v1.36.9", true}, {"v1.34.0", "v1.36.0", true},
		{"v1.38.0", "v1.36.0", false}, {"v2.0.0", "v1.36.0", false},
	} {
		if err := checkSkew(c.agent, c.server); (err == nil) != c.fits || err != nil && !errors.Is(err, errVersionSkew) {
			t.Errorf("agent %s, server %s: %v", c.agent, c.server, err)
		}
	}
}

// Ranges of pods and services are nobody else's.
func TestNetworkConflicts(t *testing.T) {
	c := clusterSettings{
		clusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd73::/48")},
		serviceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")},
	}
	for network, says := range map[string]string{
		"192.0.2.0/24": "", "10.41.0.0/16": "", "fe80::/64": "", "2001:db8::/32": "",
		"10.42.7.0/24": "--cluster-cidr 10.42.0.0/16 overlaps the network 10.42.7.0/24 of this machine's eth0",
		"10.0.0.0/8":   "--service-cluster-ip-range 10.43.0.0/16 overlaps", "fd73::/64": "--cluster-cidr fd73::/48 overlaps",
	} {
		err := c.conflicts([]hostNetwork{{"eth0", netip.MustParsePrefix(network)}})
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", network, err, says)
		}
	}
}

func TestServerURL(t *testing.T) {
	for text, want := range map[string]string{
		"https://a:1234": "https://a:1234", "https://a": "https://a:6443", "https://[2001:db8::1]/": "https://[2001:db8::1]:6443",
		"": "", "a:6443": "", "http://a": "", "https://a/path": "", "https://u:p@a": "", "https://": "",
	} {
		u, err := serverURL(text)
		switch {
		case want == "" && err == nil:
			t.Errorf("%q is taken as %s", text, u)
		case want != "" && (err != nil || u.String() != want):
			t.Errorf("%q: got %v, %v", text, u, err)
		}
	}
}

func TestAgentOptions(t *testing.T) {
	token := join.Token{ID: "abcdef", Secret: "0123456789abcdef"}.String()
	files := func(name string) ([]byte, error) {
		if name == "t" {
			return []byte("\n" + token + "\n"), nil
		}
		return nil, os.ErrNotExist
	}
	s, err := (&agentOptions{nodeOptions: nodeOptions{dataDir: "/d"}, server: "https://a", tokenFile: "t"}).complete(dualHost, files)
	if err != nil || s.token != token || s.nodeName != "node-1" {
		t.Errorf("%+v, %v", s, err)
	}
	_, err = (&agentOptions{nodeOptions: nodeOptions{nodeName: "-", nodeIPs: []string{"x"}}, tokenFile: "u", token: "z"}).complete(dualHost, files)
	for _, want := range []string{"--data-dir", "--node-name", "--node-ip", "--server", "--token-file: give either", "--token-file: file does not exist"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("not told: %s, in %v", want, err)
		}
	}
}

func TestTokenList(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var secrets []corev1.Secret
	groups := map[bool]string{true: api.ServerBootstrapGroup, false: api.BootstrapGroup}
	for id, ttl := range map[string]time.Duration{"cccccc": -time.Minute, "aaaaaa": 2 * time.Hour, "bbbbbb": 0} {
		s := tokenSecret(join.Token{ID: id, Secret: "ssssssssssssssss"}, groups[ttl == 0], max(ttl, 0), "for "+id, now)
		if ttl < 0 {
			s.StringData["expiration"] = now.Add(ttl).Format(time.RFC3339)
		}
		s.Data = map[string][]byte{}
		for k, v := range s.StringData { // as the API server does
			s.Data[k] = []byte(v)
		}
		s.CreationTimestamp = metav1.NewTime(now.Add(-time.Hour))
		secrets = append(secrets, *s)
	}
	var out strings.Builder
	if err := printTokens(&out, secrets, now); err != nil {
		t.Fatal(err)
	}
	want := `ID       FOR       EXPIRES IN   AGE   DESCRIPTION
aaaaaa   agents    120m         60m   for aaaaaa
bbbbbb   servers   never        60m   for bbbbbb
cccccc   agents    expired      60m   for cccccc
`
	if out.String() != want {
		t.Errorf("got\n%s", out.String())
	}
}

func TestTokenNeedsOneAuthority(t *testing.T) {
	for _, ca := range []string{"", "x"} {
		if _, err := clusterAuthority(&rest.Config{TLSClientConfig: rest.TLSClientConfig{CAData: []byte(ca)}}); err == nil {
			t.Errorf("%q has a certificate authority", ca)
		}
	}
}
