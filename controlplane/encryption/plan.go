// SPDX-License-Identifier: Apache-2.0

package encryption

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"slices"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
)

// keySize is what XSalsa20-Poly1305 (secretbox) takes, in bytes.
const keySize = 32

// Ring is what the file of keys says.
type Ring struct {
	// On says that Secrets are written with the first key. If not they are written plain, and the keys still read.
	On bool
	// Keys may read; the first writes.
	Keys []apiserverv1.Key
}

// Switch is r on or off. One that is on has a key.
func (r Ring) Switch(on bool) (Ring, error) {
	r.On = on
	if on && len(r.Keys) == 0 {
		return r.WithNewKey()
	}
	return r, nil
}

// WithNewKey is r with another key, which reads only until Promote.
func (r Ring) WithNewKey() (Ring, error) {
	secret := make([]byte, keySize)
	if _, err := rand.Read(secret); err != nil {
		return r, fmt.Errorf("make a key: %w", err)
	}
	key := apiserverv1.Key{Name: nextName(r.Keys), Secret: base64.StdEncoding.EncodeToString(secret)}
	r.Keys = append(slices.Clip(r.Keys), key)
	return r, nil
}

// Promote is r with its newest key as the one that writes.
func (r Ring) Promote() Ring {
	at := newest(r.Keys)
	if at <= 0 {
		return r
	}
	first := r.Keys[at]
	r.Keys = slices.Insert(slices.Delete(slices.Clone(r.Keys), at, at+1), 0, first)
	return r
}

// Spare says whether there is a key that is newer than the one that writes.
func (r Ring) Spare() bool { return newest(r.Keys) > 0 }

// Retire is r without the keys that write no more. One that is to write stays.
func (r Ring) Retire() Ring {
	if !r.On || len(r.Keys) == 0 {
		r.Keys = nil
		return r
	}
	first := numberOf(r.Keys[0])
	r.Keys = slices.DeleteFunc(slices.Clone(r.Keys), func(k apiserverv1.Key) bool { return numberOf(k) < first })
	return r
}

// Active is how a Secret that is written now is stored.
func (r Ring) Active() Stored {
	if !r.On || len(r.Keys) == 0 {
		return Plain
	}
	return Stored{Provider: "secretbox", Key: r.Keys[0].Name}
}

// nextName is a name that no key has had: key-1, key-2 and so on.
func nextName(keys []apiserverv1.Key) string {
	last := 0
	if at := newest(keys); at >= 0 {
		last = numberOf(keys[at])
	}
	return "key-" + strconv.Itoa(last+1)
}

// newest is where the key with the highest number is, or -1.
func newest(keys []apiserverv1.Key) int {
	at := -1
	for i := range keys {
		if at < 0 || numberOf(keys[i]) > numberOf(keys[at]) {
			at = i
		}
	}
	return at
}

func numberOf(k apiserverv1.Key) int {
	n, err := strconv.Atoi(strings.TrimPrefix(k.Name, "key-"))
	if err != nil {
		return 0
	}
	return n
}

// configuration is r in upstream's form. Plain objects are always readable: those from before encryption are.
func (r Ring) configuration() apiserverv1.EncryptionConfiguration {
	providers := []apiserverv1.ProviderConfiguration{{Identity: &apiserverv1.IdentityConfiguration{}}}
	if len(r.Keys) > 0 {
		box := apiserverv1.ProviderConfiguration{Secretbox: &apiserverv1.SecretboxConfiguration{Keys: r.Keys}}
		providers = append(providers, box)
		if r.On {
			slices.Reverse(providers)
		}
	}
	return apiserverv1.EncryptionConfiguration{
		TypeMeta:  metav1.TypeMeta{APIVersion: apiserverv1.SchemeGroupVersion.String(), Kind: "EncryptionConfiguration"},
		Resources: []apiserverv1.ResourceConfiguration{{Resources: []string{"secrets"}, Providers: providers}},
	}
}

// ringOf undoes configuration.
func ringOf(c apiserverv1.EncryptionConfiguration) (Ring, error) {
	var r Ring
	if len(c.Resources) != 1 || !slices.Equal(c.Resources[0].Resources, []string{"secrets"}) {
		return r, fmt.Errorf("it is about other things than Secrets: leave it to skep, or move it and name it with --encryption-provider-config")
	}
	for i, p := range c.Resources[0].Providers {
		switch {
		case p.Secretbox != nil:
			r.On = i == 0
			r.Keys = p.Secretbox.Keys
		case p.Identity == nil:
			return r, fmt.Errorf("it has a provider that skep does not put there: move it and name it with --encryption-provider-config")
		}
	}
	return r, nil
}
