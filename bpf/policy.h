/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * NetworkPolicies: address -> identity, and (set of rules, identity, protocol, port) -> allowed.
 *
 * The agent never changes what an identity means; it writes others beside them and then swaps the
 * one identity of an address that leads there. A set only grows or only shrinks while programs read
 * it; other changes are another set, and a swap of the one word in policy_slots. After any change
 * the agent raises the version, and a flow that was judged under another version is judged again by
 * its next packet. So an established connection costs one comparison, and follows every change of
 * policy.
 */
#pragma once
#include "conntrack.h"
#include "counters.h"
#include "endpoints.h"
#include "flows.h"
#include "peers.h"

/* The sets that both directions of a pod's traffic must satisfy; 0 lets everything pass. */
struct policy_sets {
	__u32 ingress, egress;
};

#define POLICY_CLOSED 0xffffffff /* the set that nothing satisfies */
/* The scope in which the pods of a set's epoch have their identities. */
#define POLICY_EPOCH(set) ((set) & 0xff000000)

/* Never replaced, only written in place: a slot's element is never another pod's. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct policy_sets);
	__uint(max_entries, 4096);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy_slots SEC(".maps");

struct policy_state {
	__u32 version; /* 0: no pod of this node is subject to a policy */
	__u32 last;    /* version that was given out */
	__u32 epoch;   /* last one that was given out */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct policy_state);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy_state SEC(".maps");

/* Pods in the scope of their epoch, IP blocks in the scope of their set. */
struct identity_key {
	__u32 bits; /* of scope and address */
	__u32 scope;
	struct address addr;
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct identity_key);
	__type(value, __u32);
	__uint(max_entries, 1048576);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} identities SEC(".maps");

struct policy_key {
	__u32 bits; /* from set on */
	__u32 set;
	__u32 peer; /* an identity, or 0 for everybody */
	__u8 proto;
	__u8 port[2]; /* network byte order; not aligned, as the bits of a prefix follow one another
		       */
	__u8 pad;
};

#define POLICY_BITS_PORT 88

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct policy_key);
	__type(value, __u32);
	__uint(max_entries, 1048576);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy SEC(".maps");

/*
 * What a policy entry says. Of a set of NetworkPolicies alone: the peer may use the port. Of a set
 * that an administrator's ClusterNetworkPolicies are part of: which rule of either tier comes first
 * for the peer and port, of those that name everybody, the peer's identity, or its block; what the
 * three entries say is joined before it is judged.
 */
enum {
	TIER_BITS = 14, /* two of the action, and above them the rule's place in its tier */
	TIER_MASK = (1 << TIER_BITS) - 1, /* no rule of the tier */
	POLICY_ALLOWED = 1 << 28,	  /* a NetworkPolicy lets it pass */
	POLICY_ISOLATED = 1 << 29,	  /* a NetworkPolicy selects the pod: nothing else passes */
	POLICY_TIERED = 1 << 30,	  /* all of this holds; else it may simply pass */
};

enum tier_action { TIER_ACCEPT = 0, TIER_DENY = 1, TIER_PASS = 2, TIER_SILENT = 3 };
enum tier { TIER_ADMIN = 1, TIER_BASELINE = 2 };

/* Packets that a set dropped; the agent knows the names of its policies. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy_drops SEC(".maps");

static __always_inline __u32 policy_version(void)
{
	__u32 zero = 0;
	struct policy_state *s = bpf_map_lookup_elem(&policy_state, &zero);

	return s ? READ_ONCE(s->version) : 0;
}

struct fragment_key {
	struct address saddr, daddr;
	__u32 id;
	__u32 proto;
};

/*
 * What a judgement works on: too much for the stack, and no program of a CPU interrupts another, as
 * all of them run with bottom halves disabled.
 */
struct judgement {
	struct tuple c; /* the connection: who opened it, and who gets it after translation */
	__u32 reason;	/* enum counter, if it is denied: which direction's policies did */
	__u32 set;	/* of them */
	__u32 rule;	/* and which rule of an administrator, if it was one: its tier and place */
	struct policy_key key;
	struct identity_key peer;
	struct range_key range;
	struct fragment_key datagram;
	struct flow forward, reply; /* of a translated connection; or only the one */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct judgement);
	__uint(max_entries, 1);
} judgements SEC(".maps");

static __always_inline struct judgement *judgement(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&judgements, &zero);
}

static __always_inline __u32 identity_of(struct judgement *j, __u32 scope, const struct address *a)
{
	__u32 *peer;

	j->peer.bits = 160;
	j->peer.scope = scope;
	j->peer.addr = *a;
	peer = bpf_map_lookup_elem(&identities, &j->peer);
	return peer ? *peer : 0;
}

