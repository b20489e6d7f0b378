/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Who lives on this node: pods' addresses, and the node's own. */
#pragma once
#include "address.h"

/* A pod on this node. */
struct endpoint {
	__u32 ifindex; /* the node's end of its veth */
	__u8 pod_mac[6];
	__u8 host_mac[6];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct address);
	__type(value, struct endpoint);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} endpoints SEC(".maps");

/* The node's own addresses: NodePorts and the ingress answer on these. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct address);
	__type(value, __u32);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} node_addresses SEC(".maps");

/* Source addresses that the node lends to translated packets, by family. */
struct node {
	struct address address_v4; /* the node's */
	struct address address_v6;
	struct address gateway_v4; /* the pods' gateway, on device skep0: for hairpins */
	struct address gateway_v6;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct node);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} node SEC(".maps");

static __always_inline const struct node *this_node(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&node, &zero);
}
