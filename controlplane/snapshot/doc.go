// SPDX-License-Identifier: Apache-2.0

// Package snapshot keeps what a control plane cannot be made again from: all objects, and the keys
// that the cluster's certificates and tokens hang on.
//
//	Taker.Take:  etcd.db (etcd's own snapshot) + tls/ ──► .partial.tar.gz ──sync, link──► NAME.tar.gz
//	Restore:     NAME.tar.gz ──every hash──► .restoring/ ──one rename──► DATA-DIR/server
//	                                                        what was there ──► DATA-DIR/server.replaced-TIME
//
// A snapshot is a gzipped tar archive of manifest.json, etcd.db and tls/*; manifest.json comes first and
// has size and SHA-256 of the others. It holds private keys: files have mode 0600, directories 0700.
// A name appears only when its file is complete and on disk.
package snapshot
