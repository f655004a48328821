#!/usr/bin/env bash
# Runs the linter and the tests; makes the environment first where it is missing. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
bash config/setup.sh
.venv/bin/ruff check .
exec .venv/bin/python -m pytest "$@"
