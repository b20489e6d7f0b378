/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Load balancers' addresses that this node answers for: ARP (RFC 826) and neighbour discovery
 * (RFC 4861). No device has these addresses, so the stack would not answer; and answers go on while
 * no agent runs.
 */
#pragma once
#include "packet.h"

struct announced_key {
	struct address addr;
	__u32 ifindex;
};

struct announced {
	__u8 mac[6]; /* the device's */
	__u8 pad[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct announced_key);
	__type(value, struct announced);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} announced SEC(".maps");

static __always_inline const struct announced *announced_on(const struct address *a, __u32 ifindex)
{
	struct announced_key key = {.addr = *a, .ifindex = ifindex};

	return bpf_map_lookup_elem(&announced, &key);
}

struct arp_packet {
	__be16 hardware, protocol;
	__u8 hardware_length, protocol_length;
	__be16 operation;
	__u8 sender_mac[6];
	__be32 sender;
	__u8 target_mac[6];
	__be32 target;
} __attribute__((packed));

#define ARP_REQUEST bpf_htons(1)
#define ARP_REPLY   bpf_htons(2)

/* Answers "who has" for an announced address; leaves the rest to the stack. */
static __always_inline int answer_arp(struct __sk_buff *skb)
{
	const struct announced *mine;
	struct arp_packet arp, answer;
	struct address target;
	__u8 macs[12];

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &arp, sizeof(arp)) || arp.hardware != bpf_htons(1) ||
	    arp.protocol != bpf_htons(ETH_P_IP) || arp.hardware_length != 6 ||
	    arp.protocol_length != 4 || arp.operation != ARP_REQUEST || arp.sender == arp.target)
		return TC_ACT_UNSPEC;
	address_from_v4(&target, arp.target);
	mine = announced_on(&target, skb->ifindex);
	if (!mine)
		return TC_ACT_UNSPEC;
	answer = arp;
	answer.operation = ARP_REPLY;
	__builtin_memcpy(answer.sender_mac, mine->mac, 6);
	answer.sender = arp.target;
	__builtin_memcpy(answer.target_mac, arp.sender_mac, 6);
	answer.target = arp.sender;
	__builtin_memcpy(macs, arp.sender_mac, 6);
	__builtin_memcpy(macs + 6, mine->mac, 6);
	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN, &answer, sizeof(answer), 0))
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex, 0);
}

/* A neighbour advertisement with its pseudo header before it, as the checksum wants it. */
struct advertisement {
	struct address saddr, daddr;
	__be32 length, next;
	__u8 type, code;
	__u16 check;
	__be32 flags;
	struct address target;
	__u8 option, option_length;
	__u8 mac[6];
};

#define ND_SOLICITATION	  135
#define ND_ADVERTISEMENT  136
#define ND_TARGET_ADDRESS 2
#define ND_SOLICITED	  0x40000000
#define ND_OVERRIDE	  0x20000000
#define ND_LENGTH	  32 /* from type to the end of the option */

struct solicitation {
	__u8 type, code;
	__u16 check;
	__be32 reserved;
	struct address target;
};

/* Answers a neighbour solicitation for an announced address; leaves the rest to the stack. */
__global int answer_nd(struct __sk_buff *skb, struct packet *p)
{
	struct solicitation ask;
	const struct announced *mine;
	struct advertisement a = {};
	struct ipv6_header ip = {};
	__u8 macs[12];
	__u64 sum;

	/* Without extension headers, and from this link: a router would have lowered 255. */
	if (!p || p->l4 != ETH_HLEN + sizeof(ip) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) ||
	    bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(ip), &ask, sizeof(ask)) ||
	    ask.type != ND_SOLICITATION || ask.code || ip.hop_limit != 255)
		return TC_ACT_UNSPEC;
	mine = announced_on(&ask.target, skb->ifindex);
	if (!mine || bpf_skb_load_bytes(skb, 6, macs, 6))
		return TC_ACT_UNSPEC;
	__builtin_memcpy(macs + 6, mine->mac, 6);
	a.saddr = ask.target;
	a.daddr = ip.saddr;
	a.flags = bpf_htonl(ND_SOLICITED | ND_OVERRIDE);
	if (!ip.saddr.w[0] && !ip.saddr.w[1] && !ip.saddr.w[2] && !ip.saddr.w[3]) {
		/* Somebody asks whether he may have the address: all nodes are told no. */
		a.daddr.w[0] = bpf_htonl(0xff020000);
		a.daddr.w[3] = bpf_htonl(1);
		a.flags = bpf_htonl(ND_OVERRIDE);
		macs[0] = macs[1] = 0x33;
		macs[2] = macs[3] = macs[4] = 0;
		macs[5] = 1;
	}
	a.length = bpf_htonl(ND_LENGTH);
	a.next = bpf_htonl(IPPROTO_ICMPV6);
	a.type = ND_ADVERTISEMENT;
	a.target = ask.target;
	a.option = ND_TARGET_ADDRESS;
	a.option_length = 1;
	__builtin_memcpy(a.mac, mine->mac, 6);
	sum = bpf_csum_diff(0, 0, (__be32 *)&a, sizeof(a), 0);
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff);
	sum = (sum & 0xffff) + (sum >> 16);
	a.check = ~sum;

	ip.payload = bpf_htons(ND_LENGTH);
	ip.next = IPPROTO_ICMPV6;
	ip.saddr = a.saddr;
	ip.daddr = a.daddr;
	if (bpf_skb_change_tail(skb, ETH_HLEN + sizeof(ip) + ND_LENGTH, 0) ||
	    bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN, &ip, sizeof(ip), 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN + sizeof(ip), &a.type, ND_LENGTH, 0))
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex, 0);
}
