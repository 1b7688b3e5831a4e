#!/usr/bin/env bash
# Set up what the tests need and run every test and the linter; further arguments go to pytest.
#   bash scripts/test.sh          bash scripts/test.sh tests/test_models.py -k arcface
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh requirements-dev.txt
"$PYTHON" -m ruff check .
HF_HUB_OFFLINE=1 "$PYTHON" -m pytest "$@"
