/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Services per packet: what sockets did not see, and what comes from outside the node. */
#pragma once
#include "conntrack.h"
#include "counters.h"
#include "dsr.h"
#include "endpoints.h"
#include "policy.h"
#include "services.h"
#include "stateless.h"

/*
 * Source ports the node lends: below the range of the kernel's own ephemeral ports and below the
 * NodePorts, so that they never meet a connection that the node itself opens.
 */
#define SNAT_PORT_FIRST 1024
#define SNAT_PORTS	(30000 - SNAT_PORT_FIRST)
#define SNAT_TRIES	16

enum nat {
	NAT_NONE,	/* not a service, or one without backends: the stack decides */
	NAT_TRANSLATED, /* the packet was rewritten */
	NAT_DROP,
	NAT_REFUSE, /* a service without backends, at an address that the node does not have */
};

/* nat_open tells of it: the verifier bounds the stack of a whole chain of calls. */
static __always_inline enum nat nat_drop(enum counter reason, struct judgement *j)
{
	j->reason = reason;
	return NAT_DROP;
}

static __always_inline bool find_frontend(const struct packet *p, __u8 scope, struct service *svc)
{
	struct service_key key = {.port = p->tuple.dport, .proto = p->tuple.proto, .scope = scope};

	key.addr = p->tuple.daddr;
	if (service_find(&key, svc))
		return true;
	if (!is_node_port(key.port) || !bpf_map_lookup_elem(&node_addresses, &p->tuple.daddr))
		return false;
	address_wildcard(&key.addr, &p->tuple.daddr);
	return service_find(&key, svc);
}

/* Inserts both directions, with a source port that is free towards the backend when lend is set. */
static __always_inline bool nat_insert(const struct packet *p, struct flow *forward,
				       struct flow *reply, bool lend)
{
	__u32 start = bpf_get_prandom_u32();
	struct tuple back;

	tuple_reverse(&reply->to, &p->tuple);
	tuple_reverse(&back, &forward->to);
	if (!lend) {
		flow_insert(&back, reply, BPF_ANY);
		flow_insert(&p->tuple, forward, BPF_ANY);
		return true;
	}
	for (int i = 0; i < SNAT_TRIES; i++) {
		forward->to.sport = bpf_htons(SNAT_PORT_FIRST + (start + i * 1009) % SNAT_PORTS);
		back.dport = forward->to.sport;
		if (flow_insert(&back, reply, BPF_NOEXIST) == 0) {
			flow_insert(&p->tuple, forward, BPF_ANY);
			return true;
		}
	}
	return false;
}

/* If the packet's destination is a service, picks a backend and notes both sides of the flow in j.
 */
__global int nat_choose(const struct packet *p, __u8 scope, bool may_dsr, struct judgement *j)
{
	struct affinity_key client = {};
	struct flow *forward, *reply;
	const struct node *self;
	const struct backend *b;
	struct service svc;
	bool remote;
	__u32 id = 0;

	if (!p || !j)
		return NAT_NONE;
	forward = &j->forward;
	reply = &j->reply;
	if (!find_frontend(p, scope, &svc))
		return NAT_NONE;
	if (!service_admits(&svc, &p->tuple.saddr))
		return nat_drop(COUNT_DROP_SOURCE_RANGE, j);
	client.client = p->tuple.saddr;
	client.service = svc.id;
	b = backend_select(&svc, &client, p->tuple.sport | (__u32)p->tuple.dport << 16, &id);
	if (!b) {
		/* Policy Local must not answer for others; otherwise the stack refuses. */
		if (svc.flags & SERVICE_LOCAL && scope == SCOPE_EXTERNAL)
			return nat_drop(COUNT_DROP_NO_LOCAL, j);
		return scope == SCOPE_EXTERNAL &&
			       !bpf_map_lookup_elem(&node_addresses, &p->tuple.daddr)
			   ? NAT_REFUSE
			   : NAT_NONE;
	}
	self = this_node();
	if (!self)
		return NAT_NONE;

	__builtin_memset(forward, 0, sizeof(*forward));
	__builtin_memset(reply, 0, sizeof(*reply));
	j->c = p->tuple;
	j->c.daddr = b->addr;
	j->c.dport = b->port;
	forward->to = j->c;
	forward->flags = FLOW_TRANSLATED;
	if (scope == SCOPE_EXTERNAL && !(svc.flags & SERVICE_LOCAL) &&
	    !bpf_map_lookup_elem(&node_addresses, &b->addr)) {
		remote = address_is_remote_pod(&b->addr);
		/* The backend may be anywhere: its answer has to come back here. A backend in the
		 * node's own namespace answers here anyway, and the stack would refuse a packet
		 * that claims to come from the node. */
		forward->flags |= FLOW_SOURCE_IS_NODE;
		forward->to.saddr = p->v4 ? self->address_v4 : self->address_v6;
		/* A pod elsewhere answers to an address in the pods' ranges by the way that this
		 * packet came, to the node's by whatever way its node has. */
		if (remote)
			forward->to.saddr = p->v4 ? self->gateway_v4 : self->gateway_v6;
		/* Or straight to the client, unless that is a pod, whose node expects no such
		 * answer from the tunnel. */
		if (remote && may_dsr && !address_is_remote_pod(&p->tuple.saddr)) {
			forward->to.saddr = p->tuple.saddr;
			forward->flags |= FLOW_DSR;
		}
	} else if (address_equal(&b->addr, &p->tuple.saddr)) {
		/* Hairpin: a pod drops packets that come from itself. */
		forward->to.saddr = p->v4 ? self->gateway_v4 : self->gateway_v6;
		forward->flags |= FLOW_SOURCE_IS_NODE;
	}
	reply->flags = FLOW_TRANSLATED | FLOW_REPLY;
	/* Answers in the name of the node's address cannot pass the stack as forwarded packets, and
	 * those in a load balancer's would not where the reverse path is checked. */
	if (scope == SCOPE_EXTERNAL || bpf_map_lookup_elem(&node_addresses, &p->tuple.daddr))
		reply->flags |= FLOW_SOURCE_IS_NODE;
	forward->last_seen = reply->last_seen = bpf_ktime_get_coarse_ns();
	forward->service = reply->service = svc.id;
	forward->backend = reply->backend = id;
	forward->checked = reply->checked = policy_version();
	return NAT_TRANSLATED;
}

