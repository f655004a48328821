#!/usr/bin/env bash
# Makes .venv with everything that the program and its tests need, unless it is there already.
# PYTHON names another interpreter than python3. A suitable torch that this interpreter has is used, not fetched again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted=$(cat requirements.txt tests/requirements.txt | cksum)
if [ -x .venv/bin/python ] && [ "$(cat .venv/ready 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
python=""
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if suits "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: Python 3.10 or newer is needed (looked for ${PYTHON:-python3}); install it, or name one: PYTHON=... bash $0" >&2
    exit 2
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "error: $python has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 2
fi

# Where the interpreter has a torch that suits, in a virtual environment of its own or not.
torch=$("$python" -c '
import os, torch
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 4)
print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null) || torch=""
echo "making .venv with $("$python" --version)${torch:+ and the torch that it has}; a torch to fetch is a large download"
"$python" -m venv .venv
if [ -n "$torch" ]; then
    echo "$torch" > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
fi
.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
echo "$wanted" > .venv/ready
