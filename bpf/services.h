/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Services: frontend -> backend set -> slot -> backend.
 *
 * The agent writes a changed set as a new generation of slots, then swaps one word of each
 * frontend (generation and count together), waits until every program that read the old word has
 * ended (an RCU grace period), and only then deletes the old generation. A reader therefore sees
 * the old set or the new one, never a mixture.
 */
#pragma once
#include "address.h"

enum scope {
	SCOPE_INTERNAL = 0, /* asked from this node or its pods */
	SCOPE_EXTERNAL = 1, /* arrived from outside the node */
};

struct service_key {
	struct address addr; /* all zero (or ::ffff:0.0.0.0) for a NodePort */
	__be16 port;
	__u8 proto;
	__u8 scope;
};

enum service_flags {
	SERVICE_AFFINITY = 1 << 0, /* session affinity ClientIP */
	SERVICE_LOCAL = 1 << 1,	   /* traffic policy Local: only backends of this node */
	SERVICE_RANGES = 1 << 2,   /* only for clients in the set's source ranges */
	SERVICE_MAGLEV = 1 << 3,   /* packets choose by the generation's consistent table */
};

/*
 * The kernel may recycle a replaced hash element while a program still reads it. A copy of the
 * key, first in the value and thus written first, lets the reader tell: it reads the other fields
 * first and the copy last.
 */
struct service {
	struct service_key key;
	__u32 id;	  /* of the backend set */
	__u64 generation; /* low half: generation, high half: number of slots; swapped as one */
	__u32 affinity_seconds;
	__u32 flags;
};

struct slot_key {
	__u32 service;
	__u32 generation;
	__u32 slot;
};

/*
 * A consistent table (Maglev, NSDI 2016), in blocks: which backend each part of the space of hashes
 * belongs to. Its size follows from the number of slots, so that one word swaps both.
 */
#define TABLE_BLOCK 64

struct table_block {
	__u32 backend[TABLE_BLOCK];
};

struct backend {
	struct address addr;
	__be16 port;
	__u8 proto;
	__u8 state; /* of enum backend_state */
	__u32 service;
};

enum backend_state {
	BACKEND_ACTIVE = 0,
	BACKEND_RETIRED = 1, /* keeps what it has, gets nothing new */
};

/* Who a client is: its address, or the cookie of a network namespace that nobody knows. */
struct affinity_key {
	struct address client;
	__u32 service;
	__u32 by_netns;
};

/* Clients that a generation of a backend set is for. */
struct source_range_key {
	__u32 bits; /* of all that follows, so 160 more than IPv4 counts */
	__u32 service;
	__u32 generation;
	struct address addr;
};

#define SOURCE_RANGE_BITS 192

struct affinity {
	__u64 last_used; /* ns, coarse monotonic */
	__u32 backend;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct service_key);
	__type(value, struct service);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct slot_key);
	__type(value, __u32);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} slots SEC(".maps");

/* The key's slot is the number of a block. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct slot_key);
	__type(value, struct table_block);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} tables SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, struct backend);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} backends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
	__uint(max_entries, 16384);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} affinity SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct source_range_key);
	__type(value, __u32);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} source_ranges SEC(".maps");

/* A bit for each port (host byte order) that some frontend has on the node's addresses: what goes
 * to any other of the node's ports costs no second look-up. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1024);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} node_ports SEC(".maps");

/* Whether a frontend may be stored under the unspecified address and this port. */
static __always_inline bool is_node_port(__be16 port)
{
	__u16 p = bpf_ntohs(port);
	__u32 word = p >> 6;
	__u64 *bits = bpf_map_lookup_elem(&node_ports, &word);

	return bits && READ_ONCE(*bits) & 1ULL << (p & 63);
}

static __always_inline bool service_key_equal(const struct service_key *a,
					      const struct service_key *b)
{
	return address_equal(&a->addr, &b->addr) && a->port == b->port && a->proto == b->proto &&
	       a->scope == b->scope;
}

/* Copies the frontend at key to out. False when there is none. */
static __always_inline bool service_find(const struct service_key *key, struct service *out)
{
	struct service *s = bpf_map_lookup_elem(&services, key);

	if (!s)
		return false;
	out->id = READ_ONCE(s->id);
	out->generation = READ_ONCE(s->generation);
	out->affinity_seconds = READ_ONCE(s->affinity_seconds);
	out->flags = READ_ONCE(s->flags);
	barrier();
	if (likely(service_key_equal(&s->key, key)))
		return true;
	/* Recycled under us: the frontend was replaced a moment ago, so ask again. */
	s = bpf_map_lookup_elem(&services, key);
	if (!s)
		return false;
	out->id = READ_ONCE(s->id);
	out->generation = READ_ONCE(s->generation);
	out->affinity_seconds = READ_ONCE(s->affinity_seconds);
	out->flags = READ_ONCE(s->flags);
	barrier();
	return service_key_equal(&s->key, key);
}

