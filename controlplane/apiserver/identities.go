// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"crypto/rand"
	"slices"
	"sync"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/rest"

	"skep.io/skep/controlplane/apiserver/inprocess"
)

// identities are the users that parts of this process act as. Each gets a bearer token that lives
// in memory only and dies with the server.
type identities struct {
	mu     sync.RWMutex
	byName map[string]string // user and groups -> token
	tokens map[string]*user.DefaultInfo
}

func newIdentities() *identities {
	return &identities{byName: map[string]string{}, tokens: map[string]*user.DefaultInfo{}}
}

// token returns the token of name in groups, the same for the same arguments.
func (i *identities) token(name string, groups []string) string {
	groups = slices.Concat(groups, []string{user.AllAuthenticated})
	slices.Sort(groups)
	groups = slices.Compact(groups)
	key := name
	for _, g := range groups {
		key += "\x00" + g
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if token, ok := i.byName[key]; ok {
		return token
	}
	token := rand.Text()
	i.byName[key] = token
	i.tokens[token] = &user.DefaultInfo{Name: name, UID: string(uuid.NewUUID()), Groups: groups}
	return token
}

// AuthenticateToken implements authenticator.Token.
func (i *identities) AuthenticateToken(_ context.Context, token string) (*authenticator.Response, bool, error) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	u, ok := i.tokens[token]
	if !ok {
		return nil, false, nil
	}
	return &authenticator.Response{User: u}, true, nil
}

// inProcessConfig is a client configuration whose requests never leave the process. Discovery and
// CustomResources answer JSON whatever is asked for, so both types are accepted.
func inProcessConfig(transport *inprocess.Transport, host, token string) *rest.Config {
	return &rest.Config{
		Host:        host,
		Transport:   transport,
		BearerToken: token,
		ContentConfig: rest.ContentConfig{
			ContentType:        runtime.ContentTypeProtobuf,
			AcceptContentTypes: runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON,
		},
		DisableCompression: true,
		QPS:                -1, // priority and fairness in the server decides, not the client
	}
}
