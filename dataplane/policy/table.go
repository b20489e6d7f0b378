// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/dataplane/maps"
)

// Cluster is what policies are about, as it is known.
type Cluster interface {
	Pod(types.NamespacedName) *Pod      // nil if unknown
	Pods(namespace string) []*Pod       // of all namespaces if empty
	Namespace(name string) labels.Set   // its labels; nil if unknown
	Nodes(labels.Selector) []netip.Addr // their addresses, in order
}

// Limits of a Table.
type Limits struct {
	Entries int // of all sets
	Set     int // entries or IP blocks of one set, besides pods
	Blocks  int // IP blocks of all sets
}

// Table knows what the kernel's maps should hold, and which steps lead there from what they hold.
//
// Every change is safe for a packet that comes in the middle of it: it is judged by what was wanted before, or by what
// is wanted now. An identity never means something else, other labels get a new number, and nothing leads to a number
// before all that is stored under it is written. A set changes in place only where NetworkPolicies come, or where
// they go: what is allowed then grows or shrinks, and no look-up depends on another. Else it is another set.
//
// Only pods that some set has a rule for have an identity. A Table is used by one goroutine at a time; it
// does nothing but compute, and its steps are to be done in order.
type Table struct {
	cluster Cluster
	limits  Limits
	log     *log
	state   maps.PolicyState
	epoch   uint32
	counter struct{ set, identity uint32 }
	// revisions of policies
	revision uint64

	policies    map[string]map[string]*Policy // by namespace and name
	clusterwide map[string]*Policy            // by name
	sets        map[string]*set               // by key
	identities  map[string]*identity          // by key
	pods        map[types.NamespacedName]*tracked
	owners      map[netip.Addr]types.NamespacedName // who an address in the kernel belongs to
	locals      map[uint32]*local                   // by slot
	inherited   map[uint32]maps.PolicySets          // by slot: of an earlier epoch, whose pods are not known yet
	entries     int
	blocks      int                // IP blocks of all sets
	info        map[uint32]SetInfo // of all sets whose drops are counted
	tallies     map[uint32]tally   // under which names
	former      []formerSet        // that are gone: events about them may still be unread
}

// SetInfo names a set.
type SetInfo struct {
	Direction, Namespace string
	Policies             []string               // NetworkPolicies of the namespace, and TIER/NAME
	Places               map[maps.Tier][]string // TIER/NAME of each rule, in order
}

// identity is pods that no rule can tell apart.
type identity struct {
	number    uint32
	key       string
	pod       *Pod // one of them
	namespace labels.Set
	pods      int
}

// tracked is a pod with an identity.
type tracked struct {
	addrs    []netip.Addr
	identity *identity
}

// NewTable starts with empty maps, or beside those of an earlier epoch: that of state must be another.
func NewTable(c Cluster, limits Limits, state maps.PolicyState) *Table {
	return &Table{
		cluster: c, limits: limits, log: newLog(), state: state, epoch: state.Epoch << 24,
		policies: map[string]map[string]*Policy{}, clusterwide: map[string]*Policy{}, sets: map[string]*set{}, identities: map[string]*identity{},
		pods: map[types.NamespacedName]*tracked{}, owners: map[netip.Addr]types.NamespacedName{},
		locals: map[uint32]*local{}, inherited: map[uint32]maps.PolicySets{}, info: map[uint32]SetInfo{}, tallies: map[uint32]tally{},
	}
}

func (t *Table) do(a Action) { t.log.actions = append(t.log.actions, a) }

// later is for what nothing leads to after all steps so far.
func (t *Table) later(a Action) { t.log.garbage = append(t.log.garbage, a) }

// settle ends a change: flows are judged anew if it wrote something.
func (t *Table) settle(before int) {
	isolated := false
	for _, l := range t.locals {
		isolated = isolated || l.has != maps.PolicySets{}
	}
	for _, has := range t.inherited {
		isolated = isolated || has != maps.PolicySets{}
	}
	switch {
	case !isolated && t.state.Version == 0, isolated && t.state.Version != 0 && len(t.log.actions) == before:
		return
	case !isolated:
		t.state.Version = 0
	default:
		t.state.Last++
		if t.state.Last == 0 {
			t.state.Last = 1
		}
		t.state.Version = t.state.Last
	}
	state := t.state
	t.do(Action{State: &state})
}

