/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
//go:build ignore
/*
 * NodePorts and external addresses whose backends are elsewhere, at the driver: the same flows and
 * the same choices as host.c's, for what can leave at once by a device that XDP can send by. All
 * else goes on to host.c untouched, before anything was noted.
 */
#include "nat.h"

/* Devices that packets can be sent by from here. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 64);
} xdp_devices SEC(".maps");

/* How the packet would leave as to. False when it cannot leave from here. */
static __always_inline bool find_way(struct xdp_md *ctx, const struct packet *p,
				     const struct tuple *to, struct bpf_fib_lookup *fib)
{
	fib->ifindex = ctx->ingress_ifindex;
	fib->l4_protocol = to->proto;
	fib->sport = to->sport;
	fib->dport = to->dport;
	/* With the length, what is too large for the link finds no way, and host.c refuses it. */
	fib->tot_len = bpf_xdp_get_buff_len(ctx) - ETH_HLEN;
	if (p->v4) {
		fib->family = AF_INET;
		fib->src[0] = to->saddr.w[3];
		fib->dst[0] = to->daddr.w[3];
	} else {
		fib->family = AF_INET6;
		__builtin_memcpy(fib->src, &to->saddr, 16);
		__builtin_memcpy(fib->dst, &to->daddr, 16);
	}
	return bpf_fib_lookup(ctx, fib, sizeof(*fib), 0) == BPF_FIB_LKUP_RET_SUCCESS &&
	       bpf_map_lookup_elem(&xdp_devices, &fib->ifindex);
}

/*
 * Whether the checksum covers only the pseudo header, as between machines of one host that leave
 * the rest to a device: nothing tells that to a program at the driver, and host.c knows how to go
 * on. One whole checksum in 65,536 looks so, too, which only costs its packet time.
 */
static __always_inline bool is_unfinished(struct xdp_md *ctx, const struct packet *p)
{
	__u32 at = p->l4 + (p->tuple.proto == IPPROTO_UDP ? UDP_CHECK : TCP_CHECK);
	__be32 rest = bpf_htons(p->tuple.proto);
	__be32 words[9];
	__u64 sum;
	__be16 check;

	__builtin_memcpy(&words[0], &p->tuple.saddr, 32);
	words[8] = rest | (__u32)bpf_htons(bpf_xdp_get_buff_len(ctx) - p->l4) << 16;
	sum = bpf_csum_diff(0, 0, words, sizeof(words), 0);
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff);
	sum = (sum & 0xffff) + (sum >> 16);
	return bpf_xdp_load_bytes(ctx, at, &check, sizeof(check)) || check == (__be16)sum;
}

/* As rewrite of packet.h does. */
static __always_inline bool rewrite_frame(struct xdp_md *ctx, struct packet *p,
					  const struct tuple *to)
{
	__be32 old[9], new[9], addresses[2];
	__u32 at = p->l4 + (p->tuple.proto == IPPROTO_UDP ? UDP_CHECK : TCP_CHECK);
	__be16 check, ports[2] = {to->sport, to->dport};
	__s64 diff;

	__builtin_memcpy(&old[0], &p->tuple.saddr, 32);
	__builtin_memcpy(&new[0], &to->saddr, 32);
	old[8] = p->tuple.sport | (__u32)p->tuple.dport << 16;
	new[8] = to->sport | (__u32)to->dport << 16;
	if (bpf_xdp_load_bytes(ctx, at, &check, sizeof(check)))
		return false;
	if (check || p->tuple.proto != IPPROTO_UDP || !p->v4) {
		check = sum_after(check, bpf_csum_diff(old, 36, new, 36, 0));
		if (!check && p->tuple.proto == IPPROTO_UDP)
			check = 0xffff;
		if (bpf_xdp_store_bytes(ctx, at, &check, sizeof(check)))
			return false;
	}
	if (bpf_xdp_store_bytes(ctx, p->l4, ports, sizeof(ports)))
		return false;
	if (!p->v4)
		return !bpf_xdp_store_bytes(ctx, ETH_HLEN + IPV6_SADDR, new, 32);
	diff = bpf_csum_diff(old, 32, new, 32, 0);
	addresses[0] = to->saddr.w[3];
	addresses[1] = to->daddr.w[3];
	if (bpf_xdp_load_bytes(ctx, ETH_HLEN + IPV4_CHECK, &check, sizeof(check)))
		return false;
	check = sum_after(check, diff);
	return !bpf_xdp_store_bytes(ctx, ETH_HLEN + IPV4_CHECK, &check, sizeof(check)) &&
	       !bpf_xdp_store_bytes(ctx, ETH_HLEN + IPV4_SADDR, addresses, sizeof(addresses));
}

