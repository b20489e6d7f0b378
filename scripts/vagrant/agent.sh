#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes this machine a node of a server's cluster. Run again, it upgrades and converges.
# usage: agent.sh ARCHIVE IMAGES ADDRESS SERVER TOKEN
#   ARCHIVE  of `make dist`
#   IMAGES   directory of image archives, of `make images`
#   ADDRESS  of this machine, at which the other ones reach it
#   SERVER   the server's address
#   TOKEN    file with what `skep token create` printed there; it is moved to /var/lib/skep/token, mode 0600,
#            which `skep reset` removes
set -euo pipefail
. "$(dirname "$0")/node.sh"
need_root
[ $# -eq 5 ] || die "usage: agent.sh ARCHIVE IMAGES ADDRESS SERVER TOKEN"
address=$3 server=$4
token=/var/lib/skep/token
joined=/var/lib/skep/agent

if [ -s "$5" ]; then
  install -D -m 0600 "$5" "$token"
  rm -f "$5"
elif [ ! -s "$token" ]; then
  die "$5 holds no token: \`skep token create\` on the server prints one"
fi
unpack "$1"
install_node agent "$2" --node-ip "$address" --server "https://$server:6443" --token-file "$token"

# ready asks in the name of this node, with the certificate that it got.
ready() {
  [ -s "$joined/client.pem" ] || return 1
  [ "$("$skep" --server "https://$server:6443" --request-timeout=5s --certificate-authority "$joined/ca.crt" \
    --client-certificate "$joined/client.pem" --client-key "$joined/client.pem" \
    get node "$(uname -n | tr '[:upper:]' '[:lower:]')" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}' 2>/dev/null)" = True ]
}

end=$((SECONDS + 180))
until ready; do
  if [ $SECONDS -ge $end ]; then
    service_log agent
    die "this node is not Ready after three minutes: can it reach https://$server:6443, and is the token no older than it may be?"
  fi
  sleep 0.2
done
done_with "this machine is a node of https://$server:6443"
