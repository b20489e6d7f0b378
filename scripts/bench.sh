#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `make bench`: prints the table of docs/benchmarks.md, measured on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/host.sh
need_root

install_missing runc runc iptables iptables ip iproute2 busybox busybox-static
trap hand_back EXIT
go run ./tests/bench "$@"
