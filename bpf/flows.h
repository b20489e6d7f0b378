/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Events: what was dropped or refused and why, and which connections were opened. dataplane/flows
 * reads them.
 *
 * Each kind has a budget per CPU, so that a flood costs no more than a fixed rate; what is over it
 * is counted, and the next event says how many there were. An event wakes nobody unless somebody
 * follows or the ring is half full: a node at which nobody looks pays for no reader.
 */
#pragma once
#include "counters.h"
#include "packet.h"

/* Reasons of events that are no packets; packets have those of enum counter. */
enum event_reason {
	EVENT_NO_BACKEND = 200, /* a socket asked for a service without backends, */
	EVENT_NO_ADDRESS,	/* or for an address of the cluster that nobody has */
};

struct flow_event {
	__u64 at;		 /* ns, monotonic */
	__u64 netns;		 /* cookie of the socket's namespace, when a socket was refused */
	struct tuple connection; /* of a service: from the client to the backend */
	struct address frontend; /* what the client asked for, if that is another */
	__be16 frontend_port;
	__u8 reason; /* why it was dropped; 0: a connection was opened */
	__u8 pad;
	__u32 service;
	__u32 set;	  /* policies that denied it, POLICY_CLOSED included */
	__u32 ifindex;	  /* the pod's device that it came from, if that is known */
	__u32 suppressed; /* events of this kind and CPU since the last one */
	__u32 rule;	  /* of an administrator, that denied it */
};

_Static_assert(sizeof(struct flow_event) == 96, "dataplane/maps has the same layout");

#define FLOW_RING_BYTES 524288

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, FLOW_RING_BYTES);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} flow_events SEC(".maps");

/* How many readers want to be woken by each event. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} flow_followers SEC(".maps");

enum event_kind { EVENT_DROPPED, EVENT_OPENED, EVENT_KINDS };

/* Events a second of each kind and CPU; set when the program is loaded. 0: none. */
const volatile __u32 drop_events_per_second = 200;
const volatile __u32 open_events_per_second = 500;

struct event_budget {
	__u64 due; /* ns: when the budget is full again (a leaky bucket kept as one time) */
	__u32 suppressed;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct event_budget);
	__uint(max_entries, EVENT_KINDS);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} event_budgets SEC(".maps");

#define SECOND_NS 1000000000ULL

/* Takes one of a second's budget, and starts an event that the caller submits. */
static __always_inline struct flow_event *event_begin(__u32 kind, __u32 rate)
{
	struct event_budget *b = bpf_map_lookup_elem(&event_budgets, &kind);
	__u64 now = bpf_ktime_get_ns();
	struct flow_event *e;

	if (!b || !rate)
		return 0;
	if (b->due < now)
		b->due = now;
	if (b->due - now >= SECOND_NS) {
		b->suppressed++;
		count(COUNT_EVENTS_SUPPRESSED);
		return 0;
	}
	e = bpf_ringbuf_reserve(&flow_events, sizeof(*e), 0);
	if (!e) {
		b->suppressed++;
		count(COUNT_EVENTS_LOST);
		return 0;
	}
	b->due += SECOND_NS / rate;
	__builtin_memset(e, 0, sizeof(*e));
	e->at = now;
	e->suppressed = b->suppressed;
	b->suppressed = 0;
	return e;
}

static __always_inline void event_end(struct flow_event *e)
{
	__u32 zero = 0, *followers = bpf_map_lookup_elem(&flow_followers, &zero);
	bool wake = (followers && *followers) ||
		    bpf_ringbuf_query(&flow_events, BPF_RB_AVAIL_DATA) > FLOW_RING_BYTES / 2;

	count(COUNT_EVENTS);
	bpf_ringbuf_submit(e, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

/* A packet is dropped: by a set of policies and a rule of theirs, or for another reason. */
__global int report_drop(const struct tuple *t, __u32 reason, __u32 set, __u32 rule, __u32 ifindex)
{
	struct flow_event *e;

	if (!t)
		return 0;
	e = event_begin(EVENT_DROPPED, drop_events_per_second);
	if (!e)
		return 0;
	e->connection = *t;
	e->reason = reason;
	e->set = set;
	e->rule = rule;
	e->ifindex = ifindex;
	event_end(e);
	return 0;
}

/* Counts a packet that is dropped for a reason other than a policy, and tells of it. */
static __always_inline void drop(enum counter reason, const struct packet *p, __u32 ifindex)
{
	count(reason);
	report_drop(&p->tuple, reason, 0, 0, ifindex);
}

/* A connection is opened; asked is what the client asked for, if that is a service. */
__global int report_open(const struct tuple *t, const struct address *asked, __be16 port,
			 __u32 service, __u32 ifindex)
{
	struct flow_event *e;

	if (!t)
		return 0;
	e = event_begin(EVENT_OPENED, open_events_per_second);
	if (!e)
		return 0;
	e->connection = *t;
	if (asked) {
		e->frontend = *asked;
		e->frontend_port = port;
	}
	e->service = service;
	e->ifindex = ifindex;
	event_end(e);
	return 0;
}
