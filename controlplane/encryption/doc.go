// SPDX-License-Identifier: Apache-2.0

// Package encryption decides with which keys Secrets are encrypted in the store.
//
// The keys are in one file, an EncryptionConfiguration in upstream's form, that only this package changes: its first
// provider writes, all of them read. Plan functions are pure; Keys are those of one server or of several; Rotator takes the steps of a rotation in
// an order that leaves every Secret readable wherever it is cut off.
package encryption
