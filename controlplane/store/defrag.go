// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"log/slog"
	"time"
)

const (
	// defragEvery is how often the database is looked at. Looking costs one struct copy.
	defragEvery = 10 * time.Minute
	// defragMinWaste is what must be gained: below it, the pause of writers is not worth it.
	defragMinWaste = 64 << 20
)

// usage is the size of the database file and how much of it holds data, in bytes.
type usage struct{ size, inUse int64 }

// worthDefragmenting says whether to rewrite the database. A rewrite copies inUse bytes while
// writers wait (about 10 ms a megabyte on a slow disk), so it must at least halve the file and
// give back at least defragMinWaste.
func worthDefragmenting(u usage) bool {
	waste := u.size - u.inUse
	return waste >= defragMinWaste && waste >= u.inUse
}

func (s *Store) defragLoop(ctx context.Context, log *slog.Logger) {
	tick := time.NewTicker(defragEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := s.defragIfWorth(ctx, log, worthDefragmenting); err != nil && ctx.Err() == nil {
			log.Warn("defragment etcd", "error", err)
		}
	}
}

func (s *Store) defragIfWorth(ctx context.Context, log *slog.Logger, worth func(usage) bool) error {
	before, err := s.usage(ctx)
	if err != nil || !worth(before) {
		return err
	}
	start := time.Now()
	// The in-process client's own call would tell a health service that only listeners have.
	if err := s.etcd.Server.Backend().Defrag(); err != nil {
		return err
	}
	after, err := s.usage(ctx)
	if err != nil {
		return err
	}
	log.Info("defragmented etcd", "before", before.size, "after", after.size, "took", time.Since(start))
	return nil
}

func (s *Store) usage(ctx context.Context) (usage, error) {
	st, err := s.client.Status(ctx, Endpoint)
	if err != nil {
		return usage{}, err
	}
	return usage{size: st.DbSize, inUse: st.DbSizeInUse}, nil
}
