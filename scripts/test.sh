#!/usr/bin/env bash
# Set up what the tests need and run every test and the linter; further arguments go to pytest.
# Tests run side by side, a thread each: most of the time they start scripts, which is one thread's work. -n 0: one by one.
#   bash scripts/test.sh          bash scripts/test.sh tests/test_models.py -k arcface -n 0
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh requirements-dev.txt
"$PYTHON" -m ruff check .
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
