/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Translation of packets that have no ports of their own: fragments, which go where the first of
 * their datagram went, and ICMP errors, which go to the sender of the packet that they quote, under
 * the addresses that this sender knows (RFC 5508).
 */
#pragma once
#include "nat.h"

/* What becomes of a packet without ports. */
enum portless {
	PORTLESS_NONE, /* nobody's who was translated: the caller decides */
	PORTLESS_DROP,
	PORTLESS_ON,	    /* it was rewritten */
	PORTLESS_FROM_NODE, /* it was rewritten, and is in the node's name: see forward */
};

/* The packet in an ICMP error: as much of it as is rewritten. Too much for the stack. */
struct quote {
	struct tuple t; /* as its sender sent it */
	struct tuple r; /* the answer to it */
	struct tuple to;
	struct packet p; /* the error itself */
	union {
		struct ipv4_header v4;
		struct ipv6_header v6;
		__be32 words[10];
	} ip, ip_new;
	struct {
		__be16 sport, dport;
		__be16 length, check; /* UDP's */
	} l4, l4_new;
	__be16 tcp[2], tcp_new[2]; /* TCP's checksum, and 0 */
	__be32 addresses[8], addresses_new[8];
	__u32 l3_at, l4_at;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct quote);
	__uint(max_entries, 1);
} quotes SEC(".maps");

/* Reads the packet that an error quotes. False when it has no ports, or not all headers are there.
 */
static __always_inline bool quote_read(struct __sk_buff *skb, struct quote *q)
{
	q->l3_at = q->p.l4 + 8;
	if (q->p.v4) {
		if (bpf_skb_load_bytes(skb, q->l3_at, &q->ip.v4, sizeof(q->ip.v4)) ||
		    q->ip.v4.version_ihl >> 4 != 4 ||
		    q->ip.v4.fragment & bpf_htons(0x1fff)) /* a later one: no ports */
			return false;
		address_from_v4(&q->t.saddr, q->ip.v4.saddr);
		address_from_v4(&q->t.daddr, q->ip.v4.daddr);
		q->t.proto = q->ip.v4.proto;
		q->l4_at = q->l3_at + (q->ip.v4.version_ihl & 0x0f) * 4;
	} else {
		if (bpf_skb_load_bytes(skb, q->l3_at, &q->ip.v6, sizeof(q->ip.v6)))
			return false;
		q->t.saddr = q->ip.v6.saddr;
		q->t.daddr = q->ip.v6.daddr;
		q->t.proto = q->ip.v6.next;
		q->l4_at = q->l3_at + sizeof(q->ip.v6);
	}
	/* An error goes to the one who sent what it speaks of. */
	if ((q->t.proto != IPPROTO_TCP && q->t.proto != IPPROTO_UDP) ||
	    !address_equal(&q->t.saddr, &q->p.tuple.daddr) ||
	    bpf_skb_load_bytes(skb, q->l4_at, &q->l4, sizeof(q->l4)))
		return false;
	q->t.sport = q->l4.sport;
	q->t.dport = q->l4.dport;
	tuple_reverse(&q->r, &q->t);
	return true;
}

static __always_inline bool is_error(struct __sk_buff *skb, const struct packet *p)
{
	__u8 type;

	if (p->tuple.proto != (p->v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6) ||
	    bpf_skb_load_bytes(skb, p->l4, &type, sizeof(type)))
		return false;
	if (p->v4)
		return type == ICMP_UNREACHABLE || type == ICMP_TIME_EXCEEDED ||
		       type == ICMP_PARAMETER;
	return type >= 1 && type <= ICMPV6_ERROR_LAST;
}

/*
 * Writes q->to's answer over the quoted packet: addresses, ports and their checksums, as far as
 * they are quoted. Returns by how much the error's own checksum changes, or less than 0.
 */