/* Opens the flow that nat_choose noted, and rewrites its first packet. */
__global int nat_translate(struct __sk_buff *skb, struct packet *p, struct judgement *j)
{
	struct flow *forward;
	struct tuple key;

	if (!p || !j)
		return NAT_NONE;
	forward = &j->forward;
	forward->flags |= flow_flags_of(p->tcp_flags, tuple_canonical(&key, &p->tuple));
	/* No answer will come by here that tells that the connection is established. */
	if (forward->flags & FLOW_DSR)
		forward->flags |= FLOW_SEEN | FLOW_SEEN_BACK;
	if (!nat_insert(p, forward, &j->reply,
			(forward->flags & (FLOW_SOURCE_IS_NODE | FLOW_DSR)) == FLOW_SOURCE_IS_NODE))
		return nat_drop(COUNT_DROP_NO_SNAT_PORT, j);
	count(COUNT_PACKET_TRANSLATED);
	if (!rewrite(skb, p, &forward->to))
		return nat_drop(COUNT_DROP_REWRITE, j);
	return NAT_TRANSLATED;
}

/*
 * Has the stack refuse a packet to an address that the node does not have but answers for: it goes
 * to the node's own port 0, where nobody can listen, and the reset or the ICMP error is translated
 * back like every other answer.
 */
__global int nat_refuse(struct __sk_buff *skb, struct packet *p, __u32 reason)
{
	struct judgement *j = judgement();
	const struct node *self = this_node();

	if (!j || !self || !p)
		return TC_ACT_SHOT;
	j->c = p->tuple;
	__builtin_memset(&j->forward, 0, sizeof(j->forward));
	__builtin_memset(&j->reply, 0, sizeof(j->reply));
	j->forward.to = p->tuple;
	j->forward.to.daddr = p->v4 ? self->address_v4 : self->address_v6;
	j->forward.to.dport = 0;
	j->forward.flags = FLOW_TRANSLATED;
	j->reply.flags = FLOW_TRANSLATED | FLOW_REPLY | FLOW_SOURCE_IS_NODE;
	j->forward.last_seen = j->reply.last_seen = bpf_ktime_get_coarse_ns();
	j->forward.checked = j->reply.checked = policy_version();
	if (reason < COUNT_MAX)
		count(reason);
	report_drop(&j->c, reason, 0, 0, 0);
	/* What belongs to a connection that nobody knows is no question, and gets no answer. */
	if (!is_new(p) || nat_translate(skb, p, j) != NAT_TRANSLATED)
		return TC_ACT_SHOT;
	fragment_end(p, false);
	return TC_ACT_UNSPEC;
}

/* The first packet of a flow: if its destination is a service, it goes to a backend that may have
 * it. */
static __always_inline enum nat nat_open(struct __sk_buff *skb, struct packet *p, __u8 scope)
{
	struct judgement *j = judgement();
	enum nat how;

	if (!j)
		return NAT_DROP;
	how = nat_choose(p, scope,
			 scope == SCOPE_EXTERNAL && dsr_of(p->tuple.proto) && dsr_fits(skb), j);
	if (how == NAT_DROP)
		drop(j->reason, p, 0);
	if (how != NAT_TRANSLATED)
		return how;
	/* Policies speak of who asks and who answers, not of an address lent in between. */
	if (j->forward.checked && !permitted(j)) {
		denied(j);
		return NAT_DROP;
	}
	if (scope == SCOPE_EXTERNAL && dsr_protocols) {
		/* While its destination still is the frontend. The flow's key stays that. */
		if (j->forward.flags & FLOW_DSR && !dsr_tag(skb, p)) {
			drop(COUNT_DROP_REWRITE, p, 0);
			return NAT_DROP;
		}
	}
	how = nat_translate(skb, p, j);
	if (how == NAT_DROP)
		drop(j->reason, p, 0);
	else if (is_new(p)) /* what was asked is where the answer comes from */
		report_open(&j->c, &j->reply.to.saddr, j->reply.to.sport, j->forward.service, 0);
	return how;
}

