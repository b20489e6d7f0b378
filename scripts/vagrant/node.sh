# SPDX-License-Identifier: Apache-2.0
# What server.sh and agent.sh share; sourced by bash.
#
#   SKEP_BIN_DIR   where the binaries go (default /usr/local/bin)
#   SKEP_START=no  install and stop there, to make an image of a machine: its first boot starts the service
. "$(dirname "${BASH_SOURCE[0]}")/../host.sh"

bin=${SKEP_BIN_DIR:-/usr/local/bin}
skep=$bin/skep

die() {
  echo "$1" >&2
  exit 1
}

# unpack ARCHIVE sets unpacked to a directory with what the archive holds, until the script ends.
unpack() {
  local top
  [ -f "$1" ] || die "$1: there is no such archive: \`make dist\` makes it"
  top=$(mktemp -d)
  # shellcheck disable=SC2064 # top is local
  trap "rm -rf '$top'" EXIT
  tar -xf "$1" -C "$top" || die "$1 cannot be unpacked: make it again (\`make dist\`)"
  set -- "$top"/*/install.sh
  [ -f "$1" ] || die "the archive holds no install.sh: is it one of \`make dist\`?"
  unpacked=$(dirname "$1")
}

# install_node ROLE IMAGES [FLAG...] puts skep and the archives of images in place, from what was unpacked,
# and lets systemd start it. The images come first: a node imports them when it starts.
install_node() {
  local role=$1 images=$2 image start=()
  shift 2
  say "Host"
  install_missing runc runc iptables iptables
  done_with "this host has what skep needs"
  say "Images"
  for image in "$images"/*.tar; do
    [ -f "$image" ] || die "$images: there are no archives of images here: \`make images\` makes them"
    install -D -m 0644 "$image" "/var/lib/skep/images/$(basename "$image")"
    done_with "/var/lib/skep/images/$(basename "$image")"
  done
  say "skep $role"
  [ "${SKEP_START:-yes}" != no ] || start=(--no-start)
  sh "$unpacked/install.sh" "$role" --bin-dir "$bin" "${start[@]}" "$@"
  if [ "${SKEP_START:-yes}" = no ]; then
    done_with "installed and not started"
    exit 0
  fi
}

# service_log ROLE prints the last that the service said, for whoever has to find out why it does not run.
service_log() {
  ! command -v journalctl >/dev/null || journalctl --no-pager -q -n 20 -u "skep-$1" >&2 || true
}
