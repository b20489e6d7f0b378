// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/pager"
)

// ErrNotEncrypted is returned where something is to be done about encryption and there is none.
var ErrNotEncrypted = errors.New("nothing is encrypted in the store: start the server with --secrets-encryption or --encryption-provider-config")

// atRest is how objects are encrypted on their way into the store. It can be read anew while the server runs.
type atRest struct {
	path string
	id   string          // of the server, for upstream's metrics
	ctx  context.Context // of connections to KMS plugins, which outlive any call
	mu   sync.Mutex
	now  *encryptionconfig.DynamicTransformers
	// resources are those that the file names; "*" stands for all resources, or all groups.
	resources map[schema.GroupResource]value.Transformer
}

// covers tells whether the file is about a resource.
func (e *atRest) covers(r schema.GroupResource) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, key := range []schema.GroupResource{r, {Group: r.Group, Resource: "*"}, {Group: "*", Resource: "*"}} {
		if _, ok := e.resources[key]; ok {
			return true
		}
	}
	return false
}

// newAtRest reads the file at path and applies it to what config's server stores.
func newAtRest(path string, config *genericapiserver.Config) (*atRest, error) {
	e := &atRest{path: path, id: config.APIServerID, ctx: wait.ContextForChannel(config.DrainedNotify())}
	loaded, stop, err := e.load()
	if err != nil {
		return nil, err
	}
	e.now = encryptionconfig.NewDynamicTransformers(loaded.Transformers, loaded.HealthChecks[0], stop, loaded.KMSCloseGracePeriod)
	e.resources = loaded.Transformers
	config.ResourceTransformers = e.now
	config.HealthzChecks = append(config.HealthzChecks, e.now)
	config.ReadyzChecks = append(config.ReadyzChecks, e.now)
	return e, nil
}

func (e *atRest) load() (*encryptionconfig.EncryptionConfiguration, context.CancelFunc, error) {
	ctx, stop := context.WithCancel(e.ctx)
	loaded, err := encryptionconfig.LoadEncryptionConfig(ctx, e.path, true, e.id)
	if err == nil && len(loaded.HealthChecks) != 1 {
		err = fmt.Errorf("it has %d checks of health instead of one", len(loaded.HealthChecks))
	}
	if err != nil {
		stop()
		return nil, nil, fmt.Errorf("encryption by %s: %w", e.path, err)
	}
	return loaded, stop, nil
}

// ReloadEncryption reads the file that Access.EncryptionConfig names again. From its return on objects are written as
// it says. An error leaves what was in force; it is ErrNotEncrypted if there is no such file.
func (s *Server) ReloadEncryption() error {
	e := s.encryption
	if e == nil {
		return ErrNotEncrypted
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	loaded, stop, err := e.load()
	if err != nil {
		return err
	}
	e.resources = loaded.Transformers
	e.now.Set(loaded.Transformers, stop, loaded.HealthChecks[0], loaded.KMSCloseGracePeriod)
	return nil
}

// rewritePage is how many objects are read at once to be written again.
const rewritePage = 200

// Rewrite writes every object of the resources that are encrypted again, so that all of them are stored as the
// encryption that is in force says. It returns how many objects there were. Webhooks see these writes.
func (s *Server) Rewrite(ctx context.Context) (int, error) {
	if s.encryption == nil {
		return 0, ErrNotEncrypted
	}
	client, err := dynamic.NewForConfig(s.loopback)
	if err != nil {
		return 0, err
	}
	discover, err := discovery.NewDiscoveryClientForConfig(s.loopback)
	if err != nil {
		return 0, err
	}
	lists, err := discover.ServerPreferredResources()
	if err != nil {
		return 0, fmt.Errorf("ask which resources there are: %w", err)
	}
	n := 0
	for _, list := range lists {
		gv, err := schema.ParseGroupVersion(list.GroupVersion)
		if err != nil {
			return n, err
		}
		for _, r := range list.APIResources {
			if !slices.Contains(r.Verbs, "update") || !slices.Contains(r.Verbs, "list") || !s.encryption.covers(schema.GroupResource{Group: gv.Group, Resource: r.Name}) {
				continue
			}
			if err := rewriteAll(ctx, client.Resource(gv.WithResource(r.Name)), &n); err != nil {
				return n, fmt.Errorf("write %s again: %w", r.Name, err)
			}
		}
	}
	return n, nil
}

func rewriteAll(ctx context.Context, client dynamic.NamespaceableResourceInterface, n *int) error {
	all := pager.New(pager.SimplePageFunc(func(opts metav1.ListOptions) (runtime.Object, error) {
		return client.List(ctx, opts)
	}))
	all.PageSize = rewritePage
	return all.EachListItem(ctx, metav1.ListOptions{}, func(item runtime.Object) error {
		object, ok := item.(*unstructured.Unstructured)
		if !ok {
			return fmt.Errorf("the list has a %T", item)
		}
		*n++
		_, err := client.Namespace(object.GetNamespace()).Update(ctx, object, metav1.UpdateOptions{})
		if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
			return nil // somebody else has written it meanwhile
		}
		if err != nil {
			return fmt.Errorf("%s/%s: %w", object.GetNamespace(), object.GetName(), err)
		}
		return nil
	})
}
