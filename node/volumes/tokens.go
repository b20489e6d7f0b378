// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	volumeutil "k8s.io/kubernetes/pkg/volume/util"
)

// tokenKey names a token: one for each use in a pod.
type tokenKey struct {
	pod          types.UID
	volume, path string
}

type token struct {
	value string
	renew time.Time // at 80 % of its life
}

// token gets a service account token bound to the pod, or the one that it has if there is life enough in it.
func (v *Volumes) token(ctx context.Context, pod *corev1.Pod, volume string, s *corev1.ServiceAccountTokenProjection, mode *int32) (payload, time.Time, error) {
	key := tokenKey{pod.UID, volume, s.Path}
	v.mu.Lock()
	t := v.tokens[key]
	v.mu.Unlock()
	if t == nil || !time.Now().Before(t.renew) {
		fresh, err := v.request(ctx, pod, s)
		if err != nil {
			if t == nil {
				return nil, time.Time{}, err
			}
			// The old one has a fifth of its life left: try again well before that is over.
			v.cfg.Log.Warn("renew service account token", "pod", pod.Namespace+"/"+pod.Name, "volume", volume, "error", err)
			return v.tokenFile(pod, s, t, mode), time.Now().Add(10 * time.Second), nil
		}
		t = fresh
		v.mu.Lock()
		v.tokens[key] = t
		v.mu.Unlock()
	}
	return v.tokenFile(pod, s, t, mode), t.renew, nil
}

func (v *Volumes) tokenFile(pod *corev1.Pod, s *corev1.ServiceAccountTokenProjection, t *token, mode *int32) payload {
	f := volumeutil.FileProjection{Data: []byte(t.value), Mode: defaultMode(mode)}
	if user := soleUser(pod); user != nil || fsGroup(pod) != nil {
		f.Mode, f.FsUser = 0o600, user
	}
	return payload{s.Path: f}
}

// soleUser is the user that all containers of the pod run as; nil if they differ or do not say.
func soleUser(pod *corev1.Pod) *int64 {
	var general *int64
	if sc := pod.Spec.SecurityContext; sc != nil {
		general = sc.RunAsUser
	}
	var user *int64
	all := append(append([]corev1.Container{}, pod.Spec.InitContainers...), pod.Spec.Containers...)
	for i := range all {
		u := general
		if sc := all[i].SecurityContext; sc != nil && sc.RunAsUser != nil {
			u = sc.RunAsUser
		}
		if u == nil || user != nil && *user != *u {
			return nil
		}
		user = u
	}
	return user
}

func (v *Volumes) request(ctx context.Context, pod *corev1.Pod, s *corev1.ServiceAccountTokenProjection) (*token, error) {
	var audiences []string
	if s.Audience != "" {
		audiences = []string{s.Audience}
	}
	account := pod.Spec.ServiceAccountName
	if account == "" {
		account = "default"
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	asked := time.Now()
	ask := &authv1.TokenRequest{Spec: authv1.TokenRequestSpec{
		Audiences: audiences, ExpirationSeconds: s.ExpirationSeconds,
		BoundObjectRef: &authv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
	}}
	var r *authv1.TokenRequest
	err := soon(ctx, func() (err error) {
		r, err = v.cfg.Client.CoreV1().ServiceAccounts(pod.Namespace).CreateToken(ctx, account, ask, metav1.CreateOptions{})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("failed to fetch token: %w", err)
	}
	return &token{value: r.Status.Token, renew: renewal(asked, r.Status.ExpirationTimestamp.Time)}, nil
}

// renewal is when a token has lived 80 % of its life, or a day, with a little chance so that not all renew at once.
func renewal(asked, expires time.Time) time.Time {
	life := expires.Sub(asked)
	if life <= 0 {
		return asked.Add(time.Minute)
	}
	at := min(life*8/10, 24*time.Hour)
	return asked.Add(at - rand.N(at/50+1))
}

// forget drops the tokens of a pod.
func (v *Volumes) forget(pod types.UID) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for k := range v.tokens {
		if k.pod == pod {
			delete(v.tokens, k)
		}
	}
}
