/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
//go:build ignore
/* The node's own devices: NodePorts and external addresses, asked from outside the node. */
#include "announce.h"
#include "portless.h"

/* What another node handed on to a pod of this one, with the frontend to answer for in it. */
__global int dsr_arrive(struct __sk_buff *skb, struct packet *p)
{
	struct judgement *j = judgement();
	struct service_key key = {.scope = SCOPE_EXTERNAL};
	struct service svc;
	struct flow *reply;
	struct tuple back;

	if (!j || !p || !bpf_map_lookup_elem(&endpoints, &p->tuple.daddr))
		return false;
	if (!(p->v4 ? dsr_untag_v4(skb, p, &key.addr, &key.port)
		    : dsr_untag_v6(skb, p, &key.addr, &key.port)))
		return false;
	reply = &j->reply;
	__builtin_memset(reply, 0, sizeof(*reply));
	tuple_reverse(&back, &p->tuple);
	reply->to = back;
	reply->to.saddr = key.addr;
	reply->to.sport = key.port;
	/* Only frontends are answered for; nodes have the same ones. */
	key.proto = p->tuple.proto;
	if (!service_find(&key, &svc)) {
		address_wildcard(&key.addr, &reply->to.saddr);
		if (!is_node_port(key.port) || !service_find(&key, &svc))
			return false;
	}
	reply->flags = FLOW_TRANSLATED | FLOW_REPLY | FLOW_SOURCE_IS_NODE | FLOW_DSR;
	reply->last_seen = bpf_ktime_get_coarse_ns();
	reply->service = svc.id;
	flow_insert(&back, reply, BPF_ANY);
	if (is_new(p))
		report_open(&p->tuple, &reply->to.saddr, reply->to.sport, svc.id, 0);
	return true;
}

/* Whether the packet has room for a frontend before its transport header. */
static __always_inline bool may_be_tagged(const struct packet *p)
{
	return p->l4 >=
	       ETH_HLEN + (p->v4 ? sizeof(struct ipv4_header) + sizeof(struct dsr_option_v4)
				 : sizeof(struct ipv6_header) + sizeof(struct dsr_option_v6));
}

SEC("tcx/ingress")
int from_outside(struct __sk_buff *skb)
{
	struct packet p = {};
	__u32 reversed;
	bool from_node;
	struct flow *f;
	enum portless how;

	switch (parse(skb, &p)) {
	case PARSED_PORTS:
		break;
	case PARSED_NOT_IP:
		if (skb->protocol == bpf_htons(ETH_P_ARP))
			return answer_arp(skb);
		return TC_ACT_UNSPEC;
	case PARSED_ADDRESSES:
		how = portless(skb, &p);
		if (how == PORTLESS_DROP)
			return TC_ACT_SHOT;
		if (how != PORTLESS_NONE)
			return forward(skb, &p, how == PORTLESS_FROM_NODE);
		if (!p.v4 && p.tuple.proto == IPPROTO_ICMPV6)
			return answer_nd(skb, &p);
		if (p.piece == PIECE_LATER && announced_on(&p.tuple.daddr, skb->ifindex)) {
			drop(COUNT_DROP_FRAGMENT, &p, 0);
			return TC_ACT_SHOT;
		}
		return TC_ACT_UNSPEC;
	default:
		return TC_ACT_UNSPEC; /* the stack knows what to make of it */
	}
	fragment_begin(&p);
	if (dsr_protocols && unlikely(may_be_tagged(&p)))
		dsr_arrive(skb, &p);
	f = flow_find(&p.tuple, &reversed);
	if (f && flow_translates(f, reversed) && !flow_stale(f, &p)) {
		if (!flow_permitted(f, reversed, &p))
			return TC_ACT_SHOT;
		flow_touch(f, p.tcp_flags, reversed);
		from_node = f->flags & FLOW_SOURCE_IS_NODE;
		if (dsr_protocols && f->flags & FLOW_DSR && !dsr_tag(skb, &p)) {
			drop(COUNT_DROP_REWRITE, &p, 0);
			return TC_ACT_SHOT;
		}
		if (!rewrite(skb, &p, &f->to)) {
			drop(COUNT_DROP_REWRITE, &p, 0);
			return TC_ACT_SHOT;
		}
		return forward(skb, &p, from_node);
	}
	if (dsr_protocols && f && (f->flags & (FLOW_DSR | FLOW_REPLY)) == (FLOW_DSR | FLOW_REPLY)) {
		/* On to the pod that will answer directly: the stack may know another way back. */
		if (!flow_permitted(f, reversed, &p))
			return TC_ACT_SHOT;
		flow_touch(f, p.tcp_flags, reversed);
		return forward(skb, &p, false);
	}
	switch (nat_open(skb, &p, SCOPE_EXTERNAL)) {
	case NAT_DROP:
		return TC_ACT_SHOT;
	case NAT_NONE:
		/* The node has no such address, and would send the packet back where it came from.
		 */
		if (announced_on(&p.tuple.daddr, skb->ifindex))
			return nat_refuse(skb, &p, COUNT_DROP_NO_FRONTEND);
		return TC_ACT_UNSPEC;
	case NAT_REFUSE:
		return nat_refuse(skb, &p, EVENT_NO_BACKEND);
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

	switch (parse(skb, &p)) {
	case PARSED_PORTS:
		break;
	case PARSED_ADDRESSES:
		return portless(skb, &p) == PORTLESS_DROP ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	default:
		return TC_ACT_UNSPEC;
	}
	fragment_begin(&p);
	f = flow_find(&p.tuple, &reversed);
	if (!f || !(f->flags & FLOW_REPLY) || !flow_translates(f, reversed))
		return TC_ACT_UNSPEC;
	flow_touch(f, p.tcp_flags, reversed);
	if (!rewrite(skb, &p, &f->to)) {
		drop(COUNT_DROP_REWRITE, &p, 0);
		return TC_ACT_SHOT;
	}
	fragment_end(&p, false);
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
	return flow_forget(&t) != 0;
}

/* Flows that the agent took over from maps of another layout, as if programs had noted them. */
struct taken_over {
	__u64 tcp, udp;
};

SEC("syscall")
int count_taken_over(struct taken_over *ctx)
{
	count_exactly(COUNT_FLOW_TCP_ADDED, ctx->tcp);
	count_exactly(COUNT_FLOW_UDP_ADDED, ctx->udp);
	return 0;
}
