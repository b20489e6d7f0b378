// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"fmt"
	"log/slog"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/kubernetes"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	aggregatorclient "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset"
	"k8s.io/metrics/pkg/apis/metrics/v1beta1"

	"skep.io/skep/controlplane/apiserver/metricsapi"
)

// metricsReader lets those who may view a namespace see what its pods use, as metrics-server's manifest does.
var metricsReader = rbacv1.ClusterRole{
	ObjectMeta: metav1.ObjectMeta{Name: "system:aggregated-metrics-reader", Labels: map[string]string{
		"rbac.authorization.k8s.io/aggregate-to-admin": "true",
		"rbac.authorization.k8s.io/aggregate-to-edit":  "true",
		"rbac.authorization.k8s.io/aggregate-to-view":  "true",
	}},
	Rules: []rbacv1.PolicyRule{{Verbs: []string{"get", "list", "watch"}, APIGroups: []string{v1beta1.GroupName}, Resources: []string{"pods", "nodes"}}},
}

// metricsHook names the hook that makes the APIService of metrics.k8s.io.
const metricsHook = "skep/metrics-apiservice"

// installMetrics serves metrics.k8s.io beside the built-in groups. The aggregator learns of it by an APIService that is
// made if there is none: a cluster in which somebody has put another one, metrics-server's, uses that.
func installMetrics(builtin, aggregator *genericapiserver.GenericAPIServer, log *slog.Logger) error {
	client, err := kubernetes.NewForConfig(builtin.LoopbackClientConfig)
	if err != nil {
		return fmt.Errorf("in-process client: %w", err)
	}
	if err := metricsapi.Install(builtin, client, log); err != nil {
		return fmt.Errorf("metrics.k8s.io: %w", err)
	}
	services, err := aggregatorclient.NewForConfig(aggregator.LoopbackClientConfig)
	if err != nil {
		return fmt.Errorf("in-process client: %w", err)
	}
	return aggregator.AddPostStartHook(metricsHook, func(c genericapiserver.PostStartHookContext) error {
		return retryBootstrap(c, "the APIService of metrics.k8s.io", func(ctx context.Context, _ kubernetes.Interface) error {
			_, err := services.ApiregistrationV1().APIServices().Create(ctx, metricsService(), metav1.CreateOptions{})
			if apierrors.IsAlreadyExists(err) {
				return nil
			}
			return err
		})
	})
}

// metricsService has no service: this server answers itself. Its priorities are metrics-server's.
func metricsService() *apiregistrationv1.APIService {
	gv := v1beta1.SchemeGroupVersion
	return &apiregistrationv1.APIService{
		ObjectMeta: metav1.ObjectMeta{Name: gv.Version + "." + gv.Group},
		Spec:       apiregistrationv1.APIServiceSpec{Group: gv.Group, Version: gv.Version, GroupPriorityMinimum: 100, VersionPriority: 100},
	}
}
