#!/usr/bin/env bash
# Check PyTorch on this machine's GPU: bash gpu_check.sh (under ten minutes; out/gpu_check.json).
#   bash gpu_check.sh --quick          trains the short form on it too, and compares its speed
#   bash gpu_check.sh cpu              the same checks at a tiny size
#   bash gpu_check.sh --backend=mlx    MLX on Apple silicon (out/metal_check.json)
set -euo pipefail
. "$(dirname "$0")/setup.sh"
if [ "${1:-}" = --backend=mlx ]; then
  shift
  exec .venv/bin/python -m speed.metal_check "$@"
fi
# model.py sets it for the scripts, before they import torch; speed/gpu_check.py imports it at once.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
if [ "${1:-}" = --quick ]; then
  # A check that fails does not keep the story from being tried.
  status=0
  .venv/bin/python -m speed.gpu_check || status=$?
  bash run.sh --quick --run=gpu_check --backend=torch --device=cuda
  .venv/bin/python bench.py --run=gpu_check
  exit $status
fi
exec .venv/bin/python -m speed.gpu_check "$@"
