/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
//go:build ignore
/* The node's own devices: NodePorts and external addresses, asked from outside the node. */
#include "announce.h"
#include "nat.h"

SEC("tcx/ingress")
int from_outside(struct __sk_buff *skb)
{
	struct packet p = {};
	__u32 reversed;
	bool from_node;
	struct flow *f;

	switch (parse(skb, &p)) {
	case PARSED_PORTS:
		break;
	case PARSED_NOT_IP:
		if (skb->protocol == bpf_htons(ETH_P_ARP))
			return answer_arp(skb);
		return TC_ACT_UNSPEC;
	case PARSED_ADDRESSES:
		if (!p.v4 && p.tuple.proto == IPPROTO_ICMPV6)
			return answer_nd(skb, &p);
		return TC_ACT_UNSPEC;
	default:
		return TC_ACT_UNSPEC; /* the stack knows what to make of it */
	}
	f = flow_find(&p.tuple, &reversed);
	if (f && flow_translates(f, reversed) && !flow_stale(f, &p)) {
		if (!flow_permitted(f, reversed, &p))
			return TC_ACT_SHOT;
		flow_touch(f, p.tcp_flags, reversed);
		from_node = f->flags & FLOW_SOURCE_IS_NODE;
		if (!rewrite(skb, &p, &f->to)) {
			drop(COUNT_DROP_REWRITE, &p, 0);
			return TC_ACT_SHOT;
		}
		return forward(skb, &p, from_node);
	}
	switch (nat_open(skb, &p, SCOPE_EXTERNAL)) {
	case NAT_DROP:
		return TC_ACT_SHOT;
	case NAT_NONE:
		/* The node has no such address, and would send the packet back where it came from.
		 */
		if (announced_on(&p.tuple.daddr, skb->ifindex)) {
			drop(COUNT_DROP_NO_FRONTEND, &p, 0);
			return TC_ACT_SHOT;
		}
		return TC_ACT_UNSPEC;
	case NAT_TRANSLATED:
		break;
	}
	/* To a local pod, to the node itself, or on to another node in the node's name. */
	return forward(skb, &p, !bpf_map_lookup_elem(&node_addresses, &p.tuple.daddr));
}

/* Answers of backends that run in the node's own namespace. */
SEC("tcx/egress")
int to_outside(struct __sk_buff *skb)
{
	struct packet p = {};
	__u32 reversed;
	struct flow *f;

	if (parse(skb, &p) != PARSED_PORTS)
		return TC_ACT_UNSPEC;
	f = flow_find(&p.tuple, &reversed);
	if (!f || !(f->flags & FLOW_REPLY) || !flow_translates(f, reversed))
		return TC_ACT_UNSPEC;
	flow_touch(f, p.tcp_flags, reversed);
	if (!rewrite(skb, &p, &f->to)) {
		drop(COUNT_DROP_REWRITE, &p, 0);
		return TC_ACT_SHOT;
	}
	return TC_ACT_UNSPEC;
}

/* Deletes the flow under a key only if no packet came since the agent read it. */
struct forget {
	struct tuple tuple;
	__u64 last_seen;
};

SEC("syscall")
int forget_flow(struct forget *ctx)
{
	struct tuple t = ctx->tuple;
	struct flow *f = flow_lookup(&t);

	if (!f || f->last_seen != ctx->last_seen)
		return 1;
	if (t.proto == IPPROTO_TCP)
		return bpf_map_delete_elem(&conntrack_tcp, &t) != 0;
	return bpf_map_delete_elem(&conntrack_udp, &t) != 0;
}
