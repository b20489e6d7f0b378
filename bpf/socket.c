/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
//go:build ignore
/*
 * Services at the socket: a connection to a service becomes, before its first packet, a connection
 * to one of its backends, so that its packets cost nothing. What the socket was told is kept in the
 * socket's own storage for the way back (recvmsg, getpeername), and dies with the socket.
 */
#include "counters.h"
#include "endpoints.h"
#include "flows.h"
#include "peers.h"
#include "services.h"

/* Which namespace is the node's: only there does a loopback address mean the node. */
const volatile __u64 node_netns_cookie = 0;

static __always_inline bool is_node_address(struct bpf_sock_addr *ctx, const struct address *a)
{
	if (address_is_loopback(a))
		return bpf_get_netns_cookie(ctx) == node_netns_cookie;
	return bpf_map_lookup_elem(&node_addresses, a) != 0;
}

static __always_inline bool find(struct bpf_sock_addr *ctx, const struct address *addr, __be16 port,
				 struct service *svc)
{
	struct service_key key = {.addr = *addr, .port = port, .proto = IPPROTO_TCP};

	if (ctx->protocol == IPPROTO_UDP)
		key.proto = IPPROTO_UDP;
	if (service_find(&key, svc)) {
		/* A host port on the node's loopback address is not one on a pod's. */
		return !address_is_loopback(addr) || is_node_address(ctx, addr);
	}
	if (!is_node_port(port) || !is_node_address(ctx, addr))
		return false;
	address_wildcard(&key.addr, addr);
	return service_find(&key, svc);
}

/* The backend that this UDP socket already uses for the frontend, if it is still alive. */
static __always_inline const struct backend *sticky(struct peers *peers, const struct service *svc,
						    const struct address *addr, __be16 port)
{
	for (int i = 0; i < PEERS; i++) {
		struct peer *p = &peers->peer[i];

		if (p->frontend_port == port && p->service == svc->id &&
		    address_equal(&p->frontend, addr))
			return backend_of(svc, p->backend_id);
	}
	return 0;
}

static __always_inline void remember(struct peers *peers, const struct service *svc,
				     const struct address *addr, __be16 port,
				     const struct backend *b, __u32 id)
{
	__u32 at = peers->next % PEERS;
	struct peer *p;

	/* A frontend has one entry: its newest backend replaces the one that went away. */
	for (int i = 0; i < PEERS; i++) {
		p = &peers->peer[i];
		if (p->frontend_port == port && address_equal(&p->frontend, addr))
			at = i;
	}
	if (at == peers->next % PEERS)
		peers->next = at + 1;
	p = &peers->peer[at & (PEERS - 1)];
	p->frontend = *addr;
	p->frontend_port = port;
	p->backend = b->addr;
	p->backend_port = b->port;
	p->backend_id = id;
	p->service = svc->id;
}

/*
 * Who asks, as the packets' source address would say. What is in a namespace that skep does not
 * know is told apart by the namespace, and false is returned.
 */
static __always_inline bool client_of(struct bpf_sock_addr *ctx, const struct address *to,
				      struct affinity_key *client)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	const struct client *c = bpf_map_lookup_elem(&clients, &cookie);

	if (c) {
		client->client = address_is_v4(to) ? c->v4 : c->v6;
		return true;
	}
	client->client.w[0] = cookie;
	client->client.w[1] = cookie >> 32;
	client->by_netns = 1;
	return false;
}

enum verdict { UNTOUCHED, TRANSLATED, REFUSED, FORBIDDEN, DEAD };

