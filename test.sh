#!/usr/bin/env bash
# Set up and run the tests, two files at a time: bash test.sh (fast), bash test.sh --all (slow too).
# Format, lint and types come first: they take seconds.
#   bash test.sh --kills    kills tiny runs 150 times (an hour; again: goes on where it was)
set -euo pipefail
. "$(dirname "$0")/setup.sh"
if [ "${1:-}" = --kills ]; then
  shift
  # On several threads, sums are rounded in another order each time.
  OMP_NUM_THREADS=1 PYTHONPATH=. exec .venv/bin/python tests/kill_campaign.py "$@"
fi
.venv/bin/ruff format --check --quiet .
.venv/bin/ruff check --quiet .
.venv/bin/pyrefly check --output-format min-text
if [ "${1:-}" = --all ]; then
  shift
else
  set -- -m "not slow" "$@"
fi
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
