/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Flows, one entry a direction, found by the tuple as the packet carries it when it arrives. A
 * translated flow's entry also says what the packet becomes, so that one lookup decides all.
 * dataplane/conntrack removes what is old; the LRU removes what does not fit.
 */
#pragma once
#include "packet.h"

enum flow_flags {
	FLOW_TRANSLATED = 1 << 0, /* rewrite to .to */
	FLOW_REPLY = 1 << 1,	  /* the direction opposite to the first packet */
	FLOW_SEEN = 1 << 2,	  /* a packet came this way */
	FLOW_FIN = 1 << 3,	  /* this direction has ended */
	FLOW_RST = 1 << 4,
	FLOW_SOURCE_IS_NODE = 1 << 5, /* becomes the node's: routed here, as the stack refuses it */
};

struct flow {
	__u64 last_seen; /* ns, coarse monotonic */
	struct tuple to;
	__u32 service;
	__u32 flags;
	__u32 backend;
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

static __always_inline struct flow *flow_find(const struct tuple *t)
{
	if (t->proto == IPPROTO_TCP)
		return bpf_map_lookup_elem(&conntrack_tcp, t);
	return bpf_map_lookup_elem(&conntrack_udp, t);
}

static __always_inline long flow_insert(const struct tuple *t, const struct flow *f, __u64 how)
{
	if (t->proto == IPPROTO_TCP)
		return bpf_map_update_elem(&conntrack_tcp, t, f, how);
	return bpf_map_update_elem(&conntrack_udp, t, f, how);
}

static __always_inline __u32 flow_flags_of(__u8 tcp_flags)
{
	__u32 flags = FLOW_SEEN;

	if (tcp_flags & TCP_FIN)
		flags |= FLOW_FIN;
	if (tcp_flags & TCP_RST)
		flags |= FLOW_RST;
	return flags;
}

/* Notes a packet of a known flow. Writes only what changed: the entry's cache line is shared. */
static __always_inline void flow_touch(struct flow *f, __u8 tcp_flags)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	__u32 flags = flow_flags_of(tcp_flags);

	if (tcp_flags & TCP_SYN && f->flags & (FLOW_FIN | FLOW_RST)) {
		/* The same ports used again. */
		f->flags &= ~(FLOW_FIN | FLOW_RST);
		f->last_seen = now;
	}
	if ((f->flags & flags) != flags)
		f->flags |= flags;
	else if (now - f->last_seen < FLOW_REFRESH_NS)
		return;
	f->last_seen = now;
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

/* Keeps a flow that is not translated. */
static __always_inline void flow_open(const struct packet *p)
{
	struct flow f = {.last_seen = bpf_ktime_get_coarse_ns()};
	struct tuple back;

	f.flags = flow_flags_of(p->tcp_flags);
	flow_insert(&p->tuple, &f, BPF_ANY);
	tuple_reverse(&back, &p->tuple);
	f.flags = FLOW_REPLY;
	flow_insert(&back, &f, BPF_NOEXIST);
}
