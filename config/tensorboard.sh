#!/usr/bin/env bash
# Serve the curves of logdir to this machine's browser.
set -euo pipefail

usage="usage: tensorboard.sh [PORT]
Serves the curves of logdir at http://127.0.0.1:PORT/, to this machine only, until Ctrl-C.
Without PORT it takes 6006, or one of the next that is free."

fail() {
  echo "error: $1" >&2
  exit 1
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." > /dev/null && pwd)"
case "${1:-}" in
  -h | --help) echo "$usage"; exit 0 ;;
  *[!0-9]* | ??????*) fail "PORT is a number from 1 to 65535, got '$1'" ;;
esac
[[ $# -le 1 ]] || fail "tensorboard.sh takes one argument, PORT"

tensorboard="$root/.venv/bin/tensorboard"
[[ -x "$tensorboard" ]] || tensorboard="$(command -v tensorboard)" \
  || fail "TensorBoard is not installed: pip install tensorboard"

if [[ -z "$(find "$root/logdir/" -name 'events.out.tfevents*' 2> /dev/null | head -n 1)" ]]; then
  echo "there are no curves in $root/logdir yet; they appear once python config/main.py -a train is under way"
fi
exec "$tensorboard" --logdir "$root/logdir" --host 127.0.0.1 ${1:+--port "$1"}
