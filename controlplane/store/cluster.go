// SPDX-License-Identifier: Apache-2.0

package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver"
	etcderrors "go.etcd.io/etcd/server/v3/etcdserver/errors"
)

// ErrRemoved says that this member was removed from its cluster. Its data is of no use any more.
var ErrRemoved = errors.New("this server was removed from the cluster")

// ErrBusy says that a change of the membership has to wait for another.
var ErrBusy = errors.New("not now")

// Cluster makes the store one member of several, each in another server's process.
type Cluster struct {
	Name string // of this member; each server has another
	URL  string // https://ADDRESS:PORT, where this member listens and others reach it
	// Initial are the members by name when this one starts for the first time, itself among them; nil if it
	// is the first.
	Initial map[string]string
	// CertFile has a certificate for both sides of a connection and its key, CAFile the authority that signs
	// members' certificates and no others. Both are read again for each connection.
	CertFile, CAFile string
}

// Raft's clock between machines: etcd's own defaults.
const (
	clusterTickMs     = 100
	clusterElectionMs = 10 * clusterTickMs
)

// apply changes a single member's configuration.
func (c Cluster) apply(cfg *embed.Config) error {
	self, err := url.Parse(c.URL)
	if err != nil || self.Scheme != "https" || self.Port() == "" {
		return fmt.Errorf("%q is not where a member listens: https://ADDRESS:PORT", c.URL)
	}
	cfg.Name = c.Name
	cfg.AdvertisePeerUrls, cfg.ListenPeerUrls = []url.URL{*self}, []url.URL{*self}
	cfg.PeerTLSInfo.CertFile, cfg.PeerTLSInfo.KeyFile = c.CertFile, c.CertFile
	cfg.PeerTLSInfo.TrustedCAFile, cfg.PeerTLSInfo.ClientCertAuth = c.CAFile, true
	cfg.TickMs, cfg.ElectionMs = clusterTickMs, clusterElectionMs
	// What a follower needs that was away for a moment; beyond it, it gets the whole database.
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = 10_000, 5_000
	cfg.InitialCluster = c.Name + "=" + c.URL
	if c.Initial != nil {
		var all []string
		for name, at := range c.Initial {
			all = append(all, name+"="+at)
		}
		slices.Sort(all)
		cfg.InitialCluster, cfg.ClusterState = strings.Join(all, ","), embed.ClusterStateFlagExisting
	}
	return nil
}

// promoteEvery spaces attempts to become a voter: only the leader knows when a learner has caught up, and
// it tells nobody.
const promoteEvery = 100 * time.Millisecond

// becomeVoter waits until the member takes part, and makes it a voter where it is a learner.
func (s *Store) becomeVoter(ctx context.Context, c Cluster, log *slog.Logger) error {
	server := s.etcd.Server
	select {
	case <-server.ReadyNotify():
	case <-server.StopNotify():
		return ErrRemoved
	case <-s.failure.ch:
		return s.failure.err
	case <-ctx.Done():
		s.etcd.Close()
		return ctx.Err()
	}
	if err := s.moveTo(ctx, c.URL); err != nil {
		return err
	}
	for server.IsLearner() {
		_, err := server.PromoteMember(ctx, uint64(server.MemberID()))
		switch {
		case err == nil || errors.Is(err, etcderrors.ErrLearnerNotReady) || strings.Contains(err.Error(), etcderrors.ErrLearnerNotReady.Error()):
		case ctx.Err() != nil:
			s.etcd.Close()
			return ctx.Err()
		default:
			log.Warn("this server cannot vote yet, trying again", "error", err)
		}
		select {
		case <-time.After(promoteEvery):
		case <-server.StopNotify():
			return ErrRemoved
		case <-s.failure.ch:
			return s.failure.err
		case <-ctx.Done():
			s.etcd.Close()
			return ctx.Err()
		}
	}
	return nil
}

// moveTo tells the cluster where this member is, if that has changed: a single member had no address.
func (s *Store) moveTo(ctx context.Context, at string) error {
	server := s.etcd.Server
	self := server.Cluster().Member(server.MemberID())
	if self == nil || slices.Equal(self.PeerURLs, []string{at}) {
		return nil
	}
	moved := *self
	moved.PeerURLs = []string{at}
	if _, err := server.UpdateMember(ctx, moved); err != nil {
		return fmt.Errorf("tell the cluster the member's address %s: %w", at, err)
	}
	return nil
}

// watchRemoval ends the store when its member is removed.
func (s *Store) watchRemoval(ctx context.Context) {
	select {
	case <-s.etcd.Server.StopNotify():
		if ctx.Err() == nil {
			s.failure.set(fmt.Errorf("%w; `skep reset` takes it off this machine, which may join again then", ErrRemoved))
		}
	case <-ctx.Done():
	}
}

