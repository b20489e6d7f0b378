// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	_ "unsafe" // for go:linkname

	clientv3 "go.etcd.io/etcd/client/v3"
	etcdkubernetes "go.etcd.io/etcd/client/v3/kubernetes"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/feature"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	_ "k8s.io/apiserver/pkg/storage/storagebackend/factory" // holds newETCD3Client

	"skep.io/skep/controlplane/store"
)

// newETCD3Client is the variable through which all of upstream's storage gets its etcd client:
// REST storage, custom resources, service allocators, health checks and the compactor. It is not
// exported, and there is no other single place; replacing it saves a socket, and with it a third
// of the time of a write. A test of this package fails if upstream renames it.
//
//go:linkname newETCD3Client k8s.io/apiserver/pkg/storage/storagebackend/factory.newETCD3Client
var newETCD3Client func(storagebackend.TransportConfig) (*etcdkubernetes.Client, error)

// inProcessStores maps the name that a server puts into its ServerList to the store behind it, so
// that several servers in one process (tests) keep apart.
var (
	inProcessStores sync.Map // string -> *store.Store
	inProcessCount  atomic.Int64
)

// registerStore gives s a name for storagebackend.TransportConfig.ServerList.
func registerStore(s *store.Store) string {
	name := store.Endpoint + "-" + strconv.FormatInt(inProcessCount.Add(1), 10)
	inProcessStores.Store(name, s)
	return name
}

func unregisterStore(name string) { inProcessStores.Delete(name) }

func useInProcessEtcd() {
	dial := newETCD3Client
	newETCD3Client = func(c storagebackend.TransportConfig) (*etcdkubernetes.Client, error) {
		if len(c.ServerList) != 1 {
			return dial(c)
		}
		s, ok := inProcessStores.Load(c.ServerList[0])
		if !ok {
			return nil, fmt.Errorf("etcd %s is closed", c.ServerList[0])
		}
		return shell(s.(*store.Store).Client()), nil
	}
}

// shell is a client of its own that shares c's connections. Upstream makes one for each resource,
// wraps its KV, and closes it.
func shell(c *clientv3.Client) *etcdkubernetes.Client {
	own := clientv3.NewCtxClient(context.Background())
	own.KV = c.KV
	own.Lease = unclosable{Lease: c.Lease}
	own.Watcher = unclosableWatcher{c.Watcher}
	own.Maintenance, own.Cluster, own.Auth = c.Maintenance, c.Cluster, c.Auth
	k := &etcdkubernetes.Client{Client: own}
	k.Kubernetes = k
	return k
}

type unclosable struct{ clientv3.Lease }

func (unclosable) Close() error { return nil }

type unclosableWatcher struct{ clientv3.Watcher }

func (unclosableWatcher) Close() error { return nil }

// announceProgress tells upstream that watches report progress. It asks each endpoint of a client
// for etcd's version, and an in-process client has none; without the answer, consistent reads from
// watch caches fail with "Too large resource version".
func announceProgress(ctx context.Context, name string, c *clientv3.Client) {
	feature.DefaultFeatureSupportChecker.CheckClient(ctx, standIn{c, name}, storage.RequestWatchProgress)
}

type standIn struct {
	*clientv3.Client
	name string
}

func (s standIn) Endpoints() []string { return []string{s.name} }
