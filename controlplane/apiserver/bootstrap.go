// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/kubernetes"
	"k8s.io/component-helpers/auth/rbac/reconciliation"
	schedulingv1 "k8s.io/kubernetes/pkg/apis/scheduling/v1"
	rbacrest "k8s.io/kubernetes/pkg/registry/rbac/rest"
	schedulingrest "k8s.io/kubernetes/pkg/registry/scheduling/rest"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"
)

// Upstream creates the RBAC bootstrap policy and the system priority classes in hooks that wait
// one second before they look whether there is anything to do, and then write one object after
// the other. These two do the same work at once and, for RBAC, several objects at a time.
const (
	rbacHook          = "skep/rbac-bootstrap-policy"
	priorityClassHook = "skep/system-priority-classes"
	// bootstrapParallel keeps a handful of writes in one etcd commit without crowding out others.
	bootstrapParallel = 8
)

// replacedHooks are the upstream hooks that bootstrapHooks stand in for.
var replacedHooks = []string{rbacrest.PostStartHookName, schedulingrest.PostStartHookName}

// bootstrapHooks are added to the server. A hook that fails ends the server.
var bootstrapHooks = map[string]genericapiserver.PostStartHookFunc{
	rbacHook: func(c genericapiserver.PostStartHookContext) error {
		return retryBootstrap(c, "RBAC bootstrap policy", ensureRBAC)
	},
	priorityClassHook: func(c genericapiserver.PostStartHookContext) error {
		return retryBootstrap(c, "system priority classes", ensurePriorityClasses)
	},
}

func retryBootstrap(c genericapiserver.PostStartHookContext, what string, ensure func(context.Context, kubernetes.Interface) error) error {
	client, err := kubernetes.NewForConfig(c.LoopbackClientConfig)
	if err != nil {
		return err
	}
	backoff := 20 * time.Millisecond
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := ensure(c, client)
		if err == nil || c.Err() != nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("create %s: %w", what, err)
		}
		select {
		case <-c.Done():
			return nil
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, time.Second)
	}
}

// ensureRBAC creates what is missing of the default roles and bindings and adds what is missing in
// them. Objects annotated rbac.authorization.kubernetes.io/autoupdate=false are left alone. Two
// lists answer for some 160 reads, so a cluster that has everything costs next to nothing.
// Upstream's migrations of roles from before version 1.14 are left out: no skep is that old.
func ensureRBAC(ctx context.Context, client kubernetes.Interface) error {
	rbac, namespaces := client.RbacV1(), client.CoreV1().Namespaces()
	clusterRoles, err := listClusterRoles(ctx, client)
	if err != nil {
		return err
	}
	clusterRoleBindings, err := listClusterRoleBindings(ctx, client)
	if err != nil {
		return err
	}
	var g errgroup.Group
	g.SetLimit(bootstrapParallel)
	role := func(o reconciliation.ReconcileRoleOptions) {
		o.Confirm = true
		g.Go(func() error {
			_, err := o.Run()
			return err
		})
	}
	binding := func(o reconciliation.ReconcileRoleBindingOptions) {
		o.Confirm = true
		g.Go(func() error {
			_, err := o.Run()
			return err
		})
	}

	for _, r := range slices.Concat(bootstrappolicy.ClusterRoles(), bootstrappolicy.ControllerRoles(), ownClusterRoles) {
		role(reconciliation.ReconcileRoleOptions{Role: reconciliation.ClusterRoleRuleOwner{ClusterRole: &r}, Client: clusterRoles})
	}
	for _, b := range slices.Concat(bootstrappolicy.ClusterRoleBindings(), bootstrappolicy.ControllerRoleBindings(), ownClusterRoleBindings) {
		binding(reconciliation.ReconcileRoleBindingOptions{RoleBinding: reconciliation.ClusterRoleBindingAdapter{ClusterRoleBinding: &b}, Client: clusterRoleBindings})
	}
	for _, r := range append(slices.Concat(slices.Collect(maps.Values(bootstrappolicy.NamespaceRoles()))...), ownRoles...) {
		role(reconciliation.ReconcileRoleOptions{Role: reconciliation.RoleRuleOwner{Role: &r},
			Client: reconciliation.RoleModifier{Client: rbac, NamespaceClient: namespaces}})
	}
	for _, b := range append(slices.Concat(slices.Collect(maps.Values(bootstrappolicy.NamespaceRoleBindings()))...), ownRoleBindings...) {
		binding(reconciliation.ReconcileRoleBindingOptions{RoleBinding: reconciliation.RoleBindingAdapter{RoleBinding: &b},
			Client: reconciliation.RoleBindingClientAdapter{Client: rbac, NamespaceClient: namespaces}})
	}
	return g.Wait()
}

// listedClusterRoles answers reads from one list and writes through. Whoever wrote in between makes
// a write fail, and retryBootstrap lists again.
type listedClusterRoles struct {
	reconciliation.ClusterRoleModifier
	have map[string]*rbacv1.ClusterRole
}

func listClusterRoles(ctx context.Context, client kubernetes.Interface) (listedClusterRoles, error) {
	api := client.RbacV1().ClusterRoles()
	l := listedClusterRoles{reconciliation.ClusterRoleModifier{Client: api}, map[string]*rbacv1.ClusterRole{}}
	list, err := api.List(ctx, metav1.ListOptions{})
	if err != nil {
		return l, err
	}
	for i := range list.Items {
		l.have[list.Items[i].Name] = &list.Items[i]
	}
	return l, nil
}

func (l listedClusterRoles) Get(_, name string) (reconciliation.RuleOwner, error) {
	if r, ok := l.have[name]; ok {
		return reconciliation.ClusterRoleRuleOwner{ClusterRole: r}, nil
	}
	return nil, apierrors.NewNotFound(rbacv1.Resource("clusterroles"), name)
}

// listedClusterRoleBindings is listedClusterRoles for bindings.
type listedClusterRoleBindings struct {
	reconciliation.ClusterRoleBindingClientAdapter
	have map[string]*rbacv1.ClusterRoleBinding
}

func listClusterRoleBindings(ctx context.Context, client kubernetes.Interface) (listedClusterRoleBindings, error) {
	api := client.RbacV1().ClusterRoleBindings()
	l := listedClusterRoleBindings{reconciliation.ClusterRoleBindingClientAdapter{Client: api}, map[string]*rbacv1.ClusterRoleBinding{}}
	list, err := api.List(ctx, metav1.ListOptions{})
	if err != nil {
		return l, err
	}
	for i := range list.Items {
		l.have[list.Items[i].Name] = &list.Items[i]
	}
	return l, nil
}

func (l listedClusterRoleBindings) Get(_, name string) (reconciliation.RoleBinding, error) {
	if b, ok := l.have[name]; ok {
		return reconciliation.ClusterRoleBindingAdapter{ClusterRoleBinding: b}, nil
	}
	return nil, apierrors.NewNotFound(rbacv1.Resource("clusterrolebindings"), name)
}

// ensurePriorityClasses creates system-node-critical and system-cluster-critical.
func ensurePriorityClasses(ctx context.Context, client kubernetes.Interface) error {
	for _, pc := range schedulingv1.SystemPriorityClasses() {
		_, err := client.SchedulingV1().PriorityClasses().Get(ctx, pc.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			_, err = client.SchedulingV1().PriorityClasses().Create(ctx, pc, metav1.CreateOptions{})
		}
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("PriorityClass %s: %w", pc.Name, err)
		}
	}
	return nil
}