/* Replaces addr and port, a frontend, by a backend's; or says which service refuses. */
static __always_inline enum verdict translate(struct bpf_sock_addr *ctx, struct address *addr,
					      __be16 *port, __u32 *service)
{
	struct affinity_key client = {};
	const struct backend *b = 0;
	struct peers *peers;
	struct service svc;
	__u32 id = 0;
	bool known;

	if (!find(ctx, addr, *port, &svc))
		return address_is_dead(addr) ? DEAD : UNTOUCHED;
	if (unlikely(svc.flags & (SERVICE_AFFINITY | SERVICE_RANGES))) {
		client.service = svc.id;
		known = client_of(ctx, addr, &client);
		if (svc.flags & SERVICE_RANGES &&
		    !(known && service_admits(&svc, &client.client))) {
			*service = svc.id;
			return FORBIDDEN;
		}
	}
	peers = bpf_sk_storage_get(&socket_peers, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (ctx->protocol == IPPROTO_UDP && peers) {
		b = sticky(peers, &svc, addr, *port);
		if (b) {
			*addr = b->addr;
			*port = b->port;
			return TRANSLATED;
		}
	}
	b = backend_select(&svc, &client, 0, &id);
	if (!b) {
		*service = svc.id;
		return REFUSED;
	}
	if (peers)
		remember(peers, &svc, addr, *port, b, id);
	*addr = b->addr;
	*port = b->port;
	return TRANSLATED;
}

/* The way back: replaces addr and port, if they are a backend this socket was sent to. */
static __always_inline bool untranslate(struct bpf_sock_addr *ctx, struct address *addr,
					__be16 *port)
{
	struct peers *peers = bpf_sk_storage_get(&socket_peers, ctx->sk, 0, 0);

	if (!peers)
		return false;
	for (int i = 0; i < PEERS; i++) {
		struct peer *p = &peers->peer[i];

		if (p->backend_port == *port && *port && address_equal(&p->backend, addr)) {
			*addr = p->frontend;
			*port = p->frontend_port;
			return true;
		}
	}
	return false;
}

static __always_inline void load_v6(struct bpf_sock_addr *ctx, struct address *a)
{
	a->w[0] = ctx->user_ip6[0];
	a->w[1] = ctx->user_ip6[1];
	a->w[2] = ctx->user_ip6[2];
	a->w[3] = ctx->user_ip6[3];
}

static __always_inline void store_v6(struct bpf_sock_addr *ctx, const struct address *a)
{
	ctx->user_ip6[0] = a->w[0];
	ctx->user_ip6[1] = a->w[1];
	ctx->user_ip6[2] = a->w[2];
	ctx->user_ip6[3] = a->w[3];
}

static __always_inline bool has_ports(struct bpf_sock_addr *ctx)
{
	return ctx->protocol == IPPROTO_TCP || ctx->protocol == IPPROTO_UDP ||
	       ctx->protocol == IPPROTO_MPTCP;
}

/* Tells of a request that was refused: nobody has the address, or no backend of the service. */
__global int report_refused(struct bpf_sock_addr *ctx, const struct address *a, __be16 port,
			    __u32 reason, __u32 service)
{
	struct flow_event *e;

	if (!a)
		return 0;
	e = event_begin(EVENT_DROPPED, drop_events_per_second);
	if (!e)
		return 0;
	e->reason = reason;
	e->connection.daddr = *a;
	e->connection.dport = port;
	e->connection.proto = ctx->protocol == IPPROTO_UDP ? IPPROTO_UDP : IPPROTO_TCP;
	e->frontend = *a;
	e->frontend_port = port;
	e->service = service;
	e->netns = bpf_get_netns_cookie(ctx);
	event_end(e);
	return 0;
}

/* Returns what the hook returns: 0 refuses with the errno set here. */
static __always_inline int to_backend(struct bpf_sock_addr *ctx, bool v6, bool message)
{
	__be16 port = ctx->user_port;
	struct address addr;
	__u32 service = 0;

	if (!has_ports(ctx))
		return 1;
	if (v6)
		load_v6(ctx, &addr);
	else
		address_from_v4(&addr, ctx->user_ip4);
	switch (translate(ctx, &addr, &port, &service)) {
	case DEAD:
		/* A datagram socket is also connected just to learn which address it would send
		 * from, to a port that need not exist: what it then sends is refused. */
		if (message || ctx->protocol != IPPROTO_UDP) {
			/* The routing table refuses it, too, but its ICMP is rate-limited: clients
			 * would wait. */
			count(message ? COUNT_SENDMSG_REFUSED : COUNT_CONNECT_REFUSED);
			report_refused(ctx, &addr, port, EVENT_NO_ADDRESS, 0);
			bpf_set_retval(-EHOSTUNREACH);
			return 0;
		}
		/* fallthrough */
	case UNTOUCHED:
		/* A socket that connects anew must not answer with the name of an earlier service.
		 */
		if (!message)
			bpf_sk_storage_delete(&socket_peers, ctx->sk);
		return 1;
	case REFUSED:
		count(message ? COUNT_SENDMSG_REFUSED : COUNT_CONNECT_REFUSED);
		report_refused(ctx, &addr, port, EVENT_NO_BACKEND, service);
		bpf_set_retval(-ECONNREFUSED);
		return 0;
	case FORBIDDEN:
		/* What a sender gets when netfilter drops its packet. */
		count(COUNT_DROP_SOURCE_RANGE);
		report_refused(ctx, &addr, port, COUNT_DROP_SOURCE_RANGE, service);
		bpf_set_retval(-EPERM);
		return 0;
	case TRANSLATED:
		break;
	}
	count(message ? COUNT_SENDMSG_TRANSLATED : COUNT_CONNECT_TRANSLATED);
	if (v6)
		store_v6(ctx, &addr);
	else
		ctx->user_ip4 = addr.w[3];
	ctx->user_port = port;
	return 1;
}

static __always_inline int to_frontend(struct bpf_sock_addr *ctx, bool v6)
{
	__be16 port = ctx->user_port;
	struct address addr;

	if (!has_ports(ctx))
		return 1;
	if (v6)
		load_v6(ctx, &addr);
	else
		address_from_v4(&addr, ctx->user_ip4);
	if (!untranslate(ctx, &addr, &port))
		return 1;
	if (v6)
		store_v6(ctx, &addr);
	else
		ctx->user_ip4 = addr.w[3];
	ctx->user_port = port;
	return 1;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return to_backend(ctx, false, false);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return to_backend(ctx, true, false);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return to_backend(ctx, false, true);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return to_backend(ctx, true, true);
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	return to_frontend(ctx, false);
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	return to_frontend(ctx, true);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return to_frontend(ctx, false);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return to_frontend(ctx, true);
}
