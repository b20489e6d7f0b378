/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
//go:build ignore
/* Both directions of the node's end of a pod's veth. */
#include "portless.h"

/* Neighbour discovery and the like: link-local or unspecified source, never leaves the link. */
static __always_inline bool is_link_local_v6(const struct packet *p)
{
	const struct address *s = &p->tuple.saddr, *d = &p->tuple.daddr;
	bool from = (s->w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000) ||
		    (!s->w[0] && !s->w[1] && !s->w[2] && !s->w[3]);
	bool to = (d->w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000) ||
		  (d->w[0] & bpf_htonl(0xff0f0000)) == bpf_htonl(0xff020000);

	return !p->v4 && p->tuple.proto == IPPROTO_ICMPV6 && from && to;
}

/* Whether the packet's source is the pod behind this device. */
static __always_inline bool is_source(struct __sk_buff *skb, const struct packet *p)
{
	struct endpoint *self = bpf_map_lookup_elem(&endpoints, &p->tuple.saddr);

	return self && self->ifindex == skb->ifindex;
}

/* Whether the packet's destination is a pod of this node. */
static __always_inline bool is_local(const struct packet *p)
{
	return bpf_map_lookup_elem(&endpoints, &p->tuple.daddr);
}

/* A packet of a flow that is known to be translated. */
static __always_inline int translated(struct __sk_buff *skb, struct packet *p, struct flow *f,
				      __u32 reversed)
{
	bool from_node = f->flags & FLOW_SOURCE_IS_NODE;

	flow_touch(f, p->tcp_flags, reversed);
	if (!rewrite(skb, p, &f->to)) {
		drop(COUNT_DROP_REWRITE, p, skb->ifindex);
		return TC_ACT_SHOT;
	}
	return forward(skb, p, from_node);
}

/* Packets that the pod sends. */
SEC("tcx/ingress")
int from_pod(struct __sk_buff *skb)
{
	struct packet p = {};
	__u32 reversed, version;
	enum opening opening = OPENED;
	struct flow *f;
	enum parsed parsed = parse(skb, &p);
	enum portless how;

	count(COUNT_POD_EGRESS);
	count_more(COUNT_BYTES_POD_EGRESS, skb->len);
	fragment_begin(&p);
	if (parsed == PARSED_PORTS) {
		f = flow_find(&p.tuple, &reversed);
		/* A flow that this device was found to be the source of needs no second look. */
		if (f && f->ifindex[reversed & 1] == skb->ifindex) {
			if (!flow_permitted(f, reversed, &p))
				return TC_ACT_SHOT;
			if (likely(!flow_translates(f, reversed))) {
				flow_pass(f, &p, reversed);
				return forward(skb, &p, false);
			}
			if (!flow_stale(f, &p))
				return translated(skb, &p, f, reversed);
		}
	} else if (parsed == PARSED_NOT_IP) {
		return skb->protocol == bpf_htons(ETH_P_ARP) ? TC_ACT_UNSPEC : TC_ACT_SHOT;
	} else if (parsed == PARSED_MALFORMED) {
		drop(COUNT_DROP_MALFORMED, &p, skb->ifindex);
		return TC_ACT_SHOT;
	}
	if (!is_source(skb, &p)) {
		if (is_link_local_v6(&p))
			return TC_ACT_UNSPEC;
		drop(COUNT_DROP_SPOOFED, &p, skb->ifindex);
		return TC_ACT_SHOT;
	}
	if (parsed == PARSED_ADDRESSES) {
		how = portless(skb, &p);
		if (how == PORTLESS_DROP)
			return TC_ACT_SHOT;
		if (how != PORTLESS_NONE)
			return forward(skb, &p, how == PORTLESS_FROM_NODE);
		/* Only services have such addresses: nobody else can put it together. */
		if (p.piece == PIECE_LATER && address_is_dead(&p.tuple.daddr)) {
			drop(COUNT_DROP_FRAGMENT, &p, skb->ifindex);
			return TC_ACT_SHOT;
		}
		if (!stateless_permitted(skb, &p))
			return TC_ACT_SHOT;
		return forward(skb, &p, false);
	}

	if (f && !(flow_translates(f, reversed) && flow_stale(f, &p))) {
		if (!flow_permitted(f, reversed, &p))
			return TC_ACT_SHOT;
		f->ifindex[reversed & 1] = skb->ifindex;
		if (flow_translates(f, reversed))
			return translated(skb, &p, f, reversed);
		flow_pass(f, &p, reversed);
		return forward(skb, &p, false);
	}
	/* A pod's address is no service's: nothing to look for there. */
	switch (is_local(&p) ? NAT_NONE : nat_open(skb, &p, SCOPE_INTERNAL)) {
	case NAT_DROP:
	case NAT_REFUSE: /* of what comes from outside only */
		return TC_ACT_SHOT;
	case NAT_NONE:
		version = policy_version();
		if (version)
			opening = may_open(&p);
		if (opening == DENIED)
			return TC_ACT_SHOT;
		flow_start(skb, &p, skb->ifindex, version,
			   opening == OPENED_BY_PEER ? FLOW_OPENED_BY_PEER : 0);
		break;
	case NAT_TRANSLATED:
		break;
	}
	return forward(skb, &p, false);
}