// SetPolicy makes a policy known, or its new content. Returns whether the content is another.
func (t *Table) SetPolicy(np *networkingv1.NetworkPolicy) bool {
	if !t.Learn(np) {
		return false
	}
	t.resolve(np.Namespace)
	return true
}

// Learn is SetPolicy without consequences before ResolveAll.
func (t *Table) Learn(np *networkingv1.NetworkPolicy) bool {
	old := t.policies[np.Namespace][np.Name]
	if old != nil && old.same(&np.Spec) {
		return false
	}
	p := understand(np)
	t.revision++
	p.revision = t.revision
	if t.policies[np.Namespace] == nil {
		t.policies[np.Namespace] = map[string]*Policy{}
	}
	t.policies[np.Namespace][np.Name] = p
	return true
}

// DeletePolicy forgets a policy. Returns whether it was known.
func (t *Table) DeletePolicy(name types.NamespacedName) bool {
	if t.policies[name.Namespace][name.Name] == nil {
		return false
	}
	delete(t.policies[name.Namespace], name.Name)
	if len(t.policies[name.Namespace]) == 0 {
		delete(t.policies, name.Namespace)
	}
	t.resolve(name.Namespace)
	return true
}

// resolve finds the sets of the node's pods in a namespace.
func (t *Table) resolve(namespace string) {
	t.resolveSlots(func(l *local) bool { return l.Namespace == namespace })
}

// ResolveAll finds the sets of all of the node's pods: once everything is known.
func (t *Table) ResolveAll() { t.resolveSlots(func(*local) bool { return true }) }

func (t *Table) resolveSlots(which func(*local) bool) {
	before := len(t.log.actions)
	slots := slices.DeleteFunc(sortedSlots(t.locals), func(slot uint32) bool { return !which(t.locals[slot]) })
	for _, slot := range slots {
		t.refresh(t.locals[slot])
	}
	t.moveSets(slots)
	for _, slot := range slots {
		t.resolveLocal(slot, t.locals[slot])
	}
	t.settle(before)
}

func sortedSlots(m map[uint32]*local) []uint32 {
	out := make([]uint32, 0, len(m))
	for slot := range m {
		out = append(out, slot)
	}
	slices.Sort(out)
	return out
}

func (t *Table) sortedIdentities() []*identity {
	out := make([]*identity, 0, len(t.identities))
	for _, id := range t.identities {
		out = append(out, id)
	}
	slices.SortFunc(out, func(a, b *identity) int { return cmp.Compare(a.number, b.number) })
	return out
}

// allow writes what a set lets an identity do.
func (t *Table) allow(s *set, id *identity) {
	if entries := t.admit(s, id, 0); len(entries) > 0 {
		t.do(Action{Allow: entries})
	}
}

// admit gives what a set should have of an identity, of which it has some entries, as far as there is room.
func (t *Table) admit(s *set, id *identity, has int) []maps.PolicyEntry {
	delete(s.left, id.number)
	entries := s.of(id.pod, id.namespace, id.number)
	if len(entries) > 0 && t.entries-has+len(entries) > t.limits.Entries {
		s.left[id.number] = true
		entries = s.written(id)
	}
	t.entries += len(entries) - has
	return entries
}

func keysOf(entries []maps.PolicyEntry) []maps.PolicyKey {
	out := make([]maps.PolicyKey, 0, len(entries))
	for i := range entries {
		out = append(out, entries[i].Key)
	}
	return out
}

// unuse lets a set go when its last pod has.
func (t *Table) unuse(s *set) {
	if s == nil {
		return
	}
	if s.users--; s.users > 0 {
		return
	}
	delete(t.sets, s.key)
	entries := slices.Clone(s.anybody)
	for _, k := range s.classes {
		entries = append(entries, k.entries...)
	}
	for _, id := range t.sortedIdentities() {
		entries = append(entries, s.written(id)...)
	}
	t.entries -= len(entries)
	t.blocks -= len(s.points)
	gone := make([]maps.IdentityKey, 0, len(s.points))
	for _, p := range s.points {
		gone = append(gone, maps.IdentityKeyOf(s.number, p.prefix))
	}
	t.later(Action{Disallow: keysOf(entries), Forget: gone, Uncount: s.number})
	t.untrackUseless()
}

