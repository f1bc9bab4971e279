#!/usr/bin/env bash
# Set up and run the tests, two files at a time: bash test.sh (fast), bash test.sh --all (the slow ones too).
set -euo pipefail
. "$(dirname "$0")/setup.sh"
if [ "${1:-}" = --all ]; then shift; else set -- -m "not slow" "$@"; fi
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile tests "$@"
