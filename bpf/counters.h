/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Counters: one index a fact. dataplane/flows has the same list with the metrics' names. */
#pragma once
#include "kernel.h"

enum counter {
	COUNT_CONNECT_TRANSLATED,
	COUNT_CONNECT_REFUSED,
	COUNT_SENDMSG_TRANSLATED,
	COUNT_SENDMSG_REFUSED,
	COUNT_POD_EGRESS,	   /* packets from pods */
	COUNT_POD_INGRESS,	   /* packets to pods through the node's stack */
	COUNT_POD_TO_POD,	   /* packets redirected from a pod or device to a local pod */
	COUNT_PACKET_TRANSLATED,   /* flows translated per packet */
	COUNT_DROP_SPOOFED,	   /* source is not the pod's address */
	COUNT_DROP_MALFORMED,	   /* truncated or contradicting headers */
	COUNT_DROP_NO_LOCAL,	   /* traffic policy Local, no backend on this node */
	COUNT_DROP_NO_SNAT_PORT,   /* no free source port towards the backend */
	COUNT_DROP_REWRITE,	   /* the kernel refused to rewrite the packet */
	COUNT_INGRESS_STEERED,	   /* connections handed to the ingress listener */
	COUNT_DROP_POLICY_INGRESS, /* no policy of the receiving pod lets it in */
	COUNT_DROP_POLICY_EGRESS,  /* no policy of the sending pod lets it out */
	COUNT_DROP_POLICY_CLOSED, /* a pod whose policies are not known, or cannot be put into force
				   */
	COUNT_DROP_FRAGMENT,	  /* to or from a pod with policies, ahead of its first fragment */
	COUNT_EVENTS,		  /* told to whoever follows flows */
	COUNT_EVENTS_SUPPRESSED,  /* over their budget */
	COUNT_EVENTS_LOST,	  /* without room in the ring */
	COUNT_DROP_SOURCE_RANGE,  /* the client is in none of the service's source ranges */
	COUNT_BYTES_POD_EGRESS,	  /* of the packets counted above, with their Ethernet headers */
	COUNT_BYTES_POD_INGRESS,
	COUNT_DROP_NO_FRONTEND, /* refused: to an announced address, where no service answers */
	COUNT_DROP_TOO_BIG,	/* for the next link, and nobody can be told */
	COUNT_ERROR_TRANSLATED, /* ICMP errors about translated flows */
	COUNT_TOO_BIG,		/* packets that the stack was asked to refuse with their MTU */
	COUNT_XDP_FORWARDED,	/* at the driver, to a backend elsewhere or back to its client */
	COUNT_FLOW_TCP_ADDED,	/* flows noted, */
	COUNT_FLOW_UDP_ADDED,
	COUNT_FLOW_TCP_REMOVED, /* forgotten because they were over, */
	COUNT_FLOW_UDP_REMOVED,
	COUNT_FLOW_TCP_FAILED, /* and not noted for want of room */
	COUNT_FLOW_UDP_FAILED,
	COUNT_MAX,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, COUNT_MAX);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} counters SEC(".maps");

static __always_inline void count_more(enum counter what, __u64 more)
{
	__u32 index = what;
	__u64 *n = bpf_map_lookup_elem(&counters, &index);

	if (n)
		*n += more; /* per CPU; programs of one CPU rarely nest: a lost tick is fine */
}

static __always_inline void count(enum counter what)
{
	count_more(what, 1);
}

/* For what is added up with others: no tick is lost. */
static __always_inline void count_exactly(enum counter what, __u64 more)
{
	__u32 index = what;
	__u64 *n = bpf_map_lookup_elem(&counters, &index);

	if (n)
		__sync_fetch_and_add(n, more);
}