// untrackUseless is for pods that no set has a rule for any more.
func (t *Table) untrackUseless() {
	useless := map[*identity]bool{}
	for _, id := range t.identities {
		useless[id] = !t.relevant(id.pod, id.namespace)
	}
	for name, p := range t.pods {
		if useless[p.identity] {
			t.untrackLater(name, p)
		}
	}
}

func (t *Table) relevant(pod *Pod, namespace labels.Set) bool {
	for _, s := range t.sets {
		if len(s.of(pod, namespace, 0)) > 0 {
			return true
		}
	}
	return false
}

// SetPod makes known what a pod is now.
func (t *Table) SetPod(pod *Pod) {
	before := len(t.log.actions)
	t.updatePod(pod)
	t.resolvePod(pod.key())
	t.settle(before)
}

func (t *Table) resolvePod(name types.NamespacedName) {
	for slot, l := range t.locals { // with the same name, one that ends and its successor
		if l.NamespacedName == name {
			t.resolveLocal(slot, l)
		}
	}
}

// DeletePod forgets a pod as a peer. What is attached stays so until Detach.
func (t *Table) DeletePod(name types.NamespacedName) {
	before := len(t.log.actions)
	t.untrack(name)
	t.settle(before)
}

// SetNamespace looks again at the pods of a namespace whose labels may have changed.
func (t *Table) SetNamespace(name string) {
	before := len(t.log.actions)
	for _, pod := range t.cluster.Pods(name) {
		t.updatePod(pod)
	}
	t.settle(before)
	if len(t.clusterwide) > 0 {
		t.resolve(name) // other policies may select its pods
	}
}

func (t *Table) updatePod(pod *Pod) {
	namespace := t.cluster.Namespace(pod.Namespace)
	if len(pod.Addrs) == 0 || !t.relevant(pod, namespace) {
		t.untrack(pod.key())
		// An address that belonged to somebody is nobody's now.
		for _, a := range pod.Addrs {
			if owner, ok := t.owners[a]; ok {
				t.untrack(owner)
			}
		}
		return
	}
	if old, ok := t.pods[pod.key()]; ok && slices.Equal(old.addrs, pod.Addrs) && old.identity.key == identityKey(pod, namespace) {
		return
	}
	t.track(pod)
}

// track gives a pod its identity, and its addresses to the pod.
func (t *Table) track(pod *Pod) {
	if len(pod.Addrs) == 0 {
		return
	}
	name, namespace := pod.key(), t.cluster.Namespace(pod.Namespace)
	key := identityKey(pod, namespace)
	id, ok := t.identities[key]
	if !ok {
		t.counter.identity = t.counter.identity%(maps.PeerBlock-1) + 1
		id = &identity{number: t.counter.identity, key: key, pod: pod, namespace: namespace}
		t.identities[key] = id
		for _, s := range t.sortedSets() {
			t.allow(s, id)
		}
	}
	id.pods++
	old := t.pods[name]
	t.pods[name] = &tracked{addrs: pod.Addrs, identity: id}
	var peers []Peer
	for _, a := range pod.Addrs {
		t.owners[a] = name
		delete(t.log.discard, t.podKey(a))
		peers = append(peers, Peer{t.podKey(a), id.number})
	}
	t.do(Action{Peers: peers})
	if old != nil {
		t.forget(name, old, pod.Addrs)
		t.leave(old.identity)
	}
}

func (t *Table) podKey(a netip.Addr) maps.IdentityKey {
	return maps.IdentityKeyOf(t.epoch, netip.PrefixFrom(a, a.BitLen()))
}

func (t *Table) sortedSets() []*set {
	out := make([]*set, 0, len(t.sets))
	for _, s := range t.sets {
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b *set) int { return cmp.Compare(a.number, b.number) })
	return out
}