// Member is one server's part of the store.
type Member struct {
	ID      uint64 `json:"id"`
	Name    string `json:"name"`
	URL     string `json:"url"`
	Learner bool   `json:"learner"` // has no vote yet
	Leader  bool   `json:"leader"`
	Self    bool   `json:"self"`
}

// Members lists the cluster's members, by name.
func (s *Store) Members(ctx context.Context) ([]Member, error) {
	if s.etcd == nil {
		return nil, fmt.Errorf("list members: %w", ErrExternal)
	}
	list, err := s.client.MemberList(ctx)
	if err != nil {
		return nil, fmt.Errorf("store: list members: %w", err)
	}
	return members(s.etcd.Server, list), nil
}

func members(server *etcdserver.EtcdServer, list *clientv3.MemberListResponse) []Member {
	var out []Member
	for _, m := range list.Members {
		out = append(out, Member{
			ID: m.ID, Name: m.Name, URL: strings.Join(m.PeerURLs, ","), Learner: m.IsLearner,
			Leader: m.ID == uint64(server.Leader()), Self: m.ID == uint64(server.MemberID()),
		})
	}
	slices.SortFunc(out, func(a, b Member) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.URL, b.URL)) })
	return out
}

// Add lets a member in as a learner and returns all members for its Cluster.Initial. Asked again for one
// that has not started yet, it returns the same.
func (s *Store) Add(ctx context.Context, name, at string) (map[string]string, error) {
	all, err := s.Members(ctx)
	if err != nil {
		return nil, err
	}
	add, err := admit(all, name, at)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if add {
		err := whenHealthy(ctx, func() error {
			_, err := s.client.MemberAddAsLearner(ctx, []string{at})
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("store: add member %s at %s: %w", name, at, err)
		}
	}
	initial := map[string]string{name: at}
	for _, m := range all {
		if m.URL != at {
			initial[m.Name] = m.URL
		}
	}
	return initial, nil
}

// whenHealthy changes the membership as soon as etcd allows it: enough members must have been connected for
// five seconds (etcdserver.HealthInterval), and nothing tells when they have.
func whenHealthy(ctx context.Context, change func() error) error {
	for {
		err := change()
		if err == nil || !errors.Is(rpctypes.Error(err), rpctypes.ErrUnhealthy) {
			return err
		}
		select {
		case <-time.After(promoteEvery):
		case <-ctx.Done():
			return fmt.Errorf("%w: too few of its servers are connected (`skep member list`)", err)
		}
	}
}

// maxMembers is etcd's own advice: more make writes slower, and nothing safer.
const maxMembers = 7

// admit says whether a member is to be added that asks to join, or why it cannot.
func admit(all []Member, name, at string) (add bool, err error) {
	for _, m := range all {
		switch {
		case m.URL == at && m.Name == "":
			return false, nil // added, but never started: it asks again
		case m.URL == at:
			return false, fmt.Errorf("%s is the address of server %s already: `skep member remove %s` on another server, if that one is gone for good", at, m.Name, m.Name)
		case m.Name == name:
			return false, fmt.Errorf("there is a server %s already, at %s: give this machine another --node-name, or `skep member remove %s` on another server", name, m.URL, name)
		case m.Name == "":
			return false, fmt.Errorf("%w: another server, at %s, is joining at this moment (`skep member remove %s`, if it never will)", ErrBusy, m.URL, m.URL)
		case m.Learner:
			return false, fmt.Errorf("%w: server %s is still catching up", ErrBusy, m.Name)
		case !strings.HasPrefix(m.URL, "https://"):
			return false, errors.New("this cluster has one server that listens to no others: start it once with --cluster-init")
		}
	}
	if len(all) >= maxMembers {
		return false, fmt.Errorf("there are %d servers already; five are enough to lose two", len(all))
	}
	return true, nil
}

// Remove removes a member. It must be another than this one.
func (s *Store) Remove(ctx context.Context, name string) error {
	all, err := s.Members(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(m Member) bool { return m.Name == name || m.Name == "" && m.URL == name })
	if i < 0 {
		return fmt.Errorf("there is no server %q (`skep member list` shows those there are; one that never started is called by its URL)", name)
	}
	if all[i].Self {
		return fmt.Errorf("%s is this server: remove it on another one", name)
	}
	err = whenHealthy(ctx, func() error {
		_, err := s.client.MemberRemove(ctx, all[i].ID)
		return err
	})
	if err != nil {
		return fmt.Errorf("remove server %s: %w", name, err)
	}
	return nil
}
