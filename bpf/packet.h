/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What a packet says about itself, and how its addresses are rewritten. */
#pragma once
#include "address.h"

struct tuple {
	struct address saddr, daddr;
	__be16 sport, dport;
	__u8 proto;
	__u8 pad[3];
};

enum parsed {
	PARSED_PORTS,	  /* TCP, UDP or SCTP: everything below is set */
	PARSED_ADDRESSES, /* other protocols and later fragments: no ports */
	PARSED_NOT_IP,
	PARSED_MALFORMED,
};

enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16 };

enum piece {
	PIECE_WHOLE,
	PIECE_FIRST, /* a fragment that has the transport's header */
	PIECE_LATER, /* one that has none */
};

struct packet {
	struct tuple tuple;
	__u16 l4; /* offset of the transport header */
	__u8 tcp_flags;
	bool v4;
	__u8 piece; /* enum piece */
	__u32 id;   /* of the datagram that it is a piece of, as on the wire */
};

struct ipv4_header {
	__u8 version_ihl, tos;
	__be16 total;
	__be16 id, fragment;
	__u8 ttl, proto;
	__be16 check;
	__be32 saddr, daddr;
};

struct ipv6_header {
	__be32 version_class_flow;
	__be16 payload;
	__u8 next, hop_limit;
	struct address saddr, daddr;
};

struct fragment_header {
	__u8 next, reserved;
	__be16 offset;
	__be32 id;
};

struct tcp_header {
	__be16 sport, dport;
	__be32 seq, ack;
	__u8 offset, flags;
	__be16 window, check, urgent;
};

struct udp_header {
	__be16 sport, dport;
	__be16 length, check;
};

struct sctp_header {
	__be16 sport, dport;
	__be32 tag, check;
};

#define IPV4_SADDR    12
#define IPV4_FRAGMENT 6
#define IPV4_DF	      0x4000
#define IPV4_MORE     0x2000
#define IPV4_OFFSET   0x1fff
#define IPV4_CHECK    10
#define IPV6_PAYLOAD  4
#define IPV6_SADDR    8
#define IPV6_MORE     1
#define IPV6_OFFSET   0xfff8
#define TCP_CHECK     16
#define UDP_CHECK     6

/* How a program reads a packet: bpf_skb_load_bytes, or bpf_xdp_load_bytes. */
typedef long load_bytes(const void *ctx, __u32 offset, void *to, __u32 length);

static __always_inline enum parsed parse_l4(void *ctx, load_bytes *load, struct packet *p)
{
	struct tcp_header tcp;
	struct sctp_header sctp;
	struct udp_header udp;

	switch (p->tuple.proto) {
	case IPPROTO_TCP:
		if (load(ctx, p->l4, &tcp, sizeof(tcp)))
			return PARSED_MALFORMED;
		p->tuple.sport = tcp.sport;
		p->tuple.dport = tcp.dport;
		p->tcp_flags = tcp.flags;
		return PARSED_PORTS;
	case IPPROTO_UDP:
		if (load(ctx, p->l4, &udp, sizeof(udp)))
			return PARSED_MALFORMED;
		p->tuple.sport = udp.sport;
		p->tuple.dport = udp.dport;
		return PARSED_PORTS;
	case IPPROTO_SCTP: /* never a service: nothing rewrites its CRC */
		if (load(ctx, p->l4, &sctp, sizeof(sctp)))
			return PARSED_MALFORMED;
		p->tuple.sport = sctp.sport;
		p->tuple.dport = sctp.dport;
		return PARSED_PORTS;
	}
	return PARSED_ADDRESSES;
}

static __always_inline enum parsed parse_v4(void *ctx, load_bytes *load, __u32 length,
					    struct packet *p)
{
	struct ipv4_header ip;
	__u32 header;

	if (load(ctx, ETH_HLEN, &ip, sizeof(ip)))
		return PARSED_MALFORMED;
	header = (ip.version_ihl & 0x0f) * 4;
	if (ip.version_ihl >> 4 != 4 || header < sizeof(ip) || bpf_ntohs(ip.total) < header ||
	    bpf_ntohs(ip.total) > length - ETH_HLEN)
		return PARSED_MALFORMED;
	p->v4 = true;
	address_from_v4(&p->tuple.saddr, ip.saddr);
	address_from_v4(&p->tuple.daddr, ip.daddr);
	p->tuple.proto = ip.proto;
	p->l4 = ETH_HLEN + header;
	if (unlikely(ip.fragment & bpf_htons(IPV4_MORE | IPV4_OFFSET))) {
		p->id = ip.id;
		p->piece = ip.fragment & bpf_htons(IPV4_OFFSET) ? PIECE_LATER : PIECE_FIRST;
		if (p->piece == PIECE_LATER)
			return PARSED_ADDRESSES;
	}
	return parse_l4(ctx, load, p);
}

/* Extension headers that may stand before the transport header; more of them is not translated. */
#define EXTENSIONS 4

static __always_inline enum parsed parse_v6(void *ctx, load_bytes *load, __u32 length,
					    struct packet *p)
{
	struct fragment_header fragment;
	struct ipv6_header ip;
	__u8 extension[2];

