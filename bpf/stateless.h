/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Policy for packets that have no flow of their own: ICMP, which belongs to what it answers or
 * speaks about; and fragments, of which only the first has ports.
 */
#pragma once
#include "policy.h"

/* Where the first fragment of a datagram went. */
struct fragment_way {
	struct tuple to; /* if it was translated: what its later fragments' addresses become */
	__u32 flags;	 /* FLOW_TRANSLATED, FLOW_SOURCE_IS_NODE */
};

/* Datagrams whose first fragment passed. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct fragment_key);
	__type(value, struct fragment_way);
	__uint(max_entries, 4096);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} fragments SEC(".maps");

enum {
	ICMP_ECHO_REPLY = 0,
	ICMP_UNREACHABLE = 3,
	ICMP_TIME_EXCEEDED = 11,
	ICMP_PARAMETER = 12,
	ICMPV6_ERROR_LAST = 4, /* from 1 on (RFC 4443) */
	ICMPV6_ECHO_REPLY = 129,
	ICMPV6_ND_FIRST =
	    133, /* to 137: neighbour discovery, which no router forwards (RFC 4861) */
	ICMPV6_ND_LAST = 137,
};

/* The packet that an ICMP error speaks of, as its sender sent it. */
static __always_inline bool icmp_subject(struct __sk_buff *skb, const struct packet *p,
					 struct tuple *t)
{
	struct ipv4_header v4;
	struct ipv6_header v6;
	__be16 ports[2] = {};
	__u32 at = p->l4 + 8;

	if (p->v4) {
		if (bpf_skb_load_bytes(skb, at, &v4, sizeof(v4)))
			return false;
		address_from_v4(&t->saddr, v4.saddr);
		address_from_v4(&t->daddr, v4.daddr);
		t->proto = v4.proto;
		at += (v4.version_ihl & 0x0f) * 4;
	} else {
		if (bpf_skb_load_bytes(skb, at, &v6, sizeof(v6)))
			return false;
		t->saddr = v6.saddr;
		t->daddr = v6.daddr;
		t->proto = v6.next;
		at += sizeof(v6);
	}
	if ((t->proto == IPPROTO_TCP || t->proto == IPPROTO_UDP || t->proto == IPPROTO_SCTP) &&
	    bpf_skb_load_bytes(skb, at, ports, sizeof(ports)))
		return false;
	t->sport = ports[0];
	t->dport = ports[1];
	t->pad[0] = t->pad[1] = t->pad[2] = 0;
	/* An error goes to the one who sent what it speaks of. */
	return address_equal(&t->saddr, &p->tuple.daddr);
}

__global int icmp_permitted(struct __sk_buff *skb, const struct packet *p)
{
	struct judgement *j = judgement();
	bool error, answer;
	__u32 reversed;
	__u8 type;

	if (!j || !p)
		return false;
	if (bpf_skb_load_bytes(skb, p->l4, &type, sizeof(type))) {
		drop(COUNT_DROP_MALFORMED, p, 0);
		return false;
	}
	if (p->v4) {
		error = type == ICMP_UNREACHABLE || type == ICMP_TIME_EXCEEDED ||
			type == ICMP_PARAMETER;
		answer = type == ICMP_ECHO_REPLY;
	} else {
		if (type >= ICMPV6_ND_FIRST && type <= ICMPV6_ND_LAST)
			return true;
		error = type >= 1 && type <= ICMPV6_ERROR_LAST;
		answer = type == ICMPV6_ECHO_REPLY;
	}
	if (error && icmp_subject(skb, p, &j->c) && (flow_find(&j->c, &reversed) || permitted(j)))
		return true;
	j->c = p->tuple;
	if (answer)
		tuple_reverse(&j->c, &p->tuple);
	return permitted(j) || denied(j);
}

static __always_inline void fragment_key_of(struct fragment_key *key, const struct packet *p)
{
	key->saddr = p->tuple.saddr;
	key->daddr = p->tuple.daddr;
	key->id = p->id;
	key->proto = p->v4 ? p->tuple.proto : 0; /* extension headers may follow an IPv6 one */
}

/* Keeps which datagram a first fragment is of, until its way is known. */
static __always_inline void fragment_begin(const struct packet *p)
{
	struct judgement *j;

	if (likely(p->piece != PIECE_FIRST))
		return;
	j = judgement();
	if (j)
		fragment_key_of(&j->datagram, p);
}

/* The first fragment passes, and the others of its datagram follow it. */
__global int fragment_note(const struct packet *p, bool from_node)
{
	struct judgement *j = judgement();
	struct fragment_way way = {};

	if (!j || !p)
		return 0;
	way.to = p->tuple;
	if (!address_equal(&p->tuple.saddr, &j->datagram.saddr) ||
	    !address_equal(&p->tuple.daddr, &j->datagram.daddr))
		way.flags = FLOW_TRANSLATED;
	if (from_node)
		way.flags |= FLOW_SOURCE_IS_NODE;
	bpf_map_update_elem(&fragments, &j->datagram, &way, BPF_ANY);
	return 0;
}

static __always_inline void fragment_end(const struct packet *p, bool from_node)
{
	if (unlikely(p->piece == PIECE_FIRST))
		fragment_note(p, from_node);
}

static __always_inline const struct fragment_way *fragment_find(const struct packet *p)
{
	struct fragment_key key;

	fragment_key_of(&key, p);
	return bpf_map_lookup_elem(&fragments, &key);
}

/* The first fragment is judged by its ports; the others follow it, and do not pass before it. */
__global int fragment_permitted(const struct packet *p)
{
	if (p && fragment_find(p))
		return true;
	if (p)
		drop(COUNT_DROP_FRAGMENT, p, 0);
	return false;
}

/* Whether a packet without ports may pass. */
static __always_inline bool stateless_permitted(struct __sk_buff *skb, const struct packet *p)
{
	struct judgement *j;

	if (likely(!policy_version()))
		return true;
	if (p->piece == PIECE_LATER)
		return fragment_permitted(p);
	if (p->tuple.proto == IPPROTO_ICMP || p->tuple.proto == IPPROTO_ICMPV6)
		return icmp_permitted(skb, p);
	j = judgement();
	if (!j)
		return false;
	j->c = p->tuple;
	return permitted(j) || denied(j);
}
