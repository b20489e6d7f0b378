// SPDX-License-Identifier: Apache-2.0

package runtime

import (
	"context"
	"errors"
	"fmt"
	"time"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
)

const (
	parallelLayers   = 3
	progressInterval = time.Second
)

// Pull fetches and unpacks an image. Credentials are tried in turn; with none, the pull is anonymous. What does not fit
// would not with others either.
func (s ImageStore) Pull(ctx context.Context, ref string, auths []Auth) (Image, error) {
	name, err := Normalize(ref)
	if err != nil {
		return Image{}, fmt.Errorf("%w: %w", ErrPull, err)
	}
	if len(auths) == 0 {
		auths = []Auth{{}}
	}
	var errs []error
	for _, auth := range auths {
		img, err := s.pull(s.r.in(ctx), name, auth)
		if err == nil {
			return img, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil || errors.Is(err, errNoRoom) {
			break
		}
	}
	return Image{}, fmt.Errorf("%w: %s: %w", ErrPull, ref, errors.Join(errs...))
}

func (s ImageStore) pull(ctx context.Context, name string, auth Auth) (Image, error) {
	r := s.r
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return Image{}, err
	}
	stop := r.reportProgress(ctx, name)
	defer stop()
	ctx, release := withinRoom(ctx, r.cfg.DataDir)
	defer release()
	i, err := r.client.Pull(ctx, name,
		client.WithResolver(resolver(ctx, r.cfg.RegistryConfigDir, named, auth)),
		client.WithPlatformMatcher(platforms.Default()),
		client.WithPullUnpack,
		client.WithPullSnapshotter(r.snapshotter),
		client.WithMaxConcurrentDownloads(parallelLayers),
	)
	if err != nil {
		return Image{}, noRoom(ctx, r.cfg.DataDir, err)
	}
	info, err := r.addImage(ctx, i.Metadata())
	if err != nil {
		return Image{}, err
	}
	return info.public(), nil
}

// reportProgress tells cfg.PullProgress what is being written while a pull runs. The store has no events for that.
func (r *Runtime) reportProgress(ctx context.Context, name string) (stop func()) {
	if r.cfg.PullProgress == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(progressInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			statuses, err := r.client.ContentStore().ListStatuses(ctx)
			if err != nil {
				continue
			}
			var all content.Status
			for _, st := range statuses {
				all.Offset += st.Offset
				all.Total += st.Total
			}
			r.cfg.PullProgress(name, all.Offset, all.Total)
		}
	}()
	return func() { cancel(); <-done }
}
