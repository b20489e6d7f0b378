# SPDX-License-Identifier: Apache-2.0
# What the other scripts share; sourced by bash.

# Under sudo the caller's PATH holds, and on Debian a user's has no sbin, where iptables is.
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '\n\033[1m%s\033[0m\n' "$1"; }
done_with() { printf '  \033[32m✓\033[0m %s\n' "$1"; }

need_root() {
  [ "$(id -u)" = 0 ] && return 0
  echo "This needs root: run it with sudo, or as root." >&2
  exit 1
}

# hand_back gives the user who called sudo what root wrote into the Go caches and the build directory:
# otherwise that user's next build could not write there.
hand_back() {
  [ -n "${SUDO_UID:-}" ] || return 0
  local dir
  for dir in .build "$(go env GOCACHE)" "$(go env GOMODCACHE)"; do
    [ ! -d "$dir" ] || find "$dir" -user 0 -exec chown -h "$SUDO_UID:$SUDO_GID" {} +
  done
}

# install_missing COMMAND PACKAGE [COMMAND PACKAGE...] installs what the host lacks.
install_missing() {
  local packages=()
  while [ $# -ge 2 ]; do
    command -v "$1" >/dev/null 2>&1 || packages+=("$2")
    shift 2
  done
  [ ${#packages[@]} -eq 0 ] && return 0
  need_root
  echo "  installing ${packages[*]}" >&2
  if command -v apt-get >/dev/null; then
    apt-get update -qq >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
  elif command -v dnf >/dev/null; then
    dnf install -y -q "${packages[@]}"
  elif command -v zypper >/dev/null; then
    zypper --non-interactive --quiet install "${packages[@]}"
  elif command -v pacman >/dev/null; then
    pacman -S --noconfirm --quiet "${packages[@]}"
  else
    echo "Install these by hand, then run this again: ${packages[*]}" >&2
    return 1
  fi
}

# running_server prints the process id of the server that runs on this host, if there is one.
running_server() {
  local pid
  pid=$(cat /run/skep/server.pid 2>/dev/null) || return 0
  case "$(readlink "/proc/$pid/exe" 2>/dev/null)" in
    */skep | */skep\ \(deleted\)) echo "$pid" ;;
  esac
}

# stop_server PID ends the server orderly and waits until it is gone.
stop_server() {
  kill -TERM "$1" 2>/dev/null || return 0
  tail --pid="$1" -f /dev/null
}

# http_get ADDRESS PORT PATH prints the body of a page; bash's own sockets, because a fresh machine
# may have no curl. The status is 0 only for an answer of 200.
http_get() {
  local line status
  exec 9<>"/dev/tcp/$1/$2" || return 1
  printf 'GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: make-run\r\nConnection: close\r\n\r\n' "$3" "$1" >&9
  read -r -t 5 -u 9 _ status _ || { exec 9>&-; return 1; }
  while read -r -t 5 -u 9 line && [ -n "${line%$'\r'}" ]; do :; done
  timeout 5 cat <&9 || true
  exec 9>&-
  [ "$status" = 200 ]
}

# wait_for_page ADDRESS PORT PATH prints the first page that comes, within a minute.
wait_for_page() {
  local end=$((SECONDS + 60)) body
  while [ $SECONDS -lt $end ]; do
    if body=$(http_get "$@" 2>/dev/null); then
      printf '%s\n' "$body" | tr -d '\r'
      return 0
    fi
    sleep 0.1
  done
  return 1
}
