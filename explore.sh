#!/usr/bin/env bash
# Serve show.py's pages to this machine's browser.
set -euo pipefail

usage="usage: explore.sh [PORT]
Serves showdir at http://127.0.0.1:PORT/, to this machine only, until Ctrl-C.
Without PORT it takes 8000, or the next one that is free."

fail() {
  echo "error: $1" >&2
  exit 1
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" > /dev/null && pwd)"
case "${1:-}" in
  -h | --help) echo "$usage"; exit 0 ;;
  "") first=8000 last=8099 ;;
  *[!0-9]* | ??????*) fail "PORT is a number from 1 to 65535, got '$1'" ;;
  *) first=$1 last=$1 ;;
esac
[[ $# -le 1 ]] || fail "explore.sh takes one argument, PORT"

[[ -f "$root/showdir/index.html" ]] \
  || fail "there is no page yet, $root/showdir/index.html: make it with python config/show.py -i PHOTO"

python="$root/.venv/bin/python"
[[ -x "$python" ]] || python="$(command -v python3)" || fail "python3 is not installed"

port="$("$python" - "$first" "$last" << 'END'
import socket
import sys

for port in range(int(sys.argv[1]), int(sys.argv[2]) + 1):
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except (OSError, OverflowError):
        continue
    print(port)
    break
END
)"
[[ -n "$port" ]] || fail "no port from $first to $last can be used, they are taken or not allowed: name another one"

address="http://127.0.0.1:$port/"
echo "$address  (Ctrl-C ends it)"
opener=""
if [[ "$(uname)" == Darwin ]]; then
  opener=open
elif [[ -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]]; then
  opener=xdg-open
fi
if [[ -n "$opener" ]] && command -v "$opener" > /dev/null; then
  (sleep 1; "$opener" "$address") > /dev/null 2>&1 & # by then the server answers
fi

# Of the server's log only failed requests are of interest.
exec "$python" -m http.server "$port" --bind 127.0.0.1 --directory "$root/showdir" \
  > /dev/null 2> >(grep --line-buffered -v '" [23][0-9][0-9] ' >&2)
