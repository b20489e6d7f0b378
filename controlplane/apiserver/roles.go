// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"strings"

	certificatesv1 "k8s.io/api/certificates/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"

	"skep.io/skep/api"
)

var (
	readers = []string{"get", "list", "watch"}
	watcher = []string{"list", "watch"}
)

// serverJoin is the role of machines that join as servers.
const serverJoin = "skep:server-join"

// ownClusterRoles are what skep's own parts may do, beside upstream's bootstrap policy. Nothing in the
// process acts as the administrator but the API server itself.
var ownClusterRoles = []rbacv1.ClusterRole{
	// Upstream's nodes see their own pods only, as kubelets do. skep's nodes also do the network:
	// NetworkPolicies name pods and namespaces by labels, and the node that enforces them must find
	// their addresses.
	clusterRole("skep:node-network",
		rule(watcher, "", "pods", "namespaces", "services", "nodes"),
		rule(watcher, "discovery.k8s.io", "endpointslices"),
		rule(watcher, "networking.k8s.io", "networkpolicies", "ingresses", "ingressclasses"),
		rule(watcher, "policy.networking.k8s.io", "clusternetworkpolicies"),
		// Whether ClusterNetworkPolicies are defined: only then is it known which there are.
		rule(watcher, "apiextensions.k8s.io", "customresourcedefinitions"),
	),
	metricsReader,
	presetsEditor, presetsViewer,
	// The caches that a server's parts share hold what any of them wants to see. They only ever read.
	clusterRole(api.InformersUser, rule(watcher, rbacv1.APIGroupAll, rbacv1.ResourceAll)),
	// Which Secrets ingress may read follows from Ingresses: ingressSecrets.
	clusterRole(api.IngressUser,
		rule([]string{"update", "patch"}, "networking.k8s.io", "ingresses/status"),
		rule([]string{"create", "patch", "update"}, "", "events"),
		rule([]string{"create", "patch", "update"}, "events.k8s.io", "events"),
	),
	// Cluster-wide objects that skep itself makes, and the controllers' events.
	clusterRole(api.BootstrapUser,
		rule([]string{"create", "patch", "update"}, "", "events"),
		rule([]string{"create", "patch", "update"}, "events.k8s.io", "events"),
		rule([]string{"get", "create", "delete"}, "networking.k8s.io", "ingressclasses"),
		rule([]string{"get", "delete"}, "networking.k8s.io", "ipaddresses"),
		rule([]string{"get", "create", "update"}, "storage.k8s.io", "storageclasses"),
		rule([]string{"get", "create", "update", "patch"}, "apiextensions.k8s.io", "customresourcedefinitions"),
	),
	// Directories of volumes are made and removed by nodes.
	clusterRole("skep:local-path-provisioner",
		rule([]string{"update", "delete"}, "", "nodes/proxy"),
		rule([]string{"get", "create", "update", "delete"}, "", "persistentvolumes"),
		rule([]string{"update"}, "", "persistentvolumeclaims", "persistentvolumeclaims/status"),
	),
	// Which rules of ClusterNetworkPolicies cannot be honoured is said in their status.
	clusterRole("skep:cluster-policy-controller",
		rule(watcher, "policy.networking.k8s.io", "clusternetworkpolicies"),
		rule([]string{"patch"}, "policy.networking.k8s.io", "clusternetworkpolicies/status"),
		rule([]string{"create", "patch", "update"}, "", "events"),
	),
	// What is left of an AddressPool is said in its status.
	clusterRole("skep:address-pool-controller",
		rule(watcher, "skep.io", "addresspools"),
		rule([]string{"patch"}, "skep.io", "addresspools/status"),
		rule([]string{"create", "patch", "update"}, "", "events"),
	),
	// Whoever may do this gets the cluster's keys.
	clusterRole(serverJoin, rbacv1.PolicyRule{Verbs: []string{"post"}, NonResourceURLs: []string{api.JoinPath}}),
	// What machines need to become nodes. Upstream's role of the certificate controller may approve
	// clients' requests only.
	clusterRole("skep:serving-certificate-approver", rbacv1.PolicyRule{
		Verbs: []string{"approve"}, APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"signers"}, ResourceNames: []string{certificatesv1.KubeletServingSignerName},
	}),
}

// Who may change pods of a namespace may change what is added to them, as it was when Kubernetes had PodPresets.
var (
	presetsEditor = partOf("skep:podpresets-edit", []string{"admin", "edit"},
		rule([]string{"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"}, "settings.k8s.io", "podpresets"))
	presetsViewer = partOf("skep:podpresets-view", []string{"view"}, rule(readers, "settings.k8s.io", "podpresets"))
)

// partOf is a role that becomes part of others (view, edit, admin).
func partOf(name string, into []string, rules ...rbacv1.PolicyRule) rbacv1.ClusterRole {
	r := clusterRole(name, rules...)
	r.Labels = map[string]string{}
	for _, other := range into {
		r.Labels["rbac.authorization.k8s.io/aggregate-to-"+other] = "true"
	}
	return r
}

