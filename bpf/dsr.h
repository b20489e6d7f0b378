/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Direct server return: a node that hands a connection on leaves the client's address in it, and
 * writes beside it which frontend was asked: an IPv4 option, or an IPv6 destination option, of the
 * numbers for experiments (RFC 4727). The backend's node takes it out again, and answers in the
 * frontend's name. Packets with options never cross a router: nodes are on one link, or the option
 * is inside the tunnel.
 *
 * TCP carries it in what opens a connection. UDP has no such packet, and carries it in every one
 * that has room for it.
 */
#pragma once
#include "endpoints.h"
#include "packet.h"

enum { DSR_TCP = 1, DSR_UDP = 2 };

/* Set of the protocols that are answered directly; set when the program is loaded. */
const volatile __u32 dsr_protocols = 0;

struct dsr_option_v4 {
	__u8 type, length;
	__be16 port;
	__be32 addr;
};

struct dsr_option_v6 {
	__u8 next, words; /* of the extension header: 8 bytes each, less one */
	__u8 type, length;
	__be16 port, pad;
	struct address addr;
};

#define DSR_TYPE_V4 158
#define DSR_TYPE_V6 0x1e
#define DSR_ROOM    24 /* the larger one */

/* Whether the packet can carry the option to a pod elsewhere. */
static __always_inline bool dsr_fits(const struct __sk_buff *skb)
{
	const struct node *self = this_node();

	return self && skb->len - ETH_HLEN + DSR_ROOM <= self->mtu;
}

static __always_inline bool dsr_of(__u8 proto)
{
	return dsr_protocols & (proto == IPPROTO_TCP ? DSR_TCP : DSR_UDP);
}

static __always_inline bool dsr_tag_v4(struct __sk_buff *skb, struct packet *p)
{
	struct dsr_option_v4 option = {.type = DSR_TYPE_V4, .length = sizeof(option)};
	union {
		struct ipv4_header ip;
		__be32 words[5];
	} old, new;
	__s64 diff;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &old, sizeof(old)) ||
	    (old.ip.version_ihl & 0x0f) > 13)
		return false;
	option.addr = p->tuple.daddr.w[3];
	option.port = p->tuple.dport;
	new = old;
	new.ip.version_ihl += 2;
	new.ip.total = bpf_htons(bpf_ntohs(old.ip.total) + sizeof(option));
	diff = bpf_csum_diff(old.words, sizeof(old), new.words, sizeof(new), 0);
	diff = bpf_csum_diff(0, 0, (__be32 *)&option, sizeof(option), diff);
	new.ip.check = sum_after(old.ip.check, diff);
	if (bpf_skb_adjust_room(skb, sizeof(option), BPF_ADJ_ROOM_NET, 0))
		return false;
	p->l4 += sizeof(option);
	return !bpf_skb_store_bytes(skb, ETH_HLEN, &new, sizeof(new), BPF_F_RECOMPUTE_CSUM) &&
	       !bpf_skb_store_bytes(skb, ETH_HLEN + sizeof(new), &option, sizeof(option),
				    BPF_F_RECOMPUTE_CSUM);
}

static __always_inline bool dsr_tag_v6(struct __sk_buff *skb, struct packet *p)
{
	struct dsr_option_v6 option = {
	    .words = sizeof(option) / 8 - 1, .type = DSR_TYPE_V6, .length = sizeof(option) - 4};
	struct {
		__be16 payload;
		__u8 next, hop_limit;
	} ip;

	if (bpf_skb_load_bytes(skb, ETH_HLEN + IPV6_PAYLOAD, &ip, sizeof(ip)))
		return false;
	option.next = ip.next;
	option.addr = p->tuple.daddr;
	option.port = p->tuple.dport;
	ip.next = IPPROTO_DSTOPTS;
	ip.payload = bpf_htons(bpf_ntohs(ip.payload) + sizeof(option));
	if (bpf_skb_adjust_room(skb, sizeof(option), BPF_ADJ_ROOM_NET, 0))
		return false;
	p->l4 += sizeof(option);
	return !bpf_skb_store_bytes(skb, ETH_HLEN + IPV6_PAYLOAD, &ip, sizeof(ip),
				    BPF_F_RECOMPUTE_CSUM) &&
	       !bpf_skb_store_bytes(skb, ETH_HLEN + sizeof(struct ipv6_header), &option,
				    sizeof(option), BPF_F_RECOMPUTE_CSUM);
}

/*
 * Writes the packet's destination, the frontend, into its header, before the packet is rewritten.
 * False when the packet is not what it was any more, and cannot go on.
 */
__global int dsr_tag(struct __sk_buff *skb, struct packet *p)
{
	__u32 before;

	if (!p)
		return false;
	if (p->tuple.proto == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return true;
	if (!dsr_fits(skb))
		return true;
	before = p->l4;
	if (p->v4)
		return dsr_tag_v4(skb, p) || p->l4 == before;
	return dsr_tag_v6(skb, p) || p->l4 == before;
}

/* Takes the option out of a packet. False when there is none; then nothing is changed. */
static __always_inline bool dsr_untag_v4(struct __sk_buff *skb, struct packet *p,
					 struct address *addr, __be16 *port)
{
	struct dsr_option_v4 option;
	union {
		struct ipv4_header ip;
		__be32 words[5];
	} old, new;
	__s64 diff;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &old, sizeof(old)) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(old), &option, sizeof(option)) ||
	    (old.ip.version_ihl & 0x0f) < 7 || option.type != DSR_TYPE_V4 ||
	    option.length != sizeof(option))
		return false;
	address_from_v4(addr, option.addr);
	*port = option.port;
	new = old;
	new.ip.version_ihl -= 2;
	new.ip.total = bpf_htons(bpf_ntohs(old.ip.total) - sizeof(option));
	diff = bpf_csum_diff(old.words, sizeof(old), new.words, sizeof(new), 0);
	diff = bpf_csum_diff((__be32 *)&option, sizeof(option), 0, 0, diff);
	new.ip.check = sum_after(old.ip.check, diff);
	if (bpf_skb_adjust_room(skb, -(__s32)sizeof(option), BPF_ADJ_ROOM_NET, 0))
		return false;
	p->l4 -= sizeof(option);
	return !bpf_skb_store_bytes(skb, ETH_HLEN, &new, sizeof(new), BPF_F_RECOMPUTE_CSUM);
}

static __always_inline bool dsr_untag_v6(struct __sk_buff *skb, struct packet *p,
					 struct address *addr, __be16 *port)
{
	struct dsr_option_v6 option;
	struct {
		__be16 payload;
		__u8 next, hop_limit;
	} ip;

	if (bpf_skb_load_bytes(skb, ETH_HLEN + IPV6_PAYLOAD, &ip, sizeof(ip)) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(struct ipv6_header), &option,
			       sizeof(option)) ||
	    ip.next != IPPROTO_DSTOPTS || option.words != sizeof(option) / 8 - 1 ||
	    option.type != DSR_TYPE_V6 || option.length != sizeof(option) - 4)
		return false;
	*addr = option.addr;
	*port = option.port;
	ip.next = option.next;
	ip.payload = bpf_htons(bpf_ntohs(ip.payload) - sizeof(option));
	if (bpf_skb_adjust_room(skb, -(__s32)sizeof(option), BPF_ADJ_ROOM_NET, 0))
		return false;
	p->l4 -= sizeof(option);
	return !bpf_skb_store_bytes(skb, ETH_HLEN + IPV6_PAYLOAD, &ip, sizeof(ip),
				    BPF_F_RECOMPUTE_CSUM);
}
