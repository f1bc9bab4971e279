#!/usr/bin/env bash
# Put the paper's claims to the test: every row of its table for five seeds, two side by side.
#   bash reproduce.sh              at most five hours; again: it goes on where it stopped
#   bash reproduce.sh --hours=2    stops sooner
#   bash reproduce.sh --page       writes docs/reproduction.md from what is there
set -euo pipefail
. "$(dirname "$0")/setup.sh"
exec .venv/bin/python -m evaluation.reproduction "$@"