static __always_inline __s64 quote_rewrite(struct __sk_buff *skb, struct quote *q)
{
	__s64 addresses, ports, diff;
	__u32 size = q->p.v4 ? sizeof(q->ip.v4) : sizeof(q->ip.v6);
	bool tcp;

	__builtin_memcpy(&q->addresses[0], &q->t.saddr, 32);
	__builtin_memcpy(&q->addresses_new[0], &q->to.daddr, 16);
	__builtin_memcpy(&q->addresses_new[4], &q->to.saddr, 16);
	q->ip_new = q->ip;
	q->l4_new = q->l4;
	q->l4_new.sport = q->to.dport;
	q->l4_new.dport = q->to.sport;
	addresses = bpf_csum_diff(q->addresses, 32, q->addresses_new, 32, 0);
	ports = bpf_csum_diff((__be32 *)&q->l4, 4, (__be32 *)&q->l4_new, 4, addresses);
	if (q->p.v4) {
		q->ip_new.v4.saddr = q->to.daddr.w[3];
		q->ip_new.v4.daddr = q->to.saddr.w[3];
		q->ip_new.v4.check = sum_after(q->ip.v4.check, addresses);
	} else {
		q->ip_new.v6.saddr = q->to.daddr;
		q->ip_new.v6.daddr = q->to.saddr;
	}
	/* 8 bytes of a TCP header may be all there is of it. */
	tcp = q->t.proto == IPPROTO_TCP &&
	      !bpf_skb_load_bytes(skb, q->l4_at + TCP_CHECK, q->tcp, sizeof(q->tcp[0]));
	if (tcp) {
		q->tcp_new[0] = sum_after(q->tcp[0], ports);
	} else if (q->t.proto == IPPROTO_UDP && q->l4.check) {
		q->l4_new.check = sum_after(q->l4.check, ports);
		if (!q->l4_new.check)
			q->l4_new.check = 0xffff;
	}
	if (q->p.v4)
		diff = bpf_csum_diff(q->ip.words, sizeof(q->ip.v4), q->ip_new.words,
				     sizeof(q->ip.v4), 0);
	else
		diff = bpf_csum_diff(q->ip.words, sizeof(q->ip.v6), q->ip_new.words,
				     sizeof(q->ip.v6), 0);
	diff = bpf_csum_diff((__be32 *)&q->l4, 8, (__be32 *)&q->l4_new, 8, diff);
	if (bpf_skb_store_bytes(skb, q->l3_at, &q->ip_new, size, 0) ||
	    bpf_skb_store_bytes(skb, q->l4_at, &q->l4_new, sizeof(q->l4_new), 0))
		return -1;
	if (tcp) {
		diff = bpf_csum_diff((__be32 *)q->tcp, 4, (__be32 *)q->tcp_new, 4, diff);
		if (bpf_skb_store_bytes(skb, q->l4_at + TCP_CHECK, q->tcp_new,
					sizeof(q->tcp_new[0]), 0))
			return -1;
	}
	return diff;
}

/* Gives the error itself the addresses in q->to, and adds diff to what its checksum covers. */
static __always_inline bool error_rewrite(struct __sk_buff *skb, struct quote *q, __u64 diff)
{
	__u32 check = q->p.l4 + 2;
	__s64 outer;

	__builtin_memcpy(&q->addresses[0], &q->p.tuple.saddr, 32);
	/* A router that is told of under its own address would answer for one it cannot reach. */
	if (!address_equal(&q->to.saddr, &q->r.saddr))
		q->p.tuple.saddr = q->to.saddr;
	q->p.tuple.daddr = q->to.daddr;
	__builtin_memcpy(&q->addresses_new[0], &q->p.tuple.saddr, 32);
	outer = bpf_csum_diff(q->addresses, 32, q->addresses_new, 32, 0);
	if (bpf_l4_csum_replace(skb, check, 0, diff, 0))
		return false;
	if (!q->p.v4)
		return !replace_l4_sum(skb, check, outer, BPF_F_PSEUDO_HDR, false) &&
		       !bpf_skb_store_bytes(skb, ETH_HLEN + IPV6_SADDR, q->addresses_new, 32, 0);
	q->addresses_new[0] = q->p.tuple.saddr.w[3];
	q->addresses_new[1] = q->p.tuple.daddr.w[3];
	return !bpf_l3_csum_replace(skb, ETH_HLEN + IPV4_CHECK, 0, outer, 0) &&
	       !bpf_skb_store_bytes(skb, ETH_HLEN + IPV4_SADDR, q->addresses_new, 8, 0);
}