var ownClusterRoleBindings = []rbacv1.ClusterRoleBinding{
	clusterBinding("skep:node-network", "skep:node-network", group(user.NodesGroup)),
	clusterBinding(api.InformersUser, api.InformersUser, person(api.InformersUser)),
	clusterBinding(api.IngressUser, api.IngressUser, person(api.IngressUser)),
	clusterBinding(api.BootstrapUser, api.BootstrapUser, person(api.BootstrapUser)),
	clusterBinding("skep:local-path-provisioner", "skep:local-path-provisioner",
		rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: metav1.NamespaceSystem, Name: "local-path-provisioner"}),
	clusterBinding("skep:cluster-policy-controller", "skep:cluster-policy-controller",
		rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: metav1.NamespaceSystem, Name: "cluster-policy-controller"}),
	clusterBinding("skep:address-pool-controller", "skep:address-pool-controller",
		rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: metav1.NamespaceSystem, Name: "address-pool-controller"}),
	clusterBinding("skep:serving-certificate-approver", "skep:serving-certificate-approver",
		rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: metav1.NamespaceSystem, Name: "certificate-controller"}),
	clusterBinding(serverJoin, serverJoin, group(api.ServerBootstrapGroup)),
	clusterBinding("skep:node-bootstrapper", "system:node-bootstrapper", group(api.BootstrapGroup)),
}

// In kube-system: what nodes agree on, and the objects there that skep itself makes.
var (
	ownRoles = []rbacv1.Role{{
		ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: "skep:cluster-config"},
		Rules: []rbacv1.PolicyRule{{
			Verbs: readers, APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{api.ClusterConfigMap},
		}},
	}, {
		ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: api.BootstrapUser},
		Rules: []rbacv1.PolicyRule{
			rule([]string{"get", "create", "update", "delete"}, "", "services"),
			rule([]string{"get", "create", "update"}, "", "configmaps"),
			rule([]string{"get", "create", "update"}, "coordination.k8s.io", "leases"),
		},
	}}
	ownRoleBindings = []rbacv1.RoleBinding{
		systemBinding("skep:cluster-config", group(user.NodesGroup)),
		systemBinding(api.BootstrapUser, person(api.BootstrapUser)),
	}
)

func clusterRole(name string, rules ...rbacv1.PolicyRule) rbacv1.ClusterRole {
	return rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}
}

func rule(verbs []string, group string, resources ...string) rbacv1.PolicyRule {
	return rbacv1.PolicyRule{Verbs: verbs, APIGroups: []string{group}, Resources: resources}
}

func clusterBinding(name, role string, subject rbacv1.Subject) rbacv1.ClusterRoleBinding {
	return rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Subjects: []rbacv1.Subject{subject},
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
	}
}

// systemBinding gives the role of that name in kube-system to subject.
func systemBinding(role string, subject rbacv1.Subject) rbacv1.RoleBinding {
	return rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: role}, Subjects: []rbacv1.Subject{subject},
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role},
	}
}

func group(name string) rbacv1.Subject {
	return rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: name}
}

func person(name string) rbacv1.Subject {
	return rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: name}
}

// inForce tells whether what the own bindings grant has reached the authorizer, whose caches follow the
// store: whoever is refused in between, an informer for one, pauses for a second.
func inForce(ctx context.Context, a authorizer.Authorizer) bool {
	roles := map[string]rbacv1.PolicyRule{}
	for _, r := range ownClusterRoles {
		if len(r.Rules) > 0 {
			roles["/"+r.Name] = r.Rules[0]
		}
	}
	for _, r := range ownRoles {
		roles[r.Namespace+"/"+r.Name] = r.Rules[0]
	}
	granted := func(namespace, role string, subjects []rbacv1.Subject) bool {
		rule, ok := roles[namespace+"/"+role]
		if !ok {
			return true // a role of upstream's
		}
		decision, _, err := a.Authorize(ctx, grant(rule, namespace, subjects[0]))
		return err == nil && decision == authorizer.DecisionAllow
	}
	for _, b := range ownClusterRoleBindings {
		if !granted("", b.RoleRef.Name, b.Subjects) {
			return false
		}
	}
	for _, b := range ownRoleBindings {
		if !granted(b.Namespace, b.RoleRef.Name, b.Subjects) {
			return false
		}
	}
	return true
}

// grant is something that the rule allows the subject.
func grant(rule rbacv1.PolicyRule, namespace string, subject rbacv1.Subject) authorizer.Attributes {
	who := &user.DefaultInfo{Name: subject.Name}
	switch subject.Kind {
	case rbacv1.GroupKind:
		who = &user.DefaultInfo{Name: "any", Groups: []string{subject.Name}}
	case rbacv1.ServiceAccountKind:
		who.Name = serviceaccount.MakeUsername(subject.Namespace, subject.Name)
	}
	if len(rule.NonResourceURLs) > 0 {
		return authorizer.AttributesRecord{User: who, Verb: rule.Verbs[0], Path: rule.NonResourceURLs[0]}
	}
	resource, subresource, _ := strings.Cut(rule.Resources[0], "/")
	attributes := authorizer.AttributesRecord{
		User: who, Verb: rule.Verbs[0], Namespace: namespace, APIGroup: rule.APIGroups[0], APIVersion: "v1",
		Resource: resource, Subresource: subresource, ResourceRequest: true,
	}
	if len(rule.ResourceNames) > 0 {
		attributes.Name = rule.ResourceNames[0]
	}
	return attributes
}
