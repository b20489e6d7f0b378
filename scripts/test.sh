#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `make test`: every test, with the coverage of each package. The kernel is real: namespaces,
# cgroups, BPF programs. What this host cannot run is listed at the end; with CI=true that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/host.sh
need_root

install_missing runc runc iptables iptables ip iproute2 busybox busybox-static systemd-analyze systemd

# Some tests drive the API with kubectl, as a person would: the host's, or one built from the same
# release that skep serves.
if ! command -v kubectl >/dev/null 2>&1; then
  version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
  # Without a version of its own it finds itself unfit for any server.
  go build -ldflags "-X k8s.io/component-base/version.gitVersion=$version" -o .build/kubectl/kubectl k8s.io/kubernetes/cmd/kubectl
  export PATH=$PATH:$PWD/.build/kubectl
fi

skips=$(mktemp)
trap 'rm -f "$skips"; hand_back' EXIT
export SKEP_SKIPS=$skips

status=0
# Of a package's tests, three at once on two cores: those of whole clusters wait more than they work.
go test -count=1 -timeout 45m -cover -parallel $(($(nproc) * 3 / 2)) ./... || status=$?

if [ -s "$skips" ]; then
  printf '\nSkipped on this host:\n'
  sort -u "$skips" | sed 's/^/  /'
  if [ "${CI:-}" = true ]; then
    echo "With CI=true a skip is a failure." >&2
    status=1
  fi
fi
exit $status
