#!/usr/bin/env bash
# Checks style and types, then runs the tests, on all cores. Makes the environment first where it is missing.
#   bash test.sh            everything
#   bash test.sh fast       without the slow tests
#   bash test.sh ARGUMENTS  what pytest makes of them, such as tests/test_groupy.py
set -euo pipefail
cd "$(dirname "$0")"
bash config/setup.sh tests
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [[ $# == 0 || "$*" == fast ]]; then
    [[ $# == 0 ]] || set -- -m "not slow"
    set -- -n auto --dist loadfile "$@"
    export OMP_NUM_THREADS=1 # each core has a process of its own
fi
exec .venv/bin/python -m pytest "$@"