static __always_inline __u32 service_count(const struct service *s)
{
	return s->generation >> 32;
}

/* Whether a client may use the frontend that s was found under. */
static __always_inline bool service_admits(const struct service *s, const struct address *client)
{
	struct source_range_key key = {
	    .bits = SOURCE_RANGE_BITS,
	    .service = s->id,
	    .generation = (__u32)s->generation,
	    .addr = *client,
	};

	return !(s->flags & SERVICE_RANGES) || bpf_map_lookup_elem(&source_ranges, &key);
}

/* The backend with this id if it still is one of the service's. */
static __always_inline const struct backend *backend_of(const struct service *s, __u32 id)
{
	struct backend *b = bpf_map_lookup_elem(&backends, &id);

	if (!b || b->service != s->id || b->state != BACKEND_ACTIVE)
		return 0;
	return b;
}

/* Primes, each at least 100 times the backends (2 times, for the very many); 0: no table. */
static __always_inline __u32 table_size(__u32 backends)
{
	if (backends < 2 || backends > 32768)
		return 0;
	return backends <= 16 ? 2039 : backends <= 128 ? 16381 : 65537;
}

static __always_inline __u64 hash_mix(__u64 x)
{
	x = (x ^ x >> 32) * 0xd6e8feb86659fd93ULL;
	x = (x ^ x >> 32) * 0xd6e8feb86659fd93ULL;
	return x ^ x >> 32;
}

/* The same on every node, so that any of them sends a connection to the same backend. */
static __always_inline __u32 client_hash(const struct address *client, __u32 ports)
{
	__u64 h = hash_mix((__u64)client->w[1] << 32 | client->w[0]);

	h = hash_mix(h ^ ((__u64)client->w[3] << 32 | client->w[2]));
	return hash_mix(h ^ ports) >> 32;
}

/* Picks by the table. Null when there is none, or it is being replaced. */
static __always_inline const struct backend *backend_consistent(const struct service *s, __u32 hash,
								__u32 *id)
{
	struct slot_key key = {.service = s->id, .generation = (__u32)s->generation};
	__u32 at = (__u64)hash * table_size(service_count(s)) >> 32;
	struct table_block *block;

	key.slot = at / TABLE_BLOCK;
	block = bpf_map_lookup_elem(&tables, &key);
	if (!block)
		return 0;
	*id = block->backend[at % TABLE_BLOCK];
	return bpf_map_lookup_elem(&backends, id);
}

/* Picks at random. Null when the service has no backend. */
static __always_inline const struct backend *backend_random(const struct service *s, __u32 *id)
{
	struct slot_key key = {.service = s->id, .generation = (__u32)s->generation};
	__u32 n = service_count(s), *slot;

	if (!n)
		return 0;
	key.slot = bpf_get_prandom_u32() % n;
	slot = bpf_map_lookup_elem(&slots, &key);
	if (!slot)
		return 0;
	*id = *slot;
	return bpf_map_lookup_elem(&backends, id);
}

/* Picks anew. ports are the client's and the service's, or 0 where they are not known or not to
 * count. */
static __always_inline const struct backend *
backend_pick(const struct service *s, const struct address *client, __u32 ports, __u32 *id)
{
	const struct backend *b;

	if (s->flags & SERVICE_MAGLEV) {
		b = backend_consistent(s, client_hash(client, ports), id);
		if (b)
			return b;
	}
	return backend_random(s, id);
}

/*
 * Picks for a client, honouring session affinity. A socket has no port yet, and picks at random; of
 * one client with session affinity only the address counts, so that all nodes agree. Null when the
 * service has no backend.
 */
static __always_inline const struct backend *
backend_select(const struct service *s, const struct affinity_key *client, __u32 ports, __u32 *id)
{
	struct affinity fresh = {};
	const struct backend *b;
	struct affinity *known;
	__u64 now;

	if (likely(!(s->flags & SERVICE_AFFINITY))) {
		if (!ports)
			return backend_random(s, id);
		return backend_pick(s, &client->client, ports, id);
	}

	now = bpf_ktime_get_coarse_ns();
	known = bpf_map_lookup_elem(&affinity, client);
	if (known && now - known->last_used < (__u64)s->affinity_seconds * 1000000000ULL) {
		*id = known->backend;
		b = backend_of(s, *id);
		if (b) {
			known->last_used = now;
			return b;
		}
	}
	b = backend_pick(s, &client->client, 0, id);
	if (!b)
		return 0;
	fresh.last_used = now;
	fresh.backend = *id;
	bpf_map_update_elem(&affinity, client, &fresh, BPF_ANY);
	return b;
}
