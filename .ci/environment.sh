#!/bin/sh
# environment.sh PYTHON VENV: a virtual environment that holds torch. A torch >= 2.6 that PYTHON already imports is kept
# (a CUDA machine keeps its CUDA build); otherwise the version in constraints.txt is installed.
set -eu
python=$1 venv=$2
if "$python" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6))' 2>/dev/null; then
    "$python" -m venv --system-site-packages "$venv"
    grep -v -E '^(torch|triton)==' constraints.txt > "$venv/constraints.txt"
else
    "$python" -m venv "$venv"
    cp constraints.txt "$venv/constraints.txt"
    "$venv/bin/pip" install -q "$(grep '^torch==' constraints.txt)"
fi