// untrack takes a pod's identity from its addresses at once: they may be another's soon.
func (t *Table) untrack(name types.NamespacedName) {
	p, ok := t.pods[name]
	if !ok {
		return
	}
	delete(t.pods, name)
	t.forget(name, p, nil)
	t.leave(p.identity)
}

// untrackLater is for a pod that no set has a rule for any more; sets that are on their way out still may.
func (t *Table) untrackLater(name types.NamespacedName, p *tracked) {
	delete(t.pods, name)
	for _, a := range p.addrs {
		if t.owners[a] == name {
			delete(t.owners, a)
			t.log.discard[t.podKey(a)] = true
		}
	}
	t.leave(p.identity)
}

func (t *Table) forget(name types.NamespacedName, p *tracked, keep []netip.Addr) {
	var keys []maps.IdentityKey
	for _, a := range p.addrs {
		if t.owners[a] == name && !slices.Contains(keep, a) {
			delete(t.owners, a)
			keys = append(keys, t.podKey(a))
		}
	}
	if len(keys) > 0 {
		t.do(Action{Forget: keys})
	}
}

// leave lets an identity go when its last pod has.
func (t *Table) leave(id *identity) {
	if id.pods--; id.pods > 0 {
		return
	}
	delete(t.identities, id.key)
	var entries []maps.PolicyEntry
	for _, s := range t.sortedSets() {
		entries = append(entries, s.written(id)...)
		delete(s.left, id.number)
	}
	t.entries -= len(entries)
	t.later(Action{Disallow: keysOf(entries)})
}

// Flush does to the kernel what is still to be done.
func (t *Table) Flush(s Store) error { return t.log.flush(s) }

// tally is whose drops a set counts. The policies of a set may change while it counts.
type tally struct {
	info  SetInfo
	told  uint64 // of the kernel's count, which has to do with earlier names
	stale bool   // the set has other names now
}

// name says which policies a set is made of.
func (t *Table) name(s *set, namespace string) {
	info := SetInfo{s.direction.String(), namespace, s.names(), s.places}
	t.info[s.number] = info
	if old, ok := t.tallies[s.number]; ok {
		old.stale = true
		t.tallies[s.number] = old
		return
	}
	t.tallies[s.number] = tally{info: info}
}

// Collect deletes what nothing leads to any more. final is told how many packets a set dropped while it had these names.
func (t *Table) Collect(s Store, final func(info SetInfo, drops uint64)) error {
	for set, y := range t.tallies {
		if !y.stale {
			continue
		}
		n, err := s.PolicyDrops(set)
		if err != nil {
			return err
		}
		final(y.info, n-y.told)
		t.tallies[set] = tally{info: t.info[set], told: n}
	}
	return t.log.collect(s, func(set uint32) error {
		n, err := s.PolicyDrops(set)
		if err != nil {
			return err
		}
		if info, ok := t.info[set]; ok { // else it was told before the deletion failed
			final(info, n-t.tallies[set].told)
			delete(t.info, set)
			delete(t.tallies, set)
			t.former = append(t.former[max(0, len(t.former)-formerSets+1):], formerSet{set, info})
		}
		return nil
	})
}

// Drops asks the kernel for the packets that each set has dropped so far.
func (t *Table) Drops(s Store, each func(info SetInfo, drops uint64)) error {
	for set, y := range t.tallies {
		n, err := s.PolicyDrops(set)
		if err != nil {
			return err
		}
		each(y.info, n-y.told)
	}
	return nil
}

// Problems are policies that could not be put into force as they are, and why. What they cannot let through
// is denied.
func (t *Table) Problems() map[types.NamespacedName]string {
	out := map[types.NamespacedName]string{}
	for _, slot := range sortedSlots(t.locals) {
		l := t.locals[slot]
		for _, r := range l.refused {
			for _, p := range r.policies {
				out[p.name] = fmt.Sprintf("pod %s is closed: %s", l.Name, r.why)
			}
		}
	}
	for _, s := range t.sortedSets() {
		if len(s.left) == 0 {
			continue
		}
		for _, p := range s.policies {
			out[p.name] = fmt.Sprintf("%d kinds of pods are denied by the %s rules although these let them through: all %d entries of the node are used",
				len(s.left), s.direction, t.limits.Entries)
		}
	}
	return out
}
