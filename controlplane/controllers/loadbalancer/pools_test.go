// SPDX-License-Identifier: Apache-2.0

package loadbalancer

import (
	"context"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	schemacel "k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"

	"skep.io/skep/api/v1alpha1"
)

// TestPools: counts, conditions, and events only when something becomes so.
func TestPools(t *testing.T) {
	type status struct {
		Total, Used, Free int64
		True              string
		Events            string
	}
	look := func(s Snapshot) map[string]status {
		out := map[string]status{}
		for i, c := range Plan(s).Pools {
			st := status{Total: c.Status.Addresses.Total, Used: c.Status.Addresses.Used, Free: c.Status.Addresses.Free}
			for _, kind := range []string{v1alpha1.PoolReady, v1alpha1.PoolExhausted, v1alpha1.PoolOverlapping} {
				if meta.IsStatusConditionTrue(c.Status.Conditions, kind) {
					st.True += kind + " "
				}
			}
			for _, e := range c.Events {
				st.Events += e.Reason + ": " + e.Message + " "
			}
			out[c.Pool.Name] = st
			s.Pools[i].Status = c.Status
		}
		return out
	}
	s := Snapshot{
		Pools: []*v1alpha1.AddressPool{
			addressPool("a", "198.51.100.0/31", "198.51.100.0-198.51.100.1"), addressPool("b", "198.51.100.1/32", "2001:db8::/64"), addressPool("c", "nonsense", "203.0.113.0/30"),
		},
		Services: []*corev1.Service{service("one", 1, has4("198.51.100.0")), service("two", 2, has4("198.51.100.1"))},
	}
	const none = "no IPv4 address is free: add addresses, or delete Services "
	want := map[string]status{
		"a": {2, 2, 0, "Ready Exhausted Overlapping ", "AddressPoolExhausted: " + none},
		"b": {math.MaxInt64, 1, math.MaxInt64, "Ready Exhausted Overlapping ", "AddressPoolExhausted: " + none},
		"c": {4, 0, 4, "", `InvalidAddressPool: "nonsense" is neither a prefix (192.0.2.16/28) nor a range (192.0.2.16-192.0.2.31): netip.ParsePrefix("nonsense"): no '/' `},
	}
	if diff := cmp.Diff(want, look(s)); diff != "" {
		t.Errorf("at first:\n%s", diff)
	}
	for name, w := range want {
		w.Events = ""
		want[name] = w
	}
	if diff := cmp.Diff(want, look(s)); diff != "" {
		t.Errorf("again:\n%s", diff)
	}
	for _, c := range Plan(s).Pools {
		if c.Write {
			t.Errorf("%s is written again", c.Pool.Name)
		}
	}
	s.Services, s.Pools = s.Services[:1], s.Pools[:1]
	if diff := cmp.Diff(map[string]status{"a": {2, 1, 1, "Ready ", ""}}, look(s)); diff != "" {
		t.Errorf("when a Service and other pools are gone:\n%s", diff)
	}
}

// TestDefinition: the API server takes the definition, and by it refuses pools that make no sense.
func TestDefinition(t *testing.T) {
	ctx := context.Background()
	given := &apiextensionsv1.CustomResourceDefinition{}
	if err := yaml.UnmarshalStrict(v1alpha1.AddressPoolsCRD, given); err != nil {
		t.Fatal(err)
	}
	apiextensionsv1.SetDefaults_CustomResourceDefinition(given)
	apiextensionsv1.SetDefaults_CustomResourceDefinitionSpec(&given.Spec)
	definition := &apiextensions.CustomResourceDefinition{}
	if err := apiextensionsv1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(given, definition, nil); err != nil {
		t.Fatal(err)
	}
	definition.Status.StoredVersions = []string{"v1alpha1"}
	if errs := validation.ValidateCustomResourceDefinition(ctx, definition); len(errs) > 0 {
		t.Fatal(errs.ToAggregate())
	}
	whole := definition.Spec.Validation // where the conversion puts the schema of an only version
	if whole == nil {
		whole = definition.Spec.Versions[0].Schema
	}
	schema, err := structuralschema.NewStructural(whole.OpenAPIV3Schema)
	if err != nil {
		t.Fatal(err)
	}
	rules := schemacel.NewValidator(schema, true, cel.PerCallLimit)
	for spec, want := range map[string]string{
		"{addresses: [192.0.2.16/28, '2001:db8::/64', 192.0.2.1-192.0.2.9, '2001:db8::1 - 2001:db8::2']}": "",
		"{addresses: [192.0.2.9-192.0.2.9, 9.255.255.255-10.0.0.0]}":                                      "",
		"{addresses: [192.0.2.9-192.0.2.8]}":                                                              "must not come after the last",
		"{addresses: [192.0.3.1-192.0.2.8]}":                                                              "must not come after the last",
		"{addresses: ['192.0.2.9-2001:db8::1']}":                                                          "must be a prefix",
		"{addresses: [192.0.2.9]}":                                                                        "must be a prefix",
		"{addresses: [nonsense]}":                                                                         "must be a prefix",
		"{addresses: [a-b]}":                                                                              "must be a prefix",
		"{addresses: [127.0.0.0/24]}":                                                                     "that a host may have",
		"{addresses: [0.0.0.0/0]}":                                                                        "that a host may have",
		"{addresses: ['ff02::/64']}":                                                                      "that a host may have",
		"{addresses: [224.0.0.1-224.0.0.2]}":                                                              "that a host may have",
		"{addresses: [192.0.2.9/32], serviceSelector: {matchExpressions: [{key: a, operator: In}]}}":     "In and NotIn need values",
		"{addresses: [192.0.2.9/32], serviceSelector: {matchExpressions: [{key: a, operator: Exists}]}}": "",
	} {
		var o map[string]any
		if err := yaml.Unmarshal([]byte("apiVersion: skep.io/v1alpha1\nkind: AddressPool\nmetadata: {name: p}\nspec: "+spec), &o); err != nil {
			t.Fatal(err)
		}
		errs, _ := rules.Validate(ctx, nil, schema, runtime.DeepCopyJSON(o), nil, cel.RuntimeCELCostBudget)
		switch err := errs.ToAggregate(); {
		case want == "" && err != nil:
			t.Errorf("%s: %v", spec, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%s: %v, want %q", spec, err, want)
		}
	}
}
