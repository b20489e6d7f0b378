// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"slices"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"skep.io/skep/api"
)

// ingressSecrets lets those who serve ingress, every node and this server's own proxy, read the
// Secrets that Ingresses take certificates from: each by its name, and no other. It is for Ingresses
// what the Node authorizer is for pods; a role could only name all Secrets.
type ingressSecrets struct {
	client    kubernetes.Interface
	ingresses cache.Indexer
}

const byCertificate = "certificate"

// newIngressSecrets follows Ingresses by shared, which has to be started later.
func newIngressSecrets(client kubernetes.Interface, shared informers.SharedInformerFactory) (ingressSecrets, error) {
	informer := shared.Networking().V1().Ingresses().Informer()
	err := informer.AddIndexers(cache.Indexers{byCertificate: func(obj any) ([]string, error) {
		ing, ok := obj.(*networkingv1.Ingress)
		if !ok {
			return nil, nil
		}
		return certificatesOf(ing), nil
	}})
	return ingressSecrets{client: client, ingresses: informer.GetIndexer()}, err
}

// certificatesOf lists the Secrets that the Ingress names, as NAMESPACE/NAME.
func certificatesOf(ing *networkingv1.Ingress) (keys []string) {
	for _, t := range ing.Spec.TLS {
		if t.SecretName != "" {
			keys = append(keys, ing.Namespace+"/"+t.SecretName)
		}
	}
	return keys
}

// Authorize allows, or has no opinion.
func (a ingressSecrets) Authorize(ctx context.Context, attr authorizer.Attributes) (authorizer.Decision, string, error) {
	const reason = "an Ingress takes a certificate from this Secret"
	if !isSecretRead(attr) || !servesIngress(attr.GetUser()) {
		return authorizer.DecisionNoOpinion, "", nil
	}
	key := attr.GetNamespace() + "/" + attr.GetName()
	if known, err := a.ingresses.IndexKeys(byCertificate, key); err == nil && len(known) > 0 {
		return authorizer.DecisionAllow, reason, nil
	}
	// The one who asks may have seen the Ingress before this server's cache has.
	list, err := a.client.NetworkingV1().Ingresses(attr.GetNamespace()).List(ctx, metav1.ListOptions{})
	if err != nil {
		return authorizer.DecisionNoOpinion, "", err
	}
	for i := range list.Items {
		if slices.Contains(certificatesOf(&list.Items[i]), key) {
			return authorizer.DecisionAllow, reason, nil
		}
	}
	return authorizer.DecisionNoOpinion, "no Ingress takes a certificate from this Secret", nil
}

// isSecretRead is a read of one Secret, or of a list that a field selector narrows to one.
func isSecretRead(attr authorizer.Attributes) bool {
	return attr.IsResourceRequest() && attr.GetAPIGroup() == "" && attr.GetResource() == "secrets" && attr.GetSubresource() == "" &&
		attr.GetNamespace() != "" && attr.GetName() != "" && slices.Contains(readers, attr.GetVerb())
}

func servesIngress(u user.Info) bool {
	return u != nil && (u.GetName() == api.IngressUser || slices.Contains(u.GetGroups(), user.NodesGroup))
}
