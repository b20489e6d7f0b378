#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `make run`: from this checkout to examples/hello answering on port 80. Run twice, it converges.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/host.sh
need_root

skep=$PWD/.build/bin/skep
log=/var/log/skep.log
words=/var/log/skep.err
data=/var/lib/skep

say "Host"
install_missing runc runc iptables iptables
checks=$("$skep" check 2>&1) || { printf '%s\n' "$checks"; exit 1; }
done_with "this host has what skep needs (\`skep check\` prints the list)"

say "Images"
mkdir -p "$data/images"
for archive in .build/images/*.tar; do
  cmp -s "$archive" "$data/images/$(basename "$archive")" || install -m 0644 "$archive" "$data/images/"
done
done_with "$(ls "$data/images" | tr '\n' ' ')in $data/images: the node imports them, no registry is needed"

say "Server"
pid=$(running_server)
if [ -n "$pid" ] && ! cmp -s "/proc/$pid/exe" "$skep"; then
  stop_server "$pid"
  done_with "stopped process $pid, which ran an older build; its pods keep running"
  pid=
fi
if [ -z "$pid" ]; then
  # The log file is rotated; what goes to standard error is a server's last words.
  setsid "$skep" server --log-file "$log" >"$words" 2>&1 </dev/null &
  pid=$!
fi
if ! "$skep" status --wait 2m >/dev/null; then
  echo "skep server did not become ready; the end of $log:" >&2
  tail -q -n 20 "$log" "$words" >&2
  exit 1
fi
done_with "process $pid, log in $log"
"$skep" status | sed 's/^/    /'

say "Application"
"$skep" apply -f examples/hello | sed 's/^/    /'
"$skep" rollout status -n hello deployment/hello --timeout=3m | sed 's/^/    /'

say "Ingress"
address=$("$skep" get nodes -o 'jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}' | cut -d' ' -f1)
answer=$(wait_for_page "$address" 80 /) || { echo "http://$address/ does not answer; see $log" >&2; exit 1; }
done_with "http://$address/ answers:"
printf '%s\n' "$answer" | sed 's/^/    | /'

sudo=${SUDO_UID:+sudo }
cat <<EOT

The application in examples/hello runs on this machine.
  page          http://$address/          (the same on NodePort: http://$address:30080/)
  kubeconfig    /etc/skep/kubeconfig      (kubectl, helm and k9s work with it, too)
  skep          $skep
What to try next
  $sudo$skep get pods -A -o wide
  $sudo$skep logs -n hello deployment/hello -f
  $sudo$skep scale -n hello deployment/hello --replicas=5
  $sudo$skep exec -n hello -it deployment/hello -- /web --help
  make clean    takes every trace off this machine
EOT