	if (load(ctx, ETH_HLEN, &ip, sizeof(ip)))
		return PARSED_MALFORMED;
	/* A jumbogram says 0; longer than 64 kB segments (BIG TCP) do, too. */
	if ((ip.version_class_flow & bpf_htonl(0xf0000000)) != bpf_htonl(0x60000000) ||
	    bpf_ntohs(ip.payload) + sizeof(ip) > length - ETH_HLEN)
		return PARSED_MALFORMED;
	p->tuple.saddr = ip.saddr;
	p->tuple.daddr = ip.daddr;
	p->tuple.proto = ip.next;
	p->l4 = ETH_HLEN + sizeof(ip);
	for (int i = 0; i < EXTENSIONS; i++) {
		switch (p->tuple.proto) {
		case 0:	 /* hop by hop */
		case 43: /* routing */
		case IPPROTO_DSTOPTS:
			if (load(ctx, p->l4, extension, sizeof(extension)))
				return PARSED_MALFORMED;
			p->tuple.proto = extension[0];
			p->l4 += (extension[1] + 1) * 8;
			continue;
		case IPPROTO_FRAGMENT:
			if (load(ctx, p->l4, &fragment, sizeof(fragment)))
				return PARSED_MALFORMED;
			p->tuple.proto = fragment.next;
			p->l4 += sizeof(fragment);
			/* One that is the whole datagram is no fragment (RFC 6946). */
			if (!(fragment.offset & bpf_htons(IPV6_MORE | IPV6_OFFSET)))
				continue;
			p->id = fragment.id;
			p->piece = PIECE_LATER;
			if (fragment.offset & bpf_htons(IPV6_OFFSET))
				return PARSED_ADDRESSES;
			p->piece = PIECE_FIRST;
			continue;
		}
		return parse_l4(ctx, load, p);
	}
	return PARSED_ADDRESSES;
}

/* protocol is the Ethernet header's, length that of the whole frame. */
static __always_inline enum parsed parse_with(void *ctx, load_bytes *load, __be16 protocol,
					      __u32 length, struct packet *p)
{
	switch (protocol) {
	case bpf_htons(ETH_P_IP):
		return parse_v4(ctx, load, length, p);
	case bpf_htons(ETH_P_IPV6):
		return parse_v6(ctx, load, length, p);
	}
	return PARSED_NOT_IP;
}

static __always_inline enum parsed parse(struct __sk_buff *skb, struct packet *p)
{
	return parse_with(skb, bpf_skb_load_bytes, skb->protocol, skb->len, p);
}

/* One's complement: what becomes of a checksum when what it covers changes by diff. */
static __always_inline __u16 sum_after(__u16 check, __u64 diff)
{
	__u64 sum = (__u16)~check + (diff & 0xffff) + (diff >> 16 & 0xffff);

	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* BPF_F_IPV6 keeps a NIC's whole-packet checksum right; before Linux 6.16 there is no such flag. */
static __always_inline long replace_l4_sum(struct __sk_buff *skb, __u32 at, __u64 diff, __u64 flags,
					   bool v4)
{
	if (!v4 && !bpf_l4_csum_replace(skb, at, 0, diff, flags | BPF_F_IPV6))
		return 0;
	return bpf_l4_csum_replace(skb, at, 0, diff, flags);
}

/*
 * Rewrites addresses and ports of p to those of to, in the packet and in p, with all checksums.
 * Works on segmented and checksum-offloaded packets. False when the kernel refuses.
 */
static __always_inline bool rewrite(struct __sk_buff *skb, struct packet *p, const struct tuple *to)
{
	__be32 old[9], new[9], addresses[2];
	__u64 flags = BPF_F_PSEUDO_HDR;
	__u32 check = p->l4 + TCP_CHECK;
	__be16 ports[2];
	__s64 diff;

	if (p->tuple.proto == IPPROTO_UDP) {
		check = p->l4 + UDP_CHECK;
		flags |= BPF_F_MARK_MANGLED_0; /* 0 means "no checksum" and stays so */
	}
	ports[0] = to->sport;
	ports[1] = to->dport;
	__builtin_memcpy(&old[0], &p->tuple.saddr, 32);
	__builtin_memcpy(&new[0], &to->saddr, 32);

	/* Ports first: they are not part of the pseudo header. */
	old[8] = p->tuple.sport | (__u32)p->tuple.dport << 16;
	new[8] = to->sport | (__u32)to->dport << 16;
	if (old[8] != new[8]) {
		diff = bpf_csum_diff(&old[8], 4, &new[8], 4, 0);
		if (bpf_l4_csum_replace(skb, check, 0, diff, flags & ~BPF_F_PSEUDO_HDR))
			return false;
		if (bpf_skb_store_bytes(skb, p->l4, ports, sizeof(ports), 0))
			return false;
	}
	diff = bpf_csum_diff(old, 32, new, 32, 0);
	if (replace_l4_sum(skb, check, diff, flags, p->v4))
		return false;
	if (p->v4) {
		addresses[0] = to->saddr.w[3];
		addresses[1] = to->daddr.w[3];
		if (bpf_l3_csum_replace(skb, ETH_HLEN + IPV4_CHECK, 0, diff, 0) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + IPV4_SADDR, addresses, sizeof(addresses),
					0))
			return false;
	} else if (bpf_skb_store_bytes(skb, ETH_HLEN + IPV6_SADDR, &new[0], 32, 0)) {
		return false;
	}
	p->tuple = *to;
	return true;
}
