// SPDX-License-Identifier: Apache-2.0

// Package shared keeps what the servers of a cluster have to agree on and what the API is not to show: their certificate
// authority, and the keys of Secrets.
//
// Each of the two is a Thing: a content with a number, in the store beside the API's objects, that is only ever replaced by
// one with the next number. A server says of each number when it does as that says, so whoever replaces a content again,
// because the next step needs every server to have taken the one before, knows when that is. A server reads what there is
// before it serves: one that was away cannot miss a step.
//
// Contents are sealed with a key that only servers have. Whoever reads the store's files, or a snapshot's, finds no other
// secret in them than without this.
package shared
