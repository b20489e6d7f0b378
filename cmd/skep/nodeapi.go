// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"skep.io/skep/api"
	"skep.io/skep/dataplane/inspect"
	"skep.io/skep/node"
	nodeapi "skep.io/skep/node/api"
	"skep.io/skep/node/pods"
)

// serveNodeAPI answers the API server's requests about this node's pods (logs, exec, port-forward)
// until ctx ends.
func (a *agent) serveNodeAPI(ctx context.Context, n *node.Agent) error {
	server, err := nodeapi.New(nodeapi.Config{
		NodeName: a.nodeName, Sessions: n.Runtime(), Containers: n.Runtime(), Pods: podSource{n.Pods()},
		Certificate: a.access.serving, ClientCA: a.access.clientCA,
		Authenticate: reviewToken(a.access.node), Authorize: reviewAccess(a.access.node, a.nodeName),
		LocalVolumes: n.LocalPaths(), Network: inspect.Handler(a.dataplane), DataDir: a.dataDir, Disk: n.PodDisk, VolumeUsage: n.VolumeUsage, Gatherer: a.gatherer, Metrics: a.metrics, Log: a.log.With("part", "node"),
	})
	if err != nil {
		return err
	}
	var listen net.ListenConfig
	l, err := listen.Listen(ctx, "tcp", net.JoinHostPort("", strconv.Itoa(api.DefaultNodeAPIPort)))
	if err != nil {
		return fmt.Errorf("node API: %w; stop what uses the port (a kubelet?)", err)
	}
	return server.Run(ctx, l)
}

// podSource lets the node API find the pods that the agent runs.
type podSource struct{ set *pods.Set }

func (s podSource) Pod(namespace, name string) (*corev1.Pod, bool) {
	return s.set.Pod(namespace, name, "")
}

func (s podSource) Pods() []*corev1.Pod { return s.set.Pods() }

// reviewToken asks the API server whose a bearer token is.
func reviewToken(client kubernetes.Interface) func(context.Context, string) (string, []string, error) {
	return func(ctx context.Context, token string) (string, []string, error) {
		review, err := client.AuthenticationV1().TokenReviews().Create(ctx,
			&authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}, metav1.CreateOptions{})
		if err != nil {
			return "", nil, fmt.Errorf("token review: %w", err)
		}
		if !review.Status.Authenticated {
			return "", nil, errors.New("the token is not valid")
		}
		return review.Status.User.Username, review.Status.User.Groups, nil
	}
}

// reviewAccess asks the API server whether a user may use a part of the node's API.
func reviewAccess(client kubernetes.Interface, nodeName string) func(context.Context, string, []string, string, string) (bool, error) {
	return func(ctx context.Context, user string, groups []string, verb, subresource string) (bool, error) {
		review, err := client.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authorizationv1.SubjectAccessReview{
			Spec: authorizationv1.SubjectAccessReviewSpec{
				User: user, Groups: groups,
				ResourceAttributes: &authorizationv1.ResourceAttributes{
					Verb: verb, Version: "v1", Resource: "nodes", Subresource: subresource, Name: nodeName,
				},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			return false, fmt.Errorf("access review: %w", err)
		}
		return review.Status.Allowed, nil
	}
}
