/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Services per packet: what sockets did not see, and what comes from outside the node. */
#pragma once
#include "conntrack.h"
#include "counters.h"
#include "endpoints.h"
#include "policy.h"
#include "services.h"

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
__global int nat_choose(const struct packet *p, __u8 scope, struct judgement *j)
{
	struct affinity_key client = {};
	struct flow *forward, *reply;
	const struct node *self;
	const struct backend *b;
	struct service svc;
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
	b = backend_select(&svc, &client, &id);
	if (!b) {
		/* Policy Local must not answer for others; otherwise the stack refuses. */
		if (svc.flags & SERVICE_LOCAL && scope == SCOPE_EXTERNAL)
			return nat_drop(COUNT_DROP_NO_LOCAL, j);
		return NAT_NONE;
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
		/* The backend may be anywhere: its answer has to come back here. A backend in the
		 * node's own namespace answers here anyway, and the stack would refuse a packet
		 * that claims to come from the node. */
		forward->to.saddr = p->v4 ? self->address_v4 : self->address_v6;
		/* A pod elsewhere answers to an address in the pods' ranges by the way that this
		 * packet came, to the node's by whatever way its node has. */
		if (address_is_remote_pod(&b->addr))
			forward->to.saddr = p->v4 ? self->gateway_v4 : self->gateway_v6;
		forward->flags |= FLOW_SOURCE_IS_NODE;
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
	if (!nat_insert(p, forward, &j->reply, forward->flags & FLOW_SOURCE_IS_NODE))
		return nat_drop(COUNT_DROP_NO_SNAT_PORT, j);
	count(COUNT_PACKET_TRANSLATED);
	if (!rewrite(skb, p, &forward->to))
		return nat_drop(COUNT_DROP_REWRITE, j);
	return NAT_TRANSLATED;
}

/* The first packet of a flow: if its destination is a service, it goes to a backend that may have
 * it. */
static __always_inline enum nat nat_open(struct __sk_buff *skb, struct packet *p, __u8 scope)
{
	struct judgement *j = judgement();
	enum nat how;

	if (!j)
		return NAT_DROP;
	how = nat_choose(p, scope, j);
	if (how == NAT_DROP)
		drop(j->reason, p, 0);
	if (how != NAT_TRANSLATED)
		return how;
	/* Policies speak of who asks and who answers, not of an address lent in between. */
	if (j->forward.checked && !permitted(j)) {
		denied(j);
		return NAT_DROP;
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
 * Sends a packet on its way by its (new) destination: straight into a local pod, or by the routing
 * table when from_node says that its source is the node, or up the stack. ingress says whether the
 * hook is one that may enter another namespace.
 */
static __always_inline int forward(struct __sk_buff *skb, struct packet *p, bool from_node)
{
	struct bpf_fib_lookup fib = {};
	struct endpoint *ep;
	long found;

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
	if (found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH)
		return bpf_redirect_neigh(fib.ifindex, 0, 0, 0);
	return TC_ACT_UNSPEC;
}