/* Whether the flow's backend is gone: then a new connection must not follow it there. */
static __always_inline bool flow_stale(const struct flow *f, const struct packet *p)
{
	__u32 id = f->backend;

	if (f->flags & FLOW_REPLY)
		return false;
	if (p->tuple.proto == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return false;
	return !bpf_map_lookup_elem(&backends, &id);
}

/*
 * Answers to packets that the stack was handed because they were too large, and what those become:
 * the ICMP error that it makes quotes such a packet.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct tuple);
	__type(value, struct tuple);
	__uint(max_entries, 1024);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} handed_up SEC(".maps");

/*
 * A translated packet in the name of the node is too large for its next link. The stack knows how
 * to refuse it, but would refuse it for its source first: so it gets its true source back, and the
 * note by which portless.h translates the error for that sender. A sender that allows fragments is
 * told, too, and makes them itself: those made here would leave in its own name.
 */
__global int too_big(struct __sk_buff *skb, struct packet *p)
{
	struct judgement *j = judgement();
	struct tuple *sent, *back;
	__be16 old, new;
	__u32 reversed;
	struct flow *f;

	if (!j || !p)
		return TC_ACT_SHOT;
	sent = &j->forward.to;
	back = &j->reply.to;
	tuple_reverse(back, &p->tuple);
	f = p->piece == PIECE_LATER ? 0 : flow_find(back, &reversed);
	if (!f || !flow_translates(f, reversed)) {
		drop(COUNT_DROP_TOO_BIG, p, 0);
		return TC_ACT_SHOT;
	}
	*sent = p->tuple;
	sent->saddr = f->to.daddr;
	sent->sport = f->to.dport;
	tuple_reverse(back, sent);
	j->c = f->to;
	bpf_map_update_elem(&handed_up, back, &j->c, BPF_ANY);
	if (!rewrite(skb, p, sent)) {
		drop(COUNT_DROP_REWRITE, p, 0);
		return TC_ACT_SHOT;
	}
	fragment_end(p, false); /* the stack may want to see the whole datagram */
	if (p->v4) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN + IPV4_FRAGMENT, &old, sizeof(old)))
			return TC_ACT_SHOT;
		new = old | bpf_htons(IPV4_DF);
		if (bpf_l3_csum_replace(skb, ETH_HLEN + IPV4_CHECK, old, new, sizeof(new)) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + IPV4_FRAGMENT, &new, sizeof(new), 0))
			return TC_ACT_SHOT;
	}
	count(COUNT_TOO_BIG);
	return TC_ACT_UNSPEC;
}

/*
 * Sends a packet on its way by its (new) destination: straight into a local pod, or by the routing
 * table when from_node says that its source is the node, or up the stack.
 */
static __always_inline int forward(struct __sk_buff *skb, struct packet *p, bool from_node)
{
	struct bpf_fib_lookup fib = {};
	struct endpoint *ep;
	__u32 mtu = 0;
	long found;

	fragment_end(p, from_node);
	ep = bpf_map_lookup_elem(&endpoints, &p->tuple.daddr);
	if (ep && ep->ifindex) {
		count(COUNT_POD_TO_POD);
		return bpf_redirect_peer(ep->ifindex, 0);
	}
	if (!from_node)
		return TC_ACT_UNSPEC;
	fib.ifindex = skb->ifindex;
	fib.l4_protocol = p->tuple.proto;
	fib.sport = p->tuple.sport;
	fib.dport = p->tuple.dport;
	if (p->v4) {
		fib.family = AF_INET;
		fib.src[0] = p->tuple.saddr.w[3];
		fib.dst[0] = p->tuple.daddr.w[3];
	} else {
		fib.family = AF_INET6;
		__builtin_memcpy(fib.src, &p->tuple.saddr, 16);
		__builtin_memcpy(fib.dst, &p->tuple.daddr, 16);
	}
	found = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	/* The look-up allows for a VLAN tag; only this is exact. */
	if (found == BPF_FIB_LKUP_RET_FRAG_NEEDED ||
	    ((found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH) &&
	     bpf_check_mtu(skb, fib.ifindex, &mtu, 0, BPF_MTU_CHK_SEGS) > 0))
		return too_big(skb, p);
	if (found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH)
		return bpf_redirect_neigh(fib.ifindex, 0, 0, 0);
	return TC_ACT_UNSPEC;
}
