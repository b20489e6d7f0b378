// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"encoding/json"
	"errors"
	"expvar"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
)

// Endpoint is the name by which callers that insist on an endpoint may call the store. Nothing
// listens there.
const Endpoint = "in-process"

// Config says where the store keeps its data.
type Config struct {
	// DataDir holds lock and etcd/. It is made with mode 0700.
	DataDir string
	// LockWait is how long to wait for another process that holds DataDir; 0 fails at once.
	LockWait time.Duration
	// Cluster, when set, makes the store one member of several; nil is a single one that nobody can reach.
	Cluster *Cluster
	// External, when set, is the etcd to use instead of one in this process.
	External *External
	// Log receives etcd's own messages too.
	Log *slog.Logger
}

// Store is one running etcd member.
type Store struct {
	client  *clientv3.Client
	etcd    *embed.Etcd          // nil where it is external
	session *concurrency.Session // with an external one
	failure *failure
	lock    *os.File
	cancel  context.CancelFunc
	loops   sync.WaitGroup
	once    sync.Once
}

// Raft's clock. A tick wakes an idle process, and there is nobody to send a heartbeat to; campaign
// makes the start independent of it.
const (
	tickMs     = 500
	electionMs = 5 * tickMs
)

// campaignEvery is how often a start asks the member to become leader, until it is.
const campaignEvery = 2 * time.Millisecond

// quotaBytes is where etcd starts to refuse writes (etcd's own recommended ceiling).
const quotaBytes = 8 << 30

// Open locks cfg.DataDir and starts etcd in it. It returns ErrLocked, ErrCorrupt or ErrNoSpace
// without having changed any data, or the error of ctx.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if cfg.DataDir == "" {
		return nil, errors.New("store: no data directory given")
	}
	dir := filepath.Join(cfg.DataDir, "etcd")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	lock, err := takeLock(ctx, filepath.Join(cfg.DataDir, "lock"), cfg.LockWait)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	s := &Store{failure: newFailure(dir), lock: lock}
	if cfg.External != nil {
		err = s.connect(ctx, *cfg.External, log)
	} else {
		err = s.start(ctx, dir, cfg.Cluster, log)
	}
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("store: %w", err)
	}
	loopCtx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	if cfg.External != nil {
		s.loops.Go(func() { s.watchClaim(loopCtx) })
		return s, nil
	}
	s.loops.Go(func() { s.defragLoop(loopCtx, log) })
	if cfg.Cluster != nil {
		s.loops.Go(func() { s.watchRemoval(loopCtx) })
		s.loops.Go(func() {
			if err := s.boundSilence(loopCtx, cfg.Cluster.URL); err != nil {
				log.Error("after a partition this server may take a while to find the others", "error", err)
			}
		})
	}
	return s, nil
}

func (s *Store) start(ctx context.Context, dir string, cluster *Cluster, log *slog.Logger) error {
	if err := os.Chmod(dir, 0o700); err != nil { // etcd refuses anything wider
		return err
	}
	found, err := inspect(dir)
	if err != nil {
		return err
	}
	if err := judge(found, dir); err != nil {
		return err
	}

	cfg := etcdConfig(dir)
	if cluster != nil {
		if err := cluster.apply(cfg); err != nil {
			return err
		}
	} else {
		starting.Lock()
		defer starting.Unlock()
	}
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(newLogger(log, s.failure))
	started := make(chan error, 1)
	go func() {
		defer func() {
			// bolt panics on a page it cannot read; say so instead of ending the process.
			if r := recover(); r != nil {
				s.failure.set(fmt.Errorf("%w: %s: %v; restore the directory from a backup", ErrCorrupt, dir, r))
			}
		}()
		etcd, err := embed.StartEtcd(cfg)
		s.etcd = etcd
		started <- err
	}()
	select {
	case err := <-started:
		if err != nil {
			return classify(dir, "start etcd", []zap.Field{zap.Error(err)})
		}
	case <-s.failure.ch:
		return s.failure.err
	}
	if cluster == nil {
		err = s.campaign(ctx)
	} else {
		err = s.becomeVoter(ctx, *cluster, log)
	}
	if err != nil {
		return err
	}
	s.client = v3client.New(s.etcd.Server)
	return nil
}

