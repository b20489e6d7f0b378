/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Flows. A flow that is not translated has one entry for both directions, as most packets belong to
 * such and most of a connection's cost is making entries; a translated one has an entry for each
 * side of the translation, which also says what its packets become. Either is found with one lookup
 * by the tuple in canonical order. dataplane/conntrack removes what is old; the LRU removes what
 * does not fit.
 */
#pragma once
#include "counters.h"
#include "packet.h"

enum flow_flags {
	FLOW_TRANSLATED = 1 << 0, /* packets with exactly .from become .to */
	FLOW_REPLY = 1 << 1,	  /* the side that answers */
	FLOW_SEEN = 1 << 2,	  /* a packet came with the tuple in canonical order, */
	FLOW_SEEN_BACK = 1 << 3,  /* and in the opposite order */
	FLOW_FIN = 1 << 4,	  /* the direction has ended */
	FLOW_FIN_BACK = 1 << 5,
	FLOW_RST = 1 << 6,
	FLOW_SOURCE_IS_NODE = 1 << 7, /* becomes the node's: routed here, as the stack refuses it */
	FLOW_OPENED_BACK = 1 << 8,    /* by a packet with the tuple in the opposite order */
	FLOW_FROM_NODE = 1 << 9,      /* opened by the node itself, which no policy denies */
	FLOW_DSR = 1 << 11,	      /* the backend's node answers the client itself */
	FLOW_OPENED_BY_PEER =
	    1 << 10, /* for flow_open only: by the other end of the packet it gets */
};

struct flow {
	__u64 last_seen; /* ns, coarse monotonic */
	struct tuple to;
	__u32 service;
	__u32 flags;
	__u32 backend;
	__u32 reversed;	  /* whether .from is the key with its ends exchanged */
	__u32 ifindex[2]; /* where each direction was seen to come from rightfully, if a pod's */
	__u32 checked;	  /* version of the policies that let it pass */
	__u32 pad;
};

#define FLOW_REFRESH_NS 1000000000ULL

struct flow_map {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct tuple);
	__type(value, struct flow);
	__uint(max_entries, 65536);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
};

struct flow_map conntrack_tcp SEC(".maps");
struct flow_map conntrack_udp SEC(".maps"); /* a flood of one protocol spares the other */

/* Puts the tuple into canonical order. Returns whether its ends were exchanged. */
static __always_inline __u32 tuple_canonical(struct tuple *out, const struct tuple *t)
{
	bool swap = false, decided = false;

	for (int i = 3; i >= 0; i--) {
		if (!decided && t->saddr.w[i] != t->daddr.w[i]) {
			swap = t->saddr.w[i] > t->daddr.w[i];
			decided = true;
		}
	}
	if (!decided)
		swap = t->sport > t->dport;
	if (!swap) {
		*out = *t;
		return 0;
	}
	out->saddr = t->daddr;
	out->daddr = t->saddr;
	out->sport = t->dport;
	out->dport = t->sport;
	out->proto = t->proto;
	out->pad[0] = out->pad[1] = out->pad[2] = 0;
	return 1;
}

/*
 * Two calls: of one that is given either map the kernel does not know which, and goes through the
 * map's operations instead of having its look-up inlined.
 */
static __always_inline void *flow_lookup(const struct tuple *key)
{
	void *f;

	if (key->proto == IPPROTO_TCP) {
		f = bpf_map_lookup_elem(&conntrack_tcp, key);
		barrier();
		return f;
	}
	return bpf_map_lookup_elem(&conntrack_udp, key);
}

/* Finds the flow of a packet; reversed says which of its directions. */
static __always_inline struct flow *flow_find(const struct tuple *t, __u32 *reversed)
{
	struct tuple key;

	*reversed = tuple_canonical(&key, t);
	return flow_lookup(&key);
}

/* Whether a packet in this direction is to become f->to. */
static __always_inline bool flow_translates(const struct flow *f, __u32 reversed)
{
	return f->flags & FLOW_TRANSLATED && f->reversed == reversed;
}

/*
 * Notes a flow under a key in canonical order. What drives others out is never told:
 * dataplane/conntrack finds it as what was noted here, less what was forgotten, less what is there.
 */
__global int flow_keep(const struct tuple *key, const struct flow *f, __u64 how)
{
	bool tcp;
	long err;

	if (!key || !f)
		return -EINVAL;
	tcp = key->proto == IPPROTO_TCP;
	if (tcp)
		err = bpf_map_update_elem(&conntrack_tcp, key, f, BPF_NOEXIST);
	else
		err = bpf_map_update_elem(&conntrack_udp, key, f, BPF_NOEXIST);
	if (likely(!err)) {
		count_exactly(tcp ? COUNT_FLOW_TCP_ADDED : COUNT_FLOW_UDP_ADDED, 1);
		return 0;
	}
	if (err != -EEXIST) {
		count(tcp ? COUNT_FLOW_TCP_FAILED : COUNT_FLOW_UDP_FAILED);
		return err;
	}
	if (how != BPF_ANY)
		return err;
	if (tcp)
		return bpf_map_update_elem(&conntrack_tcp, key, f, BPF_ANY);
	return bpf_map_update_elem(&conntrack_udp, key, f, BPF_ANY);
}

