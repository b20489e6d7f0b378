/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Policy for packets that have no flow of their own: ICMP, which belongs to what it answers or
 * speaks about; and fragments, of which only the first has ports.
 */
#pragma once
#include "policy.h"

/* Datagrams whose first fragment passed. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct fragment_key);
	__type(value, __u32);
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

/* first says whether the fragment has the transport header, at p->l4 and of protocol key->proto. */
static __always_inline bool fragment_parse(struct __sk_buff *skb, struct packet *p,
					   struct fragment_key *key, bool *first)
{
	struct ipv4_header v4;
	struct {
		__u8 next, reserved;
		__be16 offset;
		__be32 id;
	} v6;

	key->saddr = p->tuple.saddr;
	key->daddr = p->tuple.daddr;
	if (p->v4) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN, &v4, sizeof(v4)))
			return false;
		key->id = v4.id;
		*first = !(v4.fragment & bpf_htons(0x1fff));
	} else {
		if (bpf_skb_load_bytes(skb, p->l4, &v6, sizeof(v6)))
			return false;
		key->id = v6.id;
		*first = !(v6.offset & bpf_htons(0xfff8));
		p->tuple.proto = v6.next;
		p->l4 += sizeof(v6);
	}
	key->proto = p->tuple.proto;
	return true;
}

/* The first fragment is judged by its ports; the others follow it, and do not pass before it. */
__global int fragment_permitted(struct __sk_buff *skb, const struct packet *whole)
{
	struct judgement *j = judgement();
	struct fragment_key *key;
	__u32 one = 1, reversed;
	enum opening opening;
	struct packet *p;
	struct flow *f;
	bool first;

	if (!j || !whole)
		return false;
	key = &j->datagram;
	p = &j->fragment;
	*p = *whole;
	if (!fragment_parse(skb, p, key, &first)) {
		drop(COUNT_DROP_MALFORMED, whole, 0);
		return false;
	}
	if (!first) {
		if (bpf_map_lookup_elem(&fragments, key))
			return true;
		drop(COUNT_DROP_FRAGMENT, whole, 0);
		return false;
	}
	if (parse_l4(skb, p) == PARSED_MALFORMED) {
		drop(COUNT_DROP_MALFORMED, whole, 0);
		return false;
	}
	f = flow_find(&p->tuple, &reversed);
	if (f) {
		if (!flow_permitted(f, reversed, p))
			return false;
	} else {
		opening = may_open(p);
		if (opening == DENIED)
			return false;
		flow_start(skb, p, 0, policy_version(),
			   opening == OPENED_BY_PEER ? FLOW_OPENED_BY_PEER : 0);
	}
	bpf_map_update_elem(&fragments, key, &one, BPF_ANY);
	return true;
}

/* Whether a packet without ports may pass. */
static __always_inline bool stateless_permitted(struct __sk_buff *skb, const struct packet *p)
{
	struct judgement *j;

	if (likely(!policy_version()))
		return true;
	switch (p->tuple.proto) {
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return icmp_permitted(skb, p);
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
	case IPPROTO_FRAGMENT:
		return fragment_permitted(skb, p);
	}
	j = judgement();
	if (!j)
		return false;
	j->c = p->tuple;
	return permitted(j) || denied(j);
}
