// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/credentialprovider"
	"k8s.io/kubernetes/pkg/credentialprovider/secrets"

	"skep.io/skep/node/runtime"
)

// Errors of an image, by the reason that status shows.
var (
	errNeverPull   = errors.New("ErrImageNeverPull")
	errInvalidName = errors.New("InvalidImageName")
	errPull        = errors.New("ErrImagePull")
)

// pulls sees to it that images are here. One pull an image at a time: whoever else wants the image with the same
// credentials waits for it.
type pulls struct {
	ctx    context.Context // pulls outlive the pod that asked first
	images runtime.Images
	// imported is closed once the archives on this host are imported: what is missing until then may be among them.
	imported   chan struct{}
	importOnce sync.Once

	mu      sync.Mutex
	current map[string]*pull
}

type pull struct {
	done  chan struct{}
	image runtime.Image
	err   error
}

func newPulls(ctx context.Context, images runtime.Images) *pulls {
	return &pulls{ctx: ctx, images: images, imported: make(chan struct{}), current: map[string]*pull{}}
}

// normalize gives an image name its registry and tag.
func normalize(image string) (string, error) {
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return "", fmt.Errorf("%w: Failed to apply default image tag %q: %w", errInvalidName, image, err)
	}
	return reference.TagNameOnly(named).String(), nil
}

// present looks for the image on this node, under its normalized name and under the very name that was asked for.
func (p *pulls) present(ctx context.Context, image, ref string) (runtime.Image, error) {
	img, err := p.images.Get(ctx, ref)
	if err != nil && image != ref {
		if i, e := p.images.Get(ctx, image); e == nil {
			return i, nil
		}
	}
	return img, err
}

// ensure has the image here. pulling is called if a pull begins; pulled says whether one was needed.
func (p *pulls) ensure(ctx context.Context, image string, policy corev1.PullPolicy, auths func() ([]runtime.Auth, error), pulling func()) (img runtime.Image, pulled bool, err error) {
	ref, err := normalize(image)
	if err != nil {
		return runtime.Image{}, false, err
	}
	if policy != corev1.PullAlways {
		img, err := p.present(ctx, image, ref)
		if errors.Is(err, runtime.ErrImageNotFound) {
			select {
			case <-p.imported:
			case <-ctx.Done():
				return runtime.Image{}, false, context.Cause(ctx)
			}
			img, err = p.present(ctx, image, ref)
		}
		if err == nil {
			return img, false, nil
		} else if !errors.Is(err, runtime.ErrImageNotFound) {
			return runtime.Image{}, false, fmt.Errorf("ImageInspectError: Failed to inspect image %q: %w", image, err)
		}
		if policy == corev1.PullNever {
			return runtime.Image{}, false, fmt.Errorf("%w: Container image %q is not present with pull policy of Never", errNeverPull, image)
		}
	}
	creds, err := auths()
	if err != nil {
		return runtime.Image{}, false, fmt.Errorf("%w: credentials for %q: %w", errPull, image, err)
	}
	pulling()
	img, err = p.pull(ctx, ref, creds)
	if err != nil {
		return runtime.Image{}, true, fmt.Errorf("%w: %w", errPull, err)
	}
	return img, true, nil
}

func (p *pulls) pull(ctx context.Context, ref string, auths []runtime.Auth) (runtime.Image, error) {
	key, err := json.Marshal([]any{ref, auths})
	if err != nil {
		return runtime.Image{}, err
	}
	p.mu.Lock()
	cur := p.current[string(key)]
	if cur == nil {
		cur = &pull{done: make(chan struct{})}
		p.current[string(key)] = cur
		go func() {
			cur.image, cur.err = p.images.Pull(p.ctx, ref, auths)
			p.mu.Lock()
			delete(p.current, string(key))
			p.mu.Unlock()
			close(cur.done)
		}()
	}
	p.mu.Unlock()
	select {
	case <-cur.done:
		return cur.image, cur.err
	case <-ctx.Done():
		return runtime.Image{}, context.Cause(ctx)
	}
}

// credentials finds what the pod's pull secrets say about an image. Secrets that do not exist are passed over, as
// kubelet does: the image may be public.
func credentials(ctx context.Context, pod *corev1.Pod, image string, secret func(ctx context.Context, namespace, name string) (*corev1.Secret, error)) ([]runtime.Auth, error) {
	var list []corev1.Secret
	for _, r := range pod.Spec.ImagePullSecrets {
		if r.Name == "" {
			continue
		}
		if s, err := secret(ctx, pod.Namespace, r.Name); err == nil {
			list = append(list, *s)
		}
	}
	ring, err := secrets.MakeDockerKeyring(list, &credentialprovider.BasicDockerKeyring{})
	if err != nil {
		return nil, fmt.Errorf("pull secrets of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	ref, err := normalize(image)
	if err != nil {
		return nil, err
	}
	found, _ := ring.Lookup(strings.SplitN(ref, "@", 2)[0])
	var out []runtime.Auth
	for _, a := range found {
		out = append(out, runtime.Auth{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken})
	}
	return out, nil
}

// imageFailure turns what ensure said into what status shows. Only what a registry may yet answer is backed off.
func imageFailure(err error, retryAt time.Time) *Failure {
	reason := "ErrImagePull"
	for _, known := range []error{errNeverPull, errInvalidName} {
		if errors.Is(err, known) {
			reason = known.Error()
		}
	}
	message := err.Error()
	if r, rest, ok := strings.Cut(message, ": "); ok && !strings.Contains(r, " ") {
		message = rest
		if reason == "ErrImagePull" && r != "ErrImagePull" {
			reason = r
		}
	}
	return &Failure{Reason: reason, Message: message, RetryAt: retryAt}
}
