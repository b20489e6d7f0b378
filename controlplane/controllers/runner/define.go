// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
)

// Define creates or updates a CustomResourceDefinition, given as YAML, with the rights of client, and returns once its
// resource is served: an informer that asks too early pauses for a second.
func Define(ctx context.Context, client kubernetes.Interface, name string, yaml []byte, resource dynamic.ResourceInterface, log *slog.Logger) error {
	path := "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/" + name
	rest := client.Discovery().RESTClient()
	for delay := 10 * time.Millisecond; ; delay = min(2*delay, 5*time.Second) {
		err := rest.Patch(types.ApplyYAMLPatchType).AbsPath(path).Param("fieldManager", "skep").Param("force", "true").
			SetHeader("Accept", "application/json").Body(yaml).Do(ctx).Error()
		if err == nil {
			if _, err = resource.List(ctx, metav1.ListOptions{Limit: 1}); err == nil {
				return nil
			}
		}
		if apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) {
			return fmt.Errorf("definition of %s: %w", name, err)
		}
		log.Debug("a definition is not in force yet", "name", name, "err", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(delay):
		}
	}
}