/* The entry of a set for a peer and the port in j->key, or null. */
static __always_inline const __u32 *entry_of(struct judgement *j, __u32 peer)
{
	j->key.peer = peer;
	return bpf_map_lookup_elem(&policy, &j->key);
}

static __always_inline __u32 tiers_join(__u32 a, __u32 b)
{
	const __u32 low = TIER_MASK, high = (__u32)TIER_MASK << TIER_BITS;
	__u32 admin = (a & low) < (b & low) ? a & low : b & low;
	__u32 baseline = (a & high) < (b & high) ? a & high : b & high;

	return admin | baseline | ((a | b) & ~(low | high));
}

/* Admin rules first, then NetworkPolicies if any select the pod, else baseline rules. */
static __always_inline bool tiers_allow(struct judgement *j, __u32 v)
{
	__u32 baseline = v >> TIER_BITS & TIER_MASK;

	switch (v & 3) {
	case TIER_ACCEPT:
		return true;
	case TIER_DENY:
		j->rule = TIER_ADMIN << 16 | (v & TIER_MASK) >> 2;
		return false;
	}
	if (v & POLICY_ISOLATED)
		return v & POLICY_ALLOWED;
	if ((baseline & 3) != TIER_DENY)
		return true;
	j->rule = TIER_BASELINE << 16 | baseline >> 2;
	return false;
}

/* Whether a set lets the peer use the port: the same look-ups however many rules it has. */
__global int set_allows(struct judgement *j, __u32 set, bool from)
{
	const struct address *peer;
	const __u32 *entry;
	__u32 verdict = 0, identity;

	if (!j)
		return false;
	peer = from ? &j->c.saddr : &j->c.daddr;
	j->rule = 0;
	if (set == POLICY_CLOSED)
		return false;
	j->key.bits = POLICY_BITS_PORT;
	j->key.set = set;
	j->key.proto = j->c.proto;
	j->key.pad = 0;
	__builtin_memcpy(j->key.port, &j->c.dport, sizeof(j->key.port));
	entry = entry_of(j, 0);
	if (entry) {
		verdict = *entry; /* of a set with tiers there always is one */
		if (!(verdict & POLICY_TIERED))
			return true;
	}
	identity = identity_of(j, POLICY_EPOCH(set), peer);
	entry = identity ? entry_of(j, identity) : 0;
	if (entry) {
		if (!verdict)
			return true;
		verdict = tiers_join(verdict, *entry);
	}
	identity = identity_of(j, set, peer);
	entry = identity ? entry_of(j, identity) : 0;
	if (entry) {
		if (!verdict)
			return true;
		verdict = tiers_join(verdict, *entry);
	}
	return verdict && tiers_allow(j, verdict);
}

/*
 * Addresses that this node answers itself: NetworkPolicies never deny traffic from a pod to its own
 * node. What an administrator denies is denied there, too, but for names (and the gateway).
 */
static __always_inline bool to_this_node(struct judgement *j)
{
	__u32 *range;

	if (!j->rule && bpf_map_lookup_elem(&node_addresses, &j->c.daddr))
		return true;
	j->range.bits = 128;
	j->range.addr = j->c.daddr;
	range = bpf_map_lookup_elem(&ranges, &j->range);
	return range && *range == RANGE_OPEN;
}

static __always_inline bool deny(struct judgement *j, enum counter reason, __u32 set)
{
	j->reason = reason;
	j->set = set;
	return false;
}

static __always_inline const struct policy_sets *sets_of(const struct endpoint *ep)
{
	__u32 slot = ep->slot;

	return bpf_map_lookup_elem(&policy_slots, &slot);
}

/* Judges j->c by the policies of either end that is a pod of this node. A pod always reaches
 * itself. */
__global int permitted(struct judgement *j)
{
	const struct policy_sets *sets;
	const struct endpoint *ep;
	__u32 set;

	if (!j)
		return false;
	if (address_equal(&j->c.saddr, &j->c.daddr))
		return true;
	ep = bpf_map_lookup_elem(&endpoints, &j->c.saddr);
	if (ep) {
		sets = sets_of(ep);
		set = sets ? READ_ONCE(sets->egress) : POLICY_CLOSED;
		if (set && !set_allows(j, set, false) && !to_this_node(j))
			return deny(j, COUNT_DROP_POLICY_EGRESS, set);
	}
	ep = bpf_map_lookup_elem(&endpoints, &j->c.daddr);
	if (ep) {
		sets = sets_of(ep);
		set = sets ? READ_ONCE(sets->ingress) : POLICY_CLOSED;
		if (set && !set_allows(j, set, true))
			return deny(j, COUNT_DROP_POLICY_INGRESS, set);
	}
	return true;
}

