// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"crypto/tls"
	"fmt"
	"path"
	"reflect"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"
)

// TestPathExamples holds the examples of Kubernetes' own documentation of path types.
func TestPathExamples(t *testing.T) {
	for _, tc := range []struct {
		kind, path, request string
		match               bool
	}{
		{"Prefix", "/", "/anything", true},
		{"Exact", "/foo", "/foo", true},
		{"Exact", "/foo", "/bar", false},
		{"Exact", "/foo", "/foo/", false},
		{"Exact", "/foo/", "/foo", false},
		{"Prefix", "/foo", "/foo", true},
		{"Prefix", "/foo", "/foo/", true},
		{"Prefix", "/foo/", "/foo", true},
		{"Prefix", "/foo/", "/foo/", true},
		{"Prefix", "/aaa/bb", "/aaa/bbb", false},
		{"Prefix", "/aaa/bbb", "/aaa/bbb", true},
		{"Prefix", "/aaa/bbb/", "/aaa/bbb", true},
		{"Prefix", "/aaa/bbb", "/aaa/bbb/", true},
		{"Prefix", "/aaa/bbb", "/aaa/bbb/ccc", true},
		{"Prefix", "/aaa/bbb", "/aaa/bbbxyz", false},
		{"Prefix", "/foo", "/FOO", false},
		{"Prefix", "/aaa", "/aaa/../bbb", false},
		{"Prefix", "/bbb", "/aaa/..//bbb/.", true},
		{"Exact", "/foo/", "/foo/bar/..", true},
		{"Prefix", "/", "*", true},
	} {
		table := Build(Input{Ingresses: []*networkingv1.Ingress{ingress("i", rule{"h", tc.path, tc.kind == "Exact", "s"})}})
		if got := table.Match("h", tc.request) != nil; got != tc.match {
			t.Errorf("%s %s with request %s: %v, want %v", tc.kind, tc.path, tc.request, got, tc.match)
		}
	}
}

