// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	certificatesv1 "k8s.io/api/certificates/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"

	"skep.io/skep/api"
)

var (
	readers = []string{"get", "list", "watch"}
	watcher = []string{"list", "watch"}
)

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
	),
	metricsReader,
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
	// What machines need to become nodes. Upstream's role of the certificate controller may approve
	// clients' requests only.
	clusterRole("skep:serving-certificate-approver", rbacv1.PolicyRule{
		Verbs: []string{"approve"}, APIGroups: []string{"certificates.k8s.io"}, Resources: []string{"signers"}, ResourceNames: []string{certificatesv1.KubeletServingSignerName},
	}),
}

func ownClusterRoleBindings() []rbacv1.ClusterRoleBinding {
	return []rbacv1.ClusterRoleBinding{
		clusterBinding("skep:node-network", "skep:node-network", group(user.NodesGroup)),
		clusterBinding(api.InformersUser, api.InformersUser, person(api.InformersUser)),
		clusterBinding(api.IngressUser, api.IngressUser, person(api.IngressUser)),
		clusterBinding(api.BootstrapUser, api.BootstrapUser, person(api.BootstrapUser)),
		clusterBinding("skep:local-path-provisioner", "skep:local-path-provisioner",
			rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: metav1.NamespaceSystem, Name: "local-path-provisioner"}),
		clusterBinding("skep:serving-certificate-approver", "skep:serving-certificate-approver",
			rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: metav1.NamespaceSystem, Name: "certificate-controller"}),
		clusterBinding("skep:node-bootstrapper", "system:node-bootstrapper", group(api.BootstrapGroup)),
	}
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
