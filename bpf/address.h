/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Addresses: always 16 bytes, IPv4 as v4-mapped IPv6, so that there is one code path. */
#pragma once
#include "kernel.h"

struct address {
	__be32 w[4];
};

#define V4_MAPPED bpf_htonl(0x0000ffff)

static __always_inline void address_from_v4(struct address *a, __be32 v4)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = V4_MAPPED;
	a->w[3] = v4;
}

static __always_inline bool address_is_v4(const struct address *a)
{
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == V4_MAPPED;
}

static __always_inline bool address_equal(const struct address *a, const struct address *b)
{
	return a->w[3] == b->w[3] && a->w[2] == b->w[2] && a->w[1] == b->w[1] && a->w[0] == b->w[0];
}

/* 127.0.0.0/8, ::1, and the unspecified address, which connect() takes for loopback. */
static __always_inline bool address_is_loopback(const struct address *a)
{
	if (address_is_v4(a))
		return (a->w[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000) || a->w[3] == 0;
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == 0 &&
	       (a->w[3] == bpf_htonl(1) || a->w[3] == 0);
}

/* The unspecified address of the same family: what NodePort frontends are stored under. */
static __always_inline void address_wildcard(struct address *out, const struct address *family)
{
	bool v4 = address_is_v4(family);

	out->w[0] = 0;
	out->w[1] = 0;
	out->w[2] = v4 ? V4_MAPPED : 0;
	out->w[3] = 0;
}
