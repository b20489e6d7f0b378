/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Who lives on this node: pods' addresses, and the node's own. */
#pragma once
#include "address.h"

/* A pod on this node. */
struct endpoint {
	__u32 ifindex; /* the node's end of its veth */
	__u8 pod_mac[6];
	__u8 host_mac[6];
	__u32 slot; /* where policy_slots has its sets */
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

/* The addresses of whoever is in a network namespace, by its cookie: pods, and the node itself. */
struct client {
	struct address v4, v6;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u64);
	__type(value, struct client);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} clients SEC(".maps");

/* Source addresses that the node lends to translated packets, by family. */
struct node {
	struct address address_v4; /* the node's */
	struct address address_v6;
	struct address gateway_v4; /* the pods' gateway, on device skep0: for hairpins */
	struct address gateway_v6;
	__u32 mtu; /* of the way to pods of other nodes */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct node);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} node SEC(".maps");

/* Ranges in which an address that nobody has is refused at once. The longest prefix decides. */
enum range {
	RANGE_OPEN = 0,	   /* an exception: the node answers it */
	RANGE_SERVICE = 1, /* only frontends are alive */
	RANGE_PODS = 2,	   /* this node's pods: only endpoints are alive */
	RANGE_CLUSTER = 3, /* pods of all nodes: who is alive elsewhere is not known here */
};

struct range_key {
	__u32 bits; /* of the 128, so 96 more than IPv4 counts */
	struct address addr;
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct range_key);
	__type(value, __u32);
	__uint(max_entries, 256);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} ranges SEC(".maps");

/* Whether nobody has this address, which is no frontend. */
static __always_inline bool address_is_dead(const struct address *a)
{
	struct range_key key = {.bits = 128, .addr = *a};
	__u32 *range = bpf_map_lookup_elem(&ranges, &key);

	if (!range || *range == RANGE_OPEN || *range == RANGE_CLUSTER)
		return false;
	return *range == RANGE_SERVICE || !bpf_map_lookup_elem(&endpoints, a);
}

/* Whether this is a pod's address on another node. */
static __always_inline bool address_is_remote_pod(const struct address *a)
{
	struct range_key key = {.bits = 128, .addr = *a};
	__u32 *range = bpf_map_lookup_elem(&ranges, &key);

	return range && *range == RANGE_CLUSTER;
}

static __always_inline const struct node *this_node(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&node, &zero);
}
