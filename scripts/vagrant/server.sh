#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes this machine a server with examples/hello on it. Run again, it upgrades and converges.
# usage: server.sh ARCHIVE IMAGES ADDRESS
#   ARCHIVE  of `make dist`
#   IMAGES   directory of image archives, of `make images`
#   ADDRESS  of this machine, at which the other ones reach it
set -euo pipefail
. "$(dirname "$0")/node.sh"
need_root
[ $# -eq 3 ] || die "usage: server.sh ARCHIVE IMAGES ADDRESS"
address=$3

unpack "$1"
install_node server "$2" --node-ip "$address"
if ! "$skep" status --wait 3m; then
  service_log server
  die "the server did not become ready"
fi

say "Application"
"$skep" apply -f "$unpacked/hello"
"$skep" rollout status -n hello deployment/hello --timeout=3m
wait_for_page "$address" 80 / >/dev/null || die "http://$address/ does not answer: \`skep get pods -n hello\` and \`skep status\` on this machine tell more"
done_with "http://$address/ answers"
