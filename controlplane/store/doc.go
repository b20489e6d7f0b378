// SPDX-License-Identifier: Apache-2.0

// Package store runs etcd 3.6 inside this process and hands out clients that call it directly.
//
//	Open ── flock DataDir/lock ── inspect DataDir/etcd ── etcd starts ── Client()
//	                │                     │                    │
//	            ErrLocked            ErrCorrupt        ErrCorrupt, ErrNoSpace
//
// There is no client listener: nothing outside the process can talk to etcd, and nothing inside pays for
// a socket. Only a member of several (Config.Cluster) listens, for the others, by mutual TLS. It joins as
// a learner, and Open returns when it has a vote. Every write is synced to disk before it is acknowledged.
//
// etcd answers a failure it cannot survive (a broken log, a full disk) by ending the process. Here
// the goroutine that met it ends instead, Failed() is closed and Err() says what to do, so that the
// program can stop its other parts in order. A store that failed serves nothing any more.
package store