/* Packets that reach the pod through the node's stack. */
SEC("tcx/egress")
int to_pod(struct __sk_buff *skb)
{
	/* A packet that the node itself made was never received. Policies never deny those: health
	 * probes must reach what they probe. */
	bool from_node = !skb->ingress_ifindex;
	struct packet p = {};
	__u32 reversed, version;
	enum opening opening = OPENED;
	struct flow *f;
	enum portless how;
	bool translates;

	count(COUNT_POD_INGRESS);
	count_more(COUNT_BYTES_POD_INGRESS, skb->len);
	switch (parse(skb, &p)) {
	case PARSED_PORTS:
		break;
	case PARSED_ADDRESSES:
		fragment_begin(&p); /* of ICMP, say */
		how = portless(skb, &p);
		if (how == PORTLESS_DROP ||
		    (how == PORTLESS_NONE && !from_node && !stateless_permitted(skb, &p)))
			return TC_ACT_SHOT;
		fragment_end(&p, false);
		return TC_ACT_UNSPEC;
	case PARSED_NOT_IP:
		return TC_ACT_UNSPEC;
	case PARSED_MALFORMED:
		if (from_node || !policy_version())
			return TC_ACT_UNSPEC;
		drop(COUNT_DROP_MALFORMED, &p, 0);
		return TC_ACT_SHOT;
	}
	fragment_begin(&p);
	f = flow_find(&p.tuple, &reversed);
	if (!f) {
		version = policy_version();
		if (version && !from_node)
			opening = may_open(&p);
		if (opening == DENIED)
			return TC_ACT_SHOT;
		flow_start(skb, &p, 0, version,
			   (from_node ? FLOW_FROM_NODE : 0) |
			       (opening == OPENED_BY_PEER ? FLOW_OPENED_BY_PEER : 0));
		fragment_end(&p, false);
		return TC_ACT_UNSPEC;
	}
	if (!from_node && !flow_permitted(f, reversed, &p))
		return TC_ACT_SHOT;
	if (from_node && opens(&p) && !(f->flags & FLOW_FROM_NODE))
		f->flags |= FLOW_FROM_NODE;
	translates = f->flags & FLOW_REPLY && flow_translates(f, reversed);
	if (f->flags & FLOW_TRANSLATED)
		flow_touch(f, p.tcp_flags, reversed);
	else
		flow_pass(f, &p, reversed); /* which may end f */
	if (translates && !rewrite(skb, &p, &f->to)) {
		drop(COUNT_DROP_REWRITE, &p, 0);
		return TC_ACT_SHOT;
	}
	fragment_end(&p, false);
	return TC_ACT_UNSPEC;
}