/* Rewrites the packet and sends it. */
__global int send_frame(struct xdp_md *ctx, struct packet *p, const struct tuple *to,
			const struct bpf_fib_lookup *fib)
{
	__u8 macs[12];

	if (!p || !to || !fib)
		return XDP_ABORTED;
	__builtin_memcpy(macs, fib->dmac, 6);
	__builtin_memcpy(macs + 6, fib->smac, 6);
	if (!rewrite_frame(ctx, p, to) || bpf_xdp_store_bytes(ctx, 0, macs, sizeof(macs))) {
		drop(COUNT_DROP_REWRITE, p, 0);
		return XDP_DROP;
	}
	count(COUNT_XDP_FORWARDED);
	if (fib->ifindex == ctx->ingress_ifindex)
		return XDP_TX;
	return bpf_redirect(fib->ifindex, 0);
}

/* Only what is in the node's name, and not for a pod of it. */
static __always_inline bool leaves(__u32 flags, const struct tuple *to)
{
	return (flags & (FLOW_SOURCE_IS_NODE | FLOW_DSR)) == FLOW_SOURCE_IS_NODE &&
	       !bpf_map_lookup_elem(&endpoints, &to->daddr);
}

/* Keeps the flow that nat_choose noted; its stack is no part of the program's. */
__global int keep_flow(const struct packet *p, struct judgement *j)
{
	struct tuple key;

	if (!p || !j)
		return false;
	j->forward.flags |= flow_flags_of(p->tcp_flags, tuple_canonical(&key, &p->tuple));
	return nat_insert(p, &j->forward, &j->reply, true);
}

/* A packet without a flow: if it is for a backend elsewhere, it opens one. */
static __always_inline int open_flow(struct xdp_md *ctx, struct packet *p,
				     struct bpf_fib_lookup *fib)
{
	struct judgement *j = judgement();

	if (!j || nat_choose(p, SCOPE_EXTERNAL, dsr_of(p->tuple.proto), j) != NAT_TRANSLATED ||
	    !leaves(j->forward.flags, &j->forward.to) || !find_way(ctx, p, &j->forward.to, fib) ||
	    (j->forward.checked && !permitted(j)) || !keep_flow(p, j))
		return XDP_PASS; /* host.c chooses, and drops, and tells of it */
	count(COUNT_PACKET_TRANSLATED);
	if (is_new(p))
		report_open(&j->c, &j->reply.to.saddr, j->reply.to.sport, j->forward.service, 0);
	return send_frame(ctx, p, &j->forward.to, fib);
}

/*
 * Not for packets in several buffers ("xdp.frags"): before the stack, a program for these has the
 * packet copied, and Linux 6.18 then runs no tcx program on the copy.
 */
SEC("xdp")
int at_driver(struct xdp_md *ctx)
{
	struct bpf_fib_lookup fib = {};
	struct packet p = {};
	__be16 protocol;
	__u32 reversed;
	struct flow *f;

	if (bpf_xdp_load_bytes(ctx, ETH_HLEN - 2, &protocol, sizeof(protocol)) ||
	    parse_with(ctx, bpf_xdp_load_bytes, protocol, bpf_xdp_get_buff_len(ctx), &p) !=
		PARSED_PORTS ||
	    p.piece != PIECE_WHOLE || is_unfinished(ctx, &p))
		return XDP_PASS;
	f = flow_find(&p.tuple, &reversed);
	if (!f || !flow_translates(f, reversed) || flow_stale(f, &p))
		return open_flow(ctx, &p, &fib);
	if (!leaves(f->flags, &f->to) || !find_way(ctx, &p, &f->to, &fib))
		return XDP_PASS;
	if (!flow_permitted(f, reversed, &p))
		return XDP_DROP;
	flow_touch(f, p.tcp_flags, reversed);
	return send_frame(ctx, &p, &f->to, &fib);
}
