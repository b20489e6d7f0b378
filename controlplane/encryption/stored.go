// SPDX-License-Identifier: Apache-2.0

package encryption

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Stored is how a value is encrypted in the store.
type Stored struct {
	// Provider is upstream's name of it: secretbox, aescbc, aesgcm, kms; empty for none.
	Provider string `json:"provider,omitempty"`
	// Key is the name of the key, or of the KMS plugin.
	Key string `json:"key,omitempty"`
}

// Plain is a value that is not encrypted.
var Plain Stored

func (s Stored) String() string {
	if s == Plain {
		return "not encrypted"
	}
	return s.Provider + " " + s.Key
}

// storedAs reads what upstream puts before a value: k8s:enc:PROVIDER:VERSION:KEY: and then the ciphertext.
func storedAs(value []byte) Stored {
	rest, ok := bytes.CutPrefix(value, []byte("k8s:enc:"))
	if !ok {
		return Plain
	}
	parts := bytes.SplitN(rest, []byte{':'}, 4)
	if len(parts) < 4 {
		return Plain
	}
	return Stored{Provider: string(parts[0]), Key: string(parts[2])}
}

// secretsPrefix is where the store has Secrets.
const secretsPrefix = "/registry/secrets/"

// countPage is how many values are in memory at once.
const countPage = 200

// count reads how many Secrets are stored in which way, past the API server: it says what is in the store.
func count(ctx context.Context, kv clientv3.KV) (map[Stored]int, error) {
	counts := map[Stored]int{}
	end := clientv3.GetPrefixRangeEnd(secretsPrefix)
	for from := secretsPrefix; ; {
		page, err := kv.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(countPage))
		if err != nil {
			return nil, fmt.Errorf("read Secrets of the store: %w", err)
		}
		for _, item := range page.Kvs {
			counts[storedAs(item.Value)]++
		}
		if !page.More {
			return counts, nil
		}
		from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
	}
}

// inOrder are the ways in which counts has Secrets.
func inOrder(counts map[Stored]int) []Stored {
	return slices.SortedFunc(maps.Keys(counts), func(a, b Stored) int { return strings.Compare(a.String(), b.String()) })
}
