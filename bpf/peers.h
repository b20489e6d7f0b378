/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What a socket was told: the services it talks to, and the backends that it was given. socket.c
 * writes it for the way back; pod.c reads it to know which service a new connection is for.
 */
#pragma once
#include "address.h"

/* Frontends this socket talks to, and the backends they were translated to. */
#define PEERS 4

struct peer {
	struct address frontend, backend;
	__be16 frontend_port, backend_port;
	__u32 backend_id;
	__u32 service;
};

struct peers {
	struct peer peer[PEERS];
	__u32 next; /* the oldest */
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__type(key, int);
	__type(value, struct peers);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} socket_peers SEC(".maps");