// campaign makes the only member leader without waiting for an election timeout, by the message
// with which a leader hands over to a follower (Raft thesis, section 3.10). It is sent only when
// raft has nothing left to apply: on that message raft looks through its unapplied entries, and
// panics when etcd has meanwhile dropped them from memory.
func (s *Store) campaign(ctx context.Context) error {
	server := s.etcd.Server
	self := uint64(server.MemberID())
	tick := time.NewTicker(campaignEvery)
	defer tick.Stop()
	for {
		select {
		case <-server.ReadyNotify():
			return nil
		case <-s.failure.ch:
			return s.failure.err
		case <-ctx.Done():
			s.etcd.Close()
			return ctx.Err()
		case <-tick.C:
			if uint64(server.Leader()) != 0 || !raftHasApplied() {
				continue
			}
			if err := server.Process(ctx, raftpb.Message{Type: raftpb.MsgTimeoutNow, From: self, To: self}); err != nil {
				return fmt.Errorf("campaign: %w", err)
			}
		}
	}
}

// starting serialises starts: raftHasApplied asks the member that was started last.
var starting sync.Mutex

// raftHasApplied says whether raft itself, not only etcd behind it, is done with every committed
// entry. etcd tells raft's state nowhere but in this variable.
func raftHasApplied() bool {
	v := expvar.Get("raft.status")
	if v == nil {
		return false // the election timeout will do
	}
	var status struct{ Commit, Applied uint64 }
	if err := json.Unmarshal([]byte(v.String()), &status); err != nil {
		return false
	}
	return status.Commit > 0 && status.Applied == status.Commit
}

// etcdConfig is a single member that nobody can reach.
func etcdConfig(dir string) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Name = "skep"
	cfg.Dir = dir
	// etcd wants a name for itself even where nothing listens. It is stored in the member list,
	// so it must not change.
	self := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.AdvertisePeerUrls = []url.URL{self}
	cfg.AdvertiseClientUrls = []url.URL{self}
	cfg.ListenPeerUrls = []url.URL{}
	cfg.ListenClientUrls = []url.URL{}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.EnableGRPCGateway = false

	cfg.TickMs, cfg.ElectionMs = tickMs, electionMs
	cfg.UnsafeNoFsync = false
	cfg.QuotaBackendBytes = quotaBytes
	// The API server compacts every five minutes; it must keep what its watches still need.
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModePeriodic, "0"
	// Followers that fall behind would need old log entries in memory. There are none.
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = 5000, 100
	// A laptop's disk often needs more than etcd's 100 ms; what is worth a line in the log is longer.
	cfg.WarningApplyDuration, cfg.WarningUnaryRequestDuration = time.Second, time.Second
	return cfg
}

// Client calls etcd directly. It is shared: the caller must not close it, nor change its fields.
func (s *Store) Client() *clientv3.Client { return s.client }

// Failed is closed when etcd can no longer work; Err says why.
func (s *Store) Failed() <-chan struct{} { return s.failure.ch }

// Err is nil until Failed is closed.
func (s *Store) Err() error {
	select {
	case <-s.failure.ch:
		return s.failure.err
	default:
		return nil
	}
}

// Close stops etcd after what it has accepted is on disk, and releases the lock. Watches and
// requests in progress end with an error. After a failure it only releases the lock.
func (s *Store) Close() error {
	s.once.Do(func() {
		s.cancel()
		s.loops.Wait()
		closed := make(chan struct{})
		go func() {
			defer close(closed)
			if s.session != nil {
				_ = s.session.Close() // without it the claim ends by itself
			}
			// A client's Close reports that its context was cancelled, which is what it does.
			_ = s.client.Close()
			if s.etcd != nil {
				s.etcd.Close()
			}
		}()
		select {
		case <-closed:
		case <-s.failure.ch:
		}
		s.lock.Close()
	})
	return s.Err()
}
