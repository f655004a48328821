#!/usr/bin/env bash
# Makes .venv with everything that the program needs, and with the argument `tests` its tests too, unless it is there
# already.
# PYTHON names another interpreter than python3. A suitable torch that this interpreter has is used, not fetched again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

files=(requirements.txt)
[ "${1:-}" != tests ] || files+=(tests/requirements.txt)
# Each file that was installed has left its checksum.
missing=()
for file in "${files[@]}"; do
    [ "$(cat ".venv/ready/${file//\//-}" 2>/dev/null)" = "$(cat requirements*.txt "$file" | cksum)" ] || missing+=("$file")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
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
    echo "making .venv with $("$python" --version)${torch:+ and the torch that it has}; if PyTorch has to be downloaded, that is large"
    "$python" -m venv .venv
    if [ -n "$torch" ]; then
        echo "$torch" > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    fi
fi
.venv/bin/python -m pip install --disable-pip-version-check "${missing[@]/#/-r}"
[ -d .venv/ready ] || rm -f .venv/ready # a file in its place would be in the way
mkdir -p .venv/ready
for file in "${missing[@]}"; do
    cat requirements*.txt "$file" | cksum > ".venv/ready/${file//\//-}"
done
