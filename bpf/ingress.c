/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
//go:build ignore
/* Hands connections to the node's addresses, on ports that the ingress answers, to its listener. */
#include "counters.h"
#include "endpoints.h"

/* Port -> listener. A listener that is closed leaves the map by itself. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 16);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} listeners SEC(".maps");

SEC("sk_lookup")
int steer(struct bpf_sk_lookup *ctx)
{
	__u32 port = ctx->local_port;
	struct address local;
	struct bpf_sock *sk;
	long failed;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (ctx->family == AF_INET) {
		address_from_v4(&local, ctx->local_ip4);
	} else {
		local.w[0] = ctx->local_ip6[0];
		local.w[1] = ctx->local_ip6[1];
		local.w[2] = ctx->local_ip6[2];
		local.w[3] = ctx->local_ip6[3];
	}
	if (!address_is_loopback(&local) && !bpf_map_lookup_elem(&node_addresses, &local))
		return SK_PASS;
	sk = bpf_map_lookup_elem(&listeners, &port);
	if (!sk)
		return SK_PASS;
	failed = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	if (!failed)
		count(COUNT_INGRESS_STEERED);
	return SK_PASS;
}
