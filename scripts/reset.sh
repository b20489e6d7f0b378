#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `make clean`: take every trace of skep off this machine.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/host.sh
need_root

skep=$PWD/.build/bin/skep
if [ ! -d /run/skep ] && [ ! -d /var/lib/skep ] && [ ! -e /etc/skep ]; then
  echo "skep has left nothing on this machine."
  exit 0
fi
if [ ! -x "$skep" ]; then
  echo "There are traces of skep on this machine; \`make build\` first, so that \`skep reset\` can remove them." >&2
  exit 1
fi
"$skep" reset --yes
rm -f /var/log/skep.log /var/log/skep-*.log /var/log/skep.err
