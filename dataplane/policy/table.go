// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"skep.io/skep/dataplane/maps"
)

// Cluster is what policies are about, as it is known.
type Cluster interface {
	Pod(types.NamespacedName) *Pod    // nil if unknown
	Pods(namespace string) []*Pod     // of all namespaces if empty
	Namespace(name string) labels.Set // of its labels
}

// Limits of a Table.
type Limits struct {
	Entries int // of all sets
	Set     int // entries or IP blocks of one set, besides pods
}

// Table knows what the kernel's maps should hold, and which steps lead there from what they hold.
//
// Two rules make every change safe for a packet that comes in the middle of it. A set never changes, and an
// identity never means something else: other rules or other labels get a new number. And nothing leads to
// a number before all that is stored under it is written. So a packet is judged by what was wanted before,
// or by what is wanted now.
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

	policies   map[string]map[string]*Policy // by namespace and name
	sets       map[string]*set               // by key
	identities map[string]*identity          // by key
	pods       map[types.NamespacedName]*tracked
	owners     map[netip.Addr]types.NamespacedName // who an address in the kernel belongs to
	locals     map[uint32]*local                   // by slot
	inherited  map[uint32]maps.PolicySets          // by slot: of an earlier epoch, whose pods are not known yet
	entries    int
	info       map[uint32]SetInfo // of all sets whose drops are counted
	former     []formerSet        // that are gone: events about them may still be unread
}

// SetInfo names a set.
type SetInfo struct {
	Direction, Namespace string
	Policies             []string
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
		policies: map[string]map[string]*Policy{}, sets: map[string]*set{}, identities: map[string]*identity{},
		pods: map[types.NamespacedName]*tracked{}, owners: map[netip.Addr]types.NamespacedName{},
		locals: map[uint32]*local{}, inherited: map[uint32]maps.PolicySets{}, info: map[uint32]SetInfo{},
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
	if old != nil && reflect.DeepEqual(old.spec, &np.Spec) {
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
	before := len(t.log.actions)
	for _, slot := range sortedSlots(t.locals) {
		if l := t.locals[slot]; l.Namespace == namespace {
			t.resolveLocal(slot, l)
		}
	}
	t.settle(before)
}

// ResolveAll finds the sets of all of the node's pods: once everything is known.
func (t *Table) ResolveAll() {
	before := len(t.log.actions)
	for _, slot := range sortedSlots(t.locals) {
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

// write stores a new set: its own rules, and what it lets every pod do.
func (t *Table) write(s *set) {
	keys, blocks := s.base()
	t.entries += len(keys)
	t.do(Action{Count: s.number})
	if len(keys) > 0 {
		t.do(Action{Allow: keys})
	}
	if len(blocks) > 0 {
		t.do(Action{Peers: blocks})
	}
	for _, id := range t.sortedIdentities() {
		t.allow(s, id)
	}
	for _, pod := range t.cluster.Pods(s.scope()) {
		if _, known := t.pods[pod.key()]; !known && len(s.of(pod, t.cluster.Namespace(pod.Namespace), 0)) > 0 {
			t.track(pod)
		}
	}
}

// scope is the namespace that all pods of the set's rules are in, or empty.
func (s *set) scope() string {
	for i := range s.rules {
		r := &s.rules[i]
		if r.anyPeer && s.direction == egress && len(r.ports) > 0 {
			return ""
		}
		for j := range r.pods {
			if r.pods[j].namespaces != nil {
				return ""
			}
		}
	}
	return s.policies[0].name.Namespace
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
	keys := s.of(id.pod, id.namespace, id.number)
	if len(keys) == 0 {
		return
	}
	if t.entries+len(keys) > t.limits.Entries {
		s.left[id.number] = true
		return
	}
	t.entries += len(keys)
	t.do(Action{Allow: keys})
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
	keys, blocks := s.base()
	t.entries -= len(keys)
	for _, id := range t.sortedIdentities() {
		if !s.left[id.number] {
			more := s.of(id.pod, id.namespace, id.number)
			t.entries -= len(more)
			keys = append(keys, more...)
		}
	}
	gone := make([]maps.IdentityKey, 0, len(blocks))
	for _, b := range blocks {
		gone = append(gone, b.Key)
	}
	t.later(Action{Disallow: keys, Forget: gone, Uncount: s.number})
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
	var keys []maps.PolicyKey
	for _, s := range t.sortedSets() {
		if s.left[id.number] {
			delete(s.left, id.number)
			continue
		}
		keys = append(keys, s.of(id.pod, id.namespace, id.number)...)
	}
	t.entries -= len(keys)
	t.later(Action{Disallow: keys})
}

// Flush does to the kernel what is still to be done.
func (t *Table) Flush(s Store) error { return t.log.flush(s) }

// Collect deletes what nothing leads to any more. final is told how many packets a set dropped in all.
func (t *Table) Collect(s Store, final func(info SetInfo, drops uint64)) error {
	return t.log.collect(s, func(set uint32) error {
		n, err := s.PolicyDrops(set)
		if err != nil {
			return err
		}
		if info, ok := t.info[set]; ok { // else it was told before the deletion failed
			final(info, n)
			delete(t.info, set)
			t.former = append(t.former[max(0, len(t.former)-formerSets+1):], formerSet{set, info})
		}
		return nil
	})
}

// Drops asks the kernel for the packets that each set has dropped so far.
func (t *Table) Drops(s Store, each func(info SetInfo, drops uint64)) error {
	for set, info := range t.info {
		n, err := s.PolicyDrops(set)
		if err != nil {
			return err
		}
		each(info, n)
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