func TestHostForms(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "a.b": "a.b", "A.b:80": "a.b", "a.b.": "a.b", "a.b.:443": "a.b", "192.0.2.1:80": "192.0.2.1",
		"[2001:DB8::1]:80": "2001:db8::1", "[::1]": "::1", "[::1": "", "[zz]": "", ":80": "",
	} {
		if got := canonicalHost(in); got != want {
			t.Errorf("canonicalHost(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestWildcardIsOneLabel(t *testing.T) {
	table := Build(Input{Ingresses: []*networkingv1.Ingress{ingress("i", rule{"*.foo.com", "/", false, "s"})}})
	for host, want := range map[string]bool{"bar.foo.com": true, "baz.bar.foo.com": false, "foo.com": false, ".foo.com": false, "com": false, "": false} {
		if got := table.Match(host, "/") != nil; got != want {
			t.Errorf("%q: %v, want %v", host, got, want)
		}
	}
}

func backendRef(name string) *networkingv1.IngressBackend {
	b := serviceBackend(name)
	return &b
}

func TestDefaultBackends(t *testing.T) {
	withHost := ingress("with-host", rule{"a.com", "/x", false, "x"})
	withHost.Spec.DefaultBackend = backendRef("host-default")
	bare := ingress("bare")
	bare.Spec.DefaultBackend = backendRef("global-default")
	noHTTP := ingress("no-http")
	noHTTP.Spec.Rules = []networkingv1.IngressRule{{Host: "b.com"}}
	noHTTP.Spec.DefaultBackend = backendRef("b-default")
	hostless := ingress("hostless", rule{"", "/open", false, "open"})
	table := Build(Input{Ingresses: []*networkingv1.Ingress{withHost, bare, noHTTP, hostless}})
	for target, want := range map[string]string{
		"a.com/x": "x", "a.com/y": "host-default", "a.com/open": "host-default", "b.com/": "b-default",
		"c.com/": "global-default", "c.com/open/1": "open",
	} {
		host, p, _ := strings.Cut(target, "/")
		if got := table.Match(host, "/"+p).Backend.Service; got != want {
			t.Errorf("%s: %s, want %s", target, got, want)
		}
	}
}

func class(name, controller string, isDefault bool) *networkingv1.IngressClass {
	c := &networkingv1.IngressClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networkingv1.IngressClassSpec{Controller: controller}}
	if isDefault {
		c.Annotations = map[string]string{networkingv1.AnnotationIsDefaultIngressClass: "true"}
	}
	return c
}

func TestWhichIngressesAreOurs(t *testing.T) {
	spec := func(name string) *networkingv1.Ingress {
		ing := ingress("i")
		ing.Spec.IngressClassName = &name
		return ing
	}
	legacy := func(name string) *networkingv1.Ingress {
		ing := ingress("i")
		ing.Spec.IngressClassName = nil
		ing.Annotations[classAnnotation] = name
		return ing
	}
	none := ingress("i")
	none.Spec.IngressClassName = nil
	ours, def := class("mine", "skep.io/ingress", false), class("skep", "skep.io/ingress", true)
	other := class("nginx", "k8s.io/ingress-nginx", true)
	stolen := class("skep", "k8s.io/ingress-nginx", false)
	for name, tc := range map[string]struct {
		ing     *networkingv1.Ingress
		classes []*networkingv1.IngressClass
		want    bool
	}{
		"by name, no class object":         {spec("skep"), nil, true},
		"by name of another class of ours": {spec("mine"), []*networkingv1.IngressClass{ours}, true},
		"another's class":                  {spec("nginx"), []*networkingv1.IngressClass{other, def}, false},
		"our name, another's controller":   {spec("skep"), []*networkingv1.IngressClass{stolen}, false},
		"annotation":                       {legacy("skep"), []*networkingv1.IngressClass{def}, true},
		"another's annotation":             {legacy("nginx"), []*networkingv1.IngressClass{def}, false},
		"no class, ours is default":        {none, []*networkingv1.IngressClass{def}, true},
		"no class, another is default":     {none, []*networkingv1.IngressClass{other, ours}, false},
	} {
		if got := len(Ours([]*networkingv1.Ingress{tc.ing}, tc.classes)) == 1; got != tc.want {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}

func TestOldestWinsAndTheOtherHears(t *testing.T) {
	young, old := ingress("a", rule{"h", "/x/", false, "young"}), ingress("b", rule{"h", "/x", false, "old"})
	young.CreationTimestamp = metav1.NewTime(time.Unix(200, 0))
	old.CreationTimestamp = metav1.NewTime(time.Unix(100, 0))
	table := Build(Input{Ingresses: []*networkingv1.Ingress{young, old}})
	if got := table.Match("h", "/x").Backend.Service; got != "old" {
		t.Errorf("%s won", got)
	}
	if len(table.Problems) != 1 || table.Problems[0].Ingress.Name != "a" || table.Problems[0].Reason != "Conflict" {
		t.Errorf("problems: %+v", table.Problems)
	}
}

func TestAnnotations(t *testing.T) {
	for value, want := range map[string]int64{"1m": 1 << 20, "10k": 10 << 10, "2G": 2 << 30, "17": 17, "0": -1, "x": 0, "-1": 0, "": 0, "9999999999g": 0} {
		ing := ingress("i", rule{"h", "/", false, "s"})
		ing.Annotations["nginx.ingress.kubernetes.io/proxy-body-size"] = value
		table := Build(Input{Ingresses: []*networkingv1.Ingress{ing}})
		if got := table.Routes[0].Options.MaxBody; got != want {
			t.Errorf("proxy-body-size %q: %d, want %d", value, got, want)
		}
		if (want == 0) != (len(table.Problems) == 1) {
			t.Errorf("proxy-body-size %q: problems %v", value, table.Problems)
		}
	}
	for value, want := range map[string]time.Duration{"90": 90 * time.Second, "2m": 2 * time.Minute, "soon": 0} {
		ing := ingress("i", rule{"h", "/", false, "s"})
		ing.Annotations["skep.io/proxy-read-timeout"] = value
		ing.Annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"] = "1"
		if got := Build(Input{Ingresses: []*networkingv1.Ingress{ing}}).Routes[0].Options.ReadTimeout; got != want {
			t.Errorf("proxy-read-timeout %q: %v, want %v", value, got, want)
		}
	}
}

func TestCertificatesAndRedirects(t *testing.T) {
	secret := func(n string) types.NamespacedName { return types.NamespacedName{Namespace: "default", Name: n} }
	exact, wild, all := &tls.Certificate{}, &tls.Certificate{}, &tls.Certificate{}
	off := withTLS(ingress("off", rule{"off.com", "/", false, "s"}), "exact", "off.com")
	off.Annotations["nginx.ingress.kubernetes.io/ssl-redirect"] = "false"
	own := withTLS(ingress("own", rule{"own.com", "/", false, "s"}), "exact", "own.com")
	own.Annotations["nginx.ingress.kubernetes.io/ssl-redirect"] = "true"
	own.Annotations["skep.io/ssl-redirect"] = "false"
	forced := ingress("forced", rule{"forced.com", "/", false, "s"})
	forced.Annotations["nginx.ingress.kubernetes.io/force-ssl-redirect"] = "true"
	table := Build(Input{
		Ingresses: []*networkingv1.Ingress{
			withTLS(ingress("a", rule{"a.com", "/", false, "s"}, rule{"plain.com", "/", false, "s"}), "exact", "a.com"),
			withTLS(ingress("b", rule{"*.w.com", "/", false, "s"}, rule{"x.w.com", "/", false, "s"}), "wild", "*.w.com"),
			withTLS(ingress("c", rule{"c.com", "/", false, "s"}), "missing", "c.com"),
			withTLS(ingress("d"), "all"),
			off, own, forced,
		},
		Certificates: map[types.NamespacedName]*tls.Certificate{secret("exact"): exact, secret("wild"): wild, secret("all"): all},
	})
	for name, want := range map[string]*tls.Certificate{"a.com": exact, "A.COM.": exact, "x.w.com": wild, "y.x.w.com": all, "w.com": all, "c.com": all, "": all} {
		if table.Certificate(name) != want {
			t.Errorf("certificate for %q is another one", name)
		}
	}
	for host, want := range map[string]bool{"a.com": true, "plain.com": false, "q.w.com": true, "x.w.com": true, "c.com": false, "off.com": false, "own.com": false, "forced.com": true} {
		if got := table.Match(host, "/").Redirect; got != want {
			t.Errorf("redirect of %s: %v, want %v", host, got, want)
		}
	}
}

// naiveMatch says by comparing every rule what Match finds through its index.
func naiveMatch(ingresses []*networkingv1.Ingress, host, request string) string {
	elements := func(p string) []string {
		if p = strings.Trim(p, "/"); p == "" {
			return nil
		}
		return strings.Split(p, "/")
	}
	best, bestRank := "", [3]int{-1}
	consider := func(backend string, rank [3]int) {
		for i := range rank {
			if rank[i] != bestRank[i] {
				if rank[i] > bestRank[i] {
					best, bestRank = backend, rank
				}
				return
			}
		}
	}
	for _, ing := range ingresses {
		for _, r := range ing.Spec.Rules {
			specificity := -1
			switch {
			case r.Host == "":
				specificity = 0
			case r.Host == host:
				specificity = 2
			case strings.HasPrefix(r.Host, "*.") && strings.Count(host, ".") == strings.Count(r.Host, ".") && strings.HasSuffix(host, r.Host[1:]):
				specificity = 1
			}
			if specificity < 0 {
				continue
			}
			for _, p := range r.HTTP.Paths {
				have, want := elements(request), elements(p.Path)
				switch {
				case *p.PathType == networkingv1.PathTypeExact && p.Path == request:
					consider(p.Backend.Service.Name, [3]int{specificity, 2, len(want)})
				case *p.PathType == networkingv1.PathTypePrefix && len(have) >= len(want) && reflect.DeepEqual(append([]string{}, have[:len(want)]...), append([]string{}, want...)):
					consider(p.Backend.Service.Name, [3]int{specificity, 1, len(want)})
				}
			}
			if ing.Spec.DefaultBackend != nil {
				consider(ing.Spec.DefaultBackend.Service.Name, [3]int{specificity, 0, 0})
			}
		}
	}
	return best
}

func TestMatchEqualsNaiveModel(t *testing.T) {
	hosts := rapid.SampledFrom([]string{"", "a.com", "b.com", "x.a.com", "*.a.com", "*.b.com", "*.x.a.com"})
	asked := rapid.SampledFrom([]string{"a.com", "b.com", "c.com", "x.a.com", "y.a.com", "y.x.a.com", "q.b.com"})
	paths := rapid.Custom(func(t *rapid.T) string {
		p := "/" + strings.Join(rapid.SliceOfN(rapid.SampledFrom([]string{"a", "ab", "b", "c"}), 0, 4).Draw(t, "elements"), "/")
		if p != "/" && rapid.Bool().Draw(t, "slash") {
			p += "/"
		}
		return p
	})
	rapid.Check(t, func(t *rapid.T) {
		var ingresses []*networkingv1.Ingress
		n := 0
		for i := range rapid.IntRange(1, 6).Draw(t, "ingresses") {
			var rules []rule
			for range rapid.IntRange(1, 5).Draw(t, "rules") {
				n++
				rules = append(rules, rule{hosts.Draw(t, "host"), paths.Draw(t, "path"), rapid.Bool().Draw(t, "exact"), fmt.Sprint("s", n)})
			}
			ing := ingress(fmt.Sprint("i", i), rules...)
			if rapid.IntRange(0, 3).Draw(t, "default") == 0 {
				ing.Spec.DefaultBackend = backendRef(fmt.Sprint("d", i))
			}
			ing.CreationTimestamp = metav1.NewTime(time.Unix(int64(i), 0))
			ingresses = append(ingresses, ing)
		}
		table := Build(Input{Ingresses: rapid.Permutation(ingresses).Draw(t, "order")})
		for range 20 {
			host, p := asked.Draw(t, "asked"), paths.Draw(t, "request")
			got := ""
			if r := table.Match(host, p); r != nil {
				got = r.Backend.Service
			}
			if want := naiveMatch(ingresses, host, p); got != want {
				t.Fatalf("%s%s: got %q, want %q", host, p, got, want)
			}
		}
	})
}

func FuzzMatch(f *testing.F) {
	f.Add("A.example.com:80", "/a/../b//c/")
	f.Add("[::1]:80", "*")
	f.Add("*.a.com", "/./..")
	f.Add(".", "/a%2f..")
	table := Build(Input{Ingresses: []*networkingv1.Ingress{
		ingress("i", rule{"a.example.com", "/a/b", false, "s"}, rule{"*.example.com", "/", false, "s"}, rule{"", "/x/y/z", false, "s"}),
	}})
	f.Fuzz(func(t *testing.T, host, p string) {
		h := canonicalHost(host)
		if again := canonicalHost(h); !strings.Contains(h, ":") && !strings.HasSuffix(h, ".") && again != h {
			t.Errorf("canonicalHost is not stable: %q, %q, %q", host, h, again)
		}
		c := canonicalPath(p)
		if c[0] != '/' || strings.Contains(c, "//") || strings.Contains(c+"/", "/../") || strings.Contains(c+"/", "/./") {
			t.Errorf("canonicalPath(%q) = %q", p, c)
		}
		if strings.HasPrefix(p, "/") && path.Clean(c) != path.Clean(p) {
			t.Errorf("canonicalPath(%q) = %q leads elsewhere", p, c)
		}
		table.Match(h, p)
		table.Certificate(host)
	})
}