/* Counts a drop under its reason and its policies, and tells of it. */
__global int denied(struct judgement *j)
{
	__u64 *n;

	if (!j)
		return false;
	n = bpf_map_lookup_elem(&policy_drops, &j->set);
	count(j->set == POLICY_CLOSED ? COUNT_DROP_POLICY_CLOSED : j->reason);
	if (n)
		__sync_fetch_and_add(n, 1);
	report_drop(&j->c, j->reason, j->set, j->rule, 0);
	return false;
}

static __always_inline bool opens(const struct packet *p)
{
	return (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

enum opening { DENIED, OPENED, OPENED_BY_PEER };

/*
 * Whether a flow may be opened by this packet. A TCP segment that does not open a connection
 * belongs to one whose entry was lost, and nobody knows who opened that: it passes if either of its
 * ends may have.
 */
__global int may_open(const struct packet *p)
{
	struct judgement *j = judgement();
	__u32 reason, set, rule;

	if (!j || !p)
		return DENIED;
	j->c = p->tuple;
	if (permitted(j))
		return OPENED;
	if (p->tuple.proto == IPPROTO_TCP && !opens(p)) {
		reason = j->reason;
		set = j->set;
		rule = j->rule;
		tuple_reverse(&j->c, &p->tuple);
		if (permitted(j))
			return OPENED_BY_PEER;
		j->reason = reason;
		j->set = set;
		j->rule = rule;
	}
	denied(j);
	return DENIED;
}

/* The connection that a packet of a flow belongs to, as it was opened, with its true ends. */
static __always_inline void connection_of(struct tuple *c, const struct flow *f, __u32 reversed,
					  const struct packet *p)
{
	bool back = f->flags & FLOW_OPENED_BACK;

	if (!(f->flags & FLOW_TRANSLATED)) {
		if (reversed == back || opens(p))
			*c = p->tuple;
		else
			tuple_reverse(c, &p->tuple);
	} else if (!(f->flags & FLOW_REPLY)) {
		*c = p->tuple;
		c->daddr = f->to.daddr;
		c->dport = f->to.dport;
	} else {
		/* The client is who the answers go to; the backend is who they come from. */
		if (f->reversed == reversed)
			tuple_reverse(c, &p->tuple);
		else
			*c = p->tuple;
		c->saddr = f->to.daddr;
		c->sport = f->to.dport;
	}
}

/* Judges a flow anew: policies have changed, or a connection is opened where another was. */
__global int flow_judge(struct flow *f, __u32 reversed, const struct packet *p, __u32 version)
{
	struct judgement *j = judgement();

	if (!j || !f || !p)
		return false;
	if (version && !(f->flags & FLOW_FROM_NODE && !opens(p))) {
		connection_of(&j->c, f, reversed, p);
		if (!permitted(j))
			return denied(j);
		if (opens(p) && !(f->flags & FLOW_TRANSLATED)) {
			f->flags &= ~(FLOW_OPENED_BACK | FLOW_FROM_NODE);
			if (reversed)
				f->flags |= FLOW_OPENED_BACK;
		}
	}
	f->checked = version;
	return true;
}

static __always_inline bool flow_permitted(struct flow *f, __u32 reversed, const struct packet *p)
{
	__u32 version = policy_version();

	if (likely(f->checked == version && !(version && opens(p))))
		return true;
	return flow_judge(f, reversed, p, version);
}

/* What the sender's socket asked for when it was told to use this address. */
static __always_inline const struct peer *peer_of(struct __sk_buff *skb, const struct tuple *t)
{
	struct bpf_sock *sk = skb->sk;
	struct peers *peers;

	if (!sk)
		return 0;
	peers = bpf_sk_storage_get(&socket_peers, sk, 0, 0);
	if (!peers)
		return 0;
	for (int i = 0; i < PEERS; i++) {
		const struct peer *p = &peers->peer[i];

		if (p->backend_port == t->dport && t->dport &&
		    address_equal(&p->backend, &t->daddr))
			return p;
	}
	return 0;
}

/* Whether a packet without a flow is the first of a connection. */
static __always_inline bool is_new(const struct packet *p)
{
	return p->tuple.proto != IPPROTO_TCP || opens(p);
}

/* Keeps a flow that is not translated and that policies let pass, and tells of it. */
__global int flow_start(struct __sk_buff *skb, const struct packet *p, __u32 from_pod,
			__u32 checked, __u32 flags)
{
	struct judgement *j = judgement();
	const struct peer *asked;
	__u32 service;

	if (!j || !p)
		return 0;
	asked = peer_of(skb, &p->tuple);
	service = asked ? asked->service : 0;
	flow_open(&j->forward, p, from_pod, checked, flags, service);
	if (is_new(p))
		report_open(&p->tuple, asked ? &asked->frontend : 0,
			    asked ? asked->frontend_port : 0, service, from_pod);
	return 0;
}
