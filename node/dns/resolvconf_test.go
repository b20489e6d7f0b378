// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestResolvConf(t *testing.T) {
	const host = "# made by hand\ndomain old.example\nsearch corp.example. lab.example\nnameserver 192.0.2.53\nnameserver 127.0.0.53 ; stub\noptions timeout:2 ndots:1\noptions rotate timeout:3\n"
	one := "1"
	many := make([]string, 40)
	for i := range many {
		many[i] = fmt.Sprintf("s%d.example", i)
	}
	long := []string{strings.Repeat("a", 63) + strings.Repeat("."+strings.Repeat("b", 63), 3), "x"}
	for len(long) < 11 {
		long = append(long, fmt.Sprintf("%d.%s", len(long), long[0][:250]))
	}
	for _, c := range []struct {
		name    string
		policy  corev1.DNSPolicy
		hostNet bool
		config  *corev1.PodDNSConfig
		dns     string
		host    string
		want    string
	}{
		{"cluster first", corev1.DNSClusterFirst, false, nil, "10.43.0.10,fd73::a", host,
			"search shop.svc.cluster.local svc.cluster.local cluster.local corp.example lab.example\nnameserver 10.43.0.10\nnameserver fd73::a\noptions ndots:5\n"},
		{"no policy is cluster first", "", false, nil, "10.43.0.10", "",
			"search shop.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.43.0.10\noptions ndots:5\n"},
		{"cluster first on the host's network", corev1.DNSClusterFirst, true, nil, "10.43.0.10", host,
			"search corp.example lab.example\nnameserver 192.0.2.53\nnameserver 127.0.0.53\noptions timeout:3 ndots:1 rotate\n"},
		{"with host net", corev1.DNSClusterFirstWithHostNet, true, nil, "10.43.0.10", "nameserver 192.0.2.53\n",
			"search shop.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.43.0.10\noptions ndots:5\n"},
		{"default cannot reach the host's loopback", corev1.DNSDefault, false, nil, "10.43.0.10", host,
			"search corp.example lab.example\nnameserver 192.0.2.53\nnameserver 10.43.0.10\noptions timeout:3 ndots:1 rotate\n"},
		{"no cluster DNS", corev1.DNSClusterFirst, false, nil, "", "search .\nnameserver 192.0.2.53\n", "search .\nnameserver 192.0.2.53\n"},
		{"none", corev1.DNSNone, false, &corev1.PodDNSConfig{Nameservers: []string{"192.0.2.1"}, Searches: []string{"a.example."},
			Options: []corev1.PodDNSConfigOption{{Name: "ndots", Value: &one}, {Name: "edns0"}}}, "10.43.0.10", host,
			"search a.example\nnameserver 192.0.2.1\noptions ndots:1 edns0\n"},
		{"config adds and overrides", corev1.DNSClusterFirst, false, &corev1.PodDNSConfig{Nameservers: []string{"10.43.0.10", "192.0.2.1"},
			Searches: []string{"svc.cluster.local", "b.example"}, Options: []corev1.PodDNSConfigOption{{Name: "ndots", Value: &one}}}, "10.43.0.10", "",
			"search shop.svc.cluster.local svc.cluster.local cluster.local b.example\nnameserver 10.43.0.10\nnameserver 192.0.2.1\noptions ndots:1\n"},
		{"too many", corev1.DNSNone, false, &corev1.PodDNSConfig{Nameservers: []string{"1.1.1.1", "2.2.2.2", "3.3.3.3", "4.4.4.4"}, Searches: many}, "", "",
			"search " + strings.Join(many[:32], " ") + "\nnameserver 1.1.1.1\nnameserver 2.2.2.2\nnameserver 3.3.3.3\n"},
		{"too long", corev1.DNSNone, false, &corev1.PodDNSConfig{Nameservers: []string{"1.1.1.1"}, Searches: long}, "", "",
			"search " + strings.Join(long[:9], " ") + "\nnameserver 1.1.1.1\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"},
				Spec: corev1.PodSpec{DNSPolicy: c.policy, HostNetwork: c.hostNet, DNSConfig: c.config}}
			var addresses []netip.Addr
			for _, text := range strings.FieldsFunc(c.dns, func(r rune) bool { return r == ',' }) {
				addresses = append(addresses, netip.MustParseAddr(text))
			}
			got, err := ResolvConf(pod, addresses, "cluster.local", []byte(c.host))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, string(got)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
	if _, err := ResolvConf(&corev1.Pod{Spec: corev1.PodSpec{DNSPolicy: "Wild"}}, nil, "cluster.local", nil); err == nil {
		t.Error("an unknown policy was let through")
	}
}

func FuzzParseResolvConf(f *testing.F) {
	f.Add([]byte("search a b\nnameserver 1.1.1.1\noptions ndots:5\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		c := parseResolvConf(content).limited()
		if again := parseResolvConf(c.format()).limited(); string(again.format()) != string(c.format()) {
			t.Fatalf("%q is not read back as written: %q", c.format(), again.format())
		}
	})
}
