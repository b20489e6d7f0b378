// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"slices"
	"testing"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"

	"skep.io/skep/api"
)

func TestInForce(t *testing.T) {
	var asked []string
	refused := ""
	a := authorizer.AuthorizerFunc(func(_ context.Context, attr authorizer.Attributes) (authorizer.Decision, string, error) {
		name := attr.GetUser().GetName() + attr.GetNamespace()
		if groups := attr.GetUser().GetGroups(); len(groups) > 0 {
			name = groups[0] + attr.GetNamespace()
		}
		asked = append(asked, name)
		if name == refused {
			return authorizer.DecisionNoOpinion, "", nil
		}
		return authorizer.DecisionAllow, "", nil
	})
	if !inForce(t.Context(), a) {
		t.Error("everything is allowed, and is not in force")
	}
	all := slices.Clone(asked)
	for _, want := range []string{
		api.InformersUser, api.IngressUser, api.BootstrapUser, api.BootstrapUser + "kube-system", user.NodesGroup, user.NodesGroup + "kube-system",
		"system:serviceaccount:kube-system:certificate-controller",
	} {
		if !slices.Contains(all, want) {
			t.Errorf("nobody asked for %s, only for %q", want, all)
		}
	}
	for _, refused = range all {
		if inForce(t.Context(), a) {
			t.Errorf("%s is refused, and all is in force", refused)
		}
	}
}
