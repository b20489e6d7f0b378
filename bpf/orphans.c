/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
//go:build ignore
/*
 * UDP sockets whose backend has gone. TCP learns from its peer, or from silence; a UDP socket waits
 * for ever, or sends into the void. Two iterators, which run when the agent reads them:
 *
 *   find_orphans     over what sockets were told (peers.h), of all namespaces at once: writes the
 *                    cookie of each network namespace that has an orphan. Usually there is none.
 *   destroy_orphans  over the UDP sockets of the reader's network namespace, each locked: destroys
 *                    orphans, whose next call returns ECONNABORTED, and writes a byte for each.
 *
 * What a socket was told says which backend of which service it was given, so one that talks to a
 * pod directly is never taken for an orphan. A connected socket is one if it was connected to a
 * backend that has gone. One that is not connected gets a living backend with its next message; it
 * is destroyed only if nothing that it was told lives, so that no other conversation of it ends,
 * and if it left its port to the kernel: who binds a port serves others there.
 */
#include "peers.h"
#include "services.h"

#define __core	      __attribute__((preserve_access_index))
#define __ksym	      __attribute__((section(".ksyms")))
#define BIND_PORT_SET 8 /* SOCK_BINDPORT_LOCK of sk_userlocks */

/* Only the members that are read; the loader finds where this kernel has them. */
struct net {
	__u64 net_cookie;
} __core;

typedef struct {
	struct net *net;
} __core possible_net_t;

struct sock_common {
	__be32 skc_daddr;
	__be16 skc_dport;
	unsigned short skc_family;
	possible_net_t skc_net;
	struct address skc_v6_daddr;
} __core;

struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
	unsigned char sk_userlocks : 4;
} __core;

struct udp_sock;
struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
} __core;

/* Contexts of iterators: pointers of 8 bytes each, in this order. */
struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	void *map;
	struct sock *sk;
	struct peers *value;
};

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *sk;
};

static long (*const bpf_seq_write)(struct seq_file *seq, const void *data, __u32 len) = (void *)127;
extern int bpf_sock_destroy(struct sock_common *sock) __ksym;

/* Whether the backend that a socket was given still is what it was. */
static __always_inline bool peer_lives(const struct peer *p)
{
	__u32 id = p->backend_id;
	const struct backend *b = bpf_map_lookup_elem(&backends, &id);

	return b && b->service == p->service && b->port == p->backend_port &&
	       address_equal(&b->addr, &p->backend);
}

/* A bit field: where it is, and how far to shift it, differs between kernels. */
static __always_inline bool binds_port(const struct sock *sk)
{
	enum { BYTE_OFFSET, BYTE_SIZE, EXISTS, SIGNED, LSHIFT, RSHIFT };
	const void *at =
	    (const void *)sk + __builtin_preserve_field_info(sk->sk_userlocks, BYTE_OFFSET);
	__u64 v;

	switch (__builtin_preserve_field_info(sk->sk_userlocks, BYTE_SIZE)) {
	case 1:
		v = *(const __u8 *)at;
		break;
	case 2:
		v = *(const __u16 *)at;
		break;
	case 4:
		v = *(const __u32 *)at;
		break;
	default:
		v = *(const __u64 *)at;
	}
	v <<= __builtin_preserve_field_info(sk->sk_userlocks, LSHIFT);
	v >>= __builtin_preserve_field_info(sk->sk_userlocks, RSHIFT);
	return v & BIND_PORT_SET;
}

static __always_inline bool is_orphan(const struct sock *sk, const struct peers *peers)
{
	__be16 port = sk->__sk_common.skc_dport;
	bool told = false;
	struct address to;

	if (sk->sk_protocol != IPPROTO_UDP)
		return false;
	if (sk->__sk_common.skc_family == AF_INET6)
		to = sk->__sk_common.skc_v6_daddr;
	else
		address_from_v4(&to, sk->__sk_common.skc_daddr);
	for (int i = 0; i < PEERS; i++) {
		const struct peer *p = &peers->peer[i];

		if (!p->frontend_port ||
		    (port && !(p->backend_port == port && address_equal(&p->backend, &to))))
			continue;
		if (peer_lives(p))
			return false;
		told = true;
	}
	return told && (port || !binds_port(sk));
}

SEC("iter/bpf_sk_storage_map")
int find_orphans(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct peers *peers = ctx->value;
	struct sock *sk = ctx->sk;
	__u64 cookie;

	if (!sk || !peers || !is_orphan(sk, peers))
		return 0;
	cookie = sk->__sk_common.skc_net.net->net_cookie;
	bpf_seq_write(ctx->meta->seq, &cookie, sizeof(cookie));
	return 0;
}

SEC("iter/udp")
int destroy_orphans(struct bpf_iter__udp *ctx)
{
	struct sock *sk = (struct sock *)ctx->sk;
	struct peers *peers;
	__u8 one = 1;

	if (!sk)
		return 0;
	peers = bpf_sk_storage_get(&socket_peers, sk, 0, 0);
	if (!peers || !is_orphan(sk, peers))
		return 0;
	/* What it is told next is another life. */
	bpf_sk_storage_delete(&socket_peers, sk);
	if (!bpf_sock_destroy((struct sock_common *)sk))
		bpf_seq_write(ctx->meta->seq, &one, sizeof(one));
	return 0;
}
