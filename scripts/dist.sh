#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `make dist`: an archive for each architecture and their checksums. The same commit gives the same
# bytes on every machine: paths and build ids are left out, times are the commit's.
# usage: dist.sh OUTPUT_DIR VERSION LDFLAGS
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1 version=$2 ldflags=$3
archs=${ARCHS:-amd64 arm64}
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
mkdir -p "$out"
rm -rf "$out/.stage" # of a run that was interrupted
sums=()
for arch in $archs; do
  name=skep-$version-linux-$arch
  stage=$out/.stage/$name
  rm -rf "$stage"
  mkdir -p "$stage"
  GOARCH=$arch go build -trimpath -ldflags "$ldflags -buildid=" -o "$stage/" ./cmd/...
  cp LICENSE README.md bpf/LICENSE.BSD-2-Clause scripts/install.sh "$stage/"
  cp -r examples/hello "$stage/hello"
  rm -rf "$stage/hello/web"
  chmod -R u=rwX,go=rX "$stage"
  tar --sort=name --format=gnu --mtime="@$epoch" --owner=0 --group=0 --numeric-owner -C "$out/.stage" -cf - "$name" |
    gzip -n -9 >"$out/$name.tar.gz"
  sums+=("$name.tar.gz")
  rm -rf "$stage"
done
rm -rf "$out/.stage"
(cd "$out" && sha256sum "${sums[@]}" >SHA256SUMS && cat SHA256SUMS)
