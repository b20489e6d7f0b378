#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the example images from source in this repository, without a registry or Docker.
# usage: build-images.sh OUTPUT_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
mkdir -p "$out" .build/rootfs
go build -ldflags '-s -w' -o .build/rootfs/web ./examples/hello/web
go run ./examples/image --tag skep.io/examples/hello:latest --output "$out/hello.tar" .build/rootfs/web