/* An ICMP error about a packet that was translated. */
__global int error_translate(struct __sk_buff *skb, struct packet *p)
{
	__u32 zero = 0, reversed, flags = FLOW_SOURCE_IS_NODE;
	struct quote *q = bpf_map_lookup_elem(&quotes, &zero);
	const struct tuple *to;
	struct flow *f;
	__s64 diff;

	if (!q || !p)
		return PORTLESS_NONE;
	q->p = *p;
	if (!quote_read(skb, q))
		return PORTLESS_NONE;
	/* The error takes the way of the answer to what it quotes. */
	f = flow_find(&q->r, &reversed);
	if (f && flow_translates(f, reversed)) {
		q->to = f->to;
		flags = f->flags;
	} else {
		to = bpf_map_lookup_elem(&handed_up, &q->r);
		if (!to)
			return PORTLESS_NONE;
		q->to = *to;
	}
	diff = quote_rewrite(skb, q);
	if (diff < 0 || !error_rewrite(skb, q, diff)) {
		drop(COUNT_DROP_REWRITE, p, 0);
		return PORTLESS_DROP;
	}
	p->tuple = q->p.tuple;
	count(COUNT_ERROR_TRANSLATED);
	return flags & FLOW_SOURCE_IS_NODE ? PORTLESS_FROM_NODE : PORTLESS_ON;
}

/* Rewrites the addresses of a later fragment: the transport's checksum is in the first. */
static __always_inline bool fragment_rewrite(struct __sk_buff *skb, struct packet *p,
					     const struct tuple *to)
{
	__be32 old[2], new[2];

	if (p->v4) {
		old[0] = p->tuple.saddr.w[3];
		old[1] = p->tuple.daddr.w[3];
		new[0] = to->saddr.w[3];
		new[1] = to->daddr.w[3];
		if (bpf_l3_csum_replace(skb, ETH_HLEN + IPV4_CHECK, 0,
					bpf_csum_diff(old, 8, new, 8, 0), 0) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + IPV4_SADDR, new, 8, 0))
			return false;
	} else if (bpf_skb_store_bytes(skb, ETH_HLEN + IPV6_SADDR, &to->saddr, 32,
				       BPF_F_RECOMPUTE_CSUM)) {
		return false;
	}
	p->tuple.saddr = to->saddr;
	p->tuple.daddr = to->daddr;
	return true;
}

/* A later fragment goes where the first one went. */
__global int fragment_translate(struct __sk_buff *skb, struct packet *p)
{
	const struct fragment_way *way;

	if (!p)
		return PORTLESS_NONE;
	way = fragment_find(p);
	if (!way || !(way->flags & FLOW_TRANSLATED))
		return PORTLESS_NONE;
	if (!fragment_rewrite(skb, p, &way->to)) {
		drop(COUNT_DROP_REWRITE, p, 0);
		return PORTLESS_DROP;
	}
	return way->flags & FLOW_SOURCE_IS_NODE ? PORTLESS_FROM_NODE : PORTLESS_ON;
}

static __always_inline enum portless portless(struct __sk_buff *skb, struct packet *p)
{
	if (p->piece == PIECE_LATER)
		return fragment_translate(skb, p);
	if (p->piece == PIECE_WHOLE && is_error(skb, p))
		return error_translate(skb, p);
	return PORTLESS_NONE;
}
