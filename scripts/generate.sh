#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `make generate`: compile bpf/*.c with clang-19 and write the Go bindings beside them.
# The version is pinned because the objects are committed, and CI compares them byte by byte.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/host.sh

install_missing clang-19 clang-19 llvm-strip-19 llvm-19
go generate ./bpf/...
