/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Both directions of the node's end of a pod's veth. */
#include "nat.h"

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

/* Packets that the pod sends. */
SEC("tcx/ingress")
int from_pod(struct __sk_buff *skb)
{
	struct packet p = {};
	struct endpoint *self;
	bool from_node;
	struct flow *f;
	enum parsed parsed = parse(skb, &p);

	count(COUNT_POD_EGRESS);
	if (parsed == PARSED_NOT_IP)
		return skb->protocol == bpf_htons(ETH_P_ARP) ? TC_ACT_UNSPEC : TC_ACT_SHOT;
	if (parsed == PARSED_MALFORMED) {
		count(COUNT_DROP_MALFORMED);
		return TC_ACT_SHOT;
	}
	self = bpf_map_lookup_elem(&endpoints, &p.tuple.saddr);
	if (!self || self->ifindex != skb->ifindex) {
		if (is_link_local_v6(&p))
			return TC_ACT_UNSPEC;
		count(COUNT_DROP_SPOOFED);
		return TC_ACT_SHOT;
	}
	if (parsed == PARSED_ADDRESSES)
		return forward(skb, &p, false);

	f = flow_find(&p.tuple);
	if (f && !flow_stale(f, &p)) {
		flow_touch(f, p.tcp_flags);
		if (likely(!(f->flags & FLOW_TRANSLATED)))
			return forward(skb, &p, false);
		from_node = f->flags & FLOW_SOURCE_IS_NODE;
		if (!rewrite(skb, &p, &f->to)) {
			count(COUNT_DROP_REWRITE);
			return TC_ACT_SHOT;
		}
		return forward(skb, &p, from_node);
	}
	switch (nat_open(skb, &p, SCOPE_INTERNAL)) {
	case NAT_DROP:
		return TC_ACT_SHOT;
	case NAT_NONE:
		flow_open(&p);
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
	struct packet p = {};
	struct flow *f;

	count(COUNT_POD_INGRESS);
	if (parse(skb, &p) != PARSED_PORTS)
		return TC_ACT_UNSPEC;
	f = flow_find(&p.tuple);
	if (!f) {
		flow_open(&p);
		return TC_ACT_UNSPEC;
	}
	flow_touch(f, p.tcp_flags);
	if ((f->flags & (FLOW_TRANSLATED | FLOW_REPLY)) == (FLOW_TRANSLATED | FLOW_REPLY) &&
	    !rewrite(skb, &p, &f->to)) {
		count(COUNT_DROP_REWRITE);
		return TC_ACT_SHOT;
	}
	return TC_ACT_UNSPEC;
}
