#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs skep from the unpacked archive that this file lies in: what `skep install` does, after a look
# at the host.
# usage: install.sh server|agent [flags of `skep server` or `skep agent`]
#        install.sh uninstall
set -eu
here=$(cd "$(dirname "$0")" && pwd)
[ "$(id -u)" = 0 ] || { echo "install.sh writes where only root may: run it with sudo" >&2; exit 1; }
case ${1-} in
server | agent)
  "$here/skep" check >/dev/null || { "$here/skep" check || true; echo "this host cannot run skep yet: see above" >&2; exit 1; }
  exec "$here/skep" install "$@"
  ;;
uninstall)
  shift
  exec "$here/skep" uninstall "$@"
  ;;
*)
  sed -n 's/^# usage: //p; s/^#        //p' "$0" >&2
  exit 2
  ;;
esac