static __always_inline long flow_insert(const struct tuple *t, struct flow *f, __u64 how)
{
	struct tuple key;

	f->reversed = tuple_canonical(&key, t);
	return flow_keep(&key, f, how);
}

/* Forgets the flow under a key in canonical order. */
static __always_inline long flow_forget(const struct tuple *key)
{
	bool tcp = key->proto == IPPROTO_TCP;
	long err;

	if (tcp)
		err = bpf_map_delete_elem(&conntrack_tcp, key);
	else
		err = bpf_map_delete_elem(&conntrack_udp, key);
	if (!err)
		count_exactly(tcp ? COUNT_FLOW_TCP_REMOVED : COUNT_FLOW_UDP_REMOVED, 1);
	return err;
}

static __always_inline __u32 flow_flags_of(__u8 tcp_flags, __u32 reversed)
{
	__u32 flags = reversed ? FLOW_SEEN_BACK : FLOW_SEEN;

	if (tcp_flags & TCP_FIN)
		flags |= reversed ? FLOW_FIN_BACK : FLOW_FIN;
	if (tcp_flags & TCP_RST)
		flags |= FLOW_RST;
	return flags;
}

#define FLOW_OVER (FLOW_FIN | FLOW_FIN_BACK | FLOW_RST)

/*
 * Notes a packet of a known flow. Writes only what changed: the entry's cache line is shared.
 * Returns whether this is the flow's last packet: a reset, or the acknowledgement after both ends'
 * FIN.
 */
static __always_inline bool flow_touch(struct flow *f, __u8 tcp_flags, __u32 reversed)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	__u32 flags = flow_flags_of(tcp_flags, reversed);
	bool last = tcp_flags & TCP_RST ||
		    ((f->flags & (FLOW_FIN | FLOW_FIN_BACK)) == (FLOW_FIN | FLOW_FIN_BACK) &&
		     !(tcp_flags & (TCP_FIN | TCP_SYN)));

	if (unlikely(tcp_flags & TCP_SYN && f->flags & FLOW_OVER)) {
		/* The same ports used again. */
		f->flags &= ~FLOW_OVER;
		f->last_seen = now;
	}
	if ((f->flags & flags) != flags)
		f->flags |= flags;
	else if (now - f->last_seen < FLOW_REFRESH_NS)
		return last;
	f->last_seen = now;
	return last;
}

/*
 * Notes a packet of a flow that is not translated, and forgets the flow with its last packet, so
 * that the map stays as small as what is open. What a peer sends again afterwards is a flow that
 * nobody knows who opened, which passes if either end may have; not so if that was the node, whose
 * own connections no policy denies.
 */
static __always_inline void flow_pass(struct flow *f, const struct packet *p, __u32 reversed)
{
	struct tuple key;

	if (likely(!flow_touch(f, p->tcp_flags, reversed)) ||
	    f->flags & (FLOW_TRANSLATED | FLOW_FROM_NODE) || p->tuple.proto != IPPROTO_TCP)
		return;
	tuple_canonical(&key, &p->tuple);
	flow_forget(&key);
}

/* The tuple of the answer to a packet with tuple t. */
static __always_inline void tuple_reverse(struct tuple *out, const struct tuple *t)
{
	out->saddr = t->daddr;
	out->daddr = t->saddr;
	out->sport = t->dport;
	out->dport = t->sport;
	out->proto = t->proto;
	out->pad[0] = out->pad[1] = out->pad[2] = 0;
}

/*
 * Keeps a flow that is not translated. from_pod is the pod's device that it comes from, or 0;
 * checked is the version of the policies that let it pass; flags say who opened it; service is what
 * the client's socket was told it asks. f is room for it, as the stack has little.
 */
static __always_inline void flow_open(struct flow *f, const struct packet *p, __u32 from_pod,
				      __u32 checked, __u32 flags, __u32 service)
{
	struct tuple key;
	__u32 reversed = tuple_canonical(&key, &p->tuple);

	__builtin_memset(f, 0, sizeof(*f));
	f->last_seen = bpf_ktime_get_coarse_ns();
	f->checked = checked;
	f->service = service;
	f->flags = flow_flags_of(p->tcp_flags, reversed) | (flags & FLOW_FROM_NODE);
	if (!!reversed != !!(flags & FLOW_OPENED_BY_PEER))
		f->flags |= FLOW_OPENED_BACK;
	/* An index would become a bitwise or on the stack pointer, which the verifier refuses. */
	f->ifindex[0] = reversed ? 0 : from_pod;
	f->ifindex[1] = reversed ? from_pod : 0;
	flow_keep(&key, f, BPF_ANY);
}
