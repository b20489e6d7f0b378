// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"
)

// dump is the table's content in a form that can be compared.
func dump(t *table) (map[string]string, map[string]string) {
	services, reverse := map[string]string{}, map[string]string{}
	t.services.Range(func(key, value any) bool {
		services[fmt.Sprint(key)] = fmt.Sprintf("%+v", *value.(*service))
		return true
	})
	t.reverse.Range(func(key, value any) bool {
		reverse[fmt.Sprint(key)] = fmt.Sprintf("%+v", value)
		return true
	})
	return services, reverse
}

// After any changes the table is the same as one that was filled anew.
func TestTableIsIncremental(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		incremental := &table{}
		now := map[types.NamespacedName]*service{}
		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) {
				fresh := &table{}
				for key, s := range now {
					fresh.set(key, s)
				}
				services, reverse := dump(incremental)
				wantServices, wantReverse := dump(fresh)
				if diff := cmp.Diff(wantServices, services) + cmp.Diff(wantReverse, reverse); diff != "" {
					t.Fatalf("-fresh +incremental:\n%s", diff)
				}
			},
			"set": func(t *rapid.T) {
				name := fmt.Sprintf("s%d", rapid.IntRange(0, 3).Draw(t, "service"))
				key := types.NamespacedName{Namespace: "default", Name: name}
				var s *service
				switch rapid.IntRange(0, 2).Draw(t, "kind") {
				case 0:
					delete(now, key)
				case 1:
					s = newService(clusterIP(name, []string{fmt.Sprintf("10.43.0.%d", rapid.IntRange(1, 5).Draw(t, "ip"))}), nil)
				case 2:
					var endpoints []discoveryv1.Endpoint
					for _, last := range rapid.SliceOfN(rapid.IntRange(1, 6), 0, 4).Draw(t, "endpoints") {
						endpoints = append(endpoints, endpointAt(fmt.Sprintf("10.42.0.%d", last), rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "hostname"), true))
					}
					s = newService(headless(name), []*discoveryv1.EndpointSlice{slice(name, "x", nil, endpoints...)})
				}
				incremental.set(key, s)
				if s != nil {
					now[key] = s
				} else {
					delete(now, key)
				}
			},
		})
	})
}

func TestDashed(t *testing.T) {
	for text, label := range map[string]string{
		"10.42.0.5": "10-42-0-5", "fd73:6b65:7042::5": "fd73-6b65-7042--5", "::1": "0--1", "fd73::": "fd73--0", "1:2:3:4:5:6:7:8": "1-2-3-4-5-6-7-8",
	} {
		address := netip.MustParseAddr(text)
		if got := dashed(address); got != label {
			t.Errorf("%s: got %s, want %s", text, got, label)
		}
		if back, ok := undashed(label); !ok || back != address {
			t.Errorf("%s: read back as %v", label, back)
		}
	}
	for _, label := range []string{"", "web", "10-42-0", "10-42-0-256", "1-2-3-4-5"} {
		if address, ok := undashed(label); ok {
			t.Errorf("%q was read as %v", label, address)
		}
	}
}

// BenchmarkAnswer is the cost of one question about a service of 10,000.
func BenchmarkAnswer(b *testing.B) {
	h, t := testHandler()
	for i := range 10000 {
		name := fmt.Sprintf("svc-%d", i)
		t.set(types.NamespacedName{Namespace: "default", Name: name}, newService(clusterIP(name, []string{fmt.Sprintf("10.43.%d.%d", i/250, i%250)}), nil))
	}
	m := newQuestion("svc-5000.default.svc.cluster.local.")
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if reply, _ := h.answer(b.Context(), m); len(reply.Answer) != 1 {
				b.Error("no answer")
			}
		}
	})
}
