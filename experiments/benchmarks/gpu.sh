#!/usr/bin/env bash
# Every GPU figure of the project in one call, correctness first: run from the repository's root on a machine with one CUDA GPU.
#     bash experiments/benchmarks/gpu.sh | tee experiments/benchmarks/gpu-<date>.txt
# Python packages must be there (pip install -e . or wheels); nothing is downloaded.
set -euo pipefail
PYTHON=${PYTHON:-python3}
export PYTHONPATH=${PYTHONPATH:-.} HYDRA_FULL_ERROR=1
echo "date $(date -u +%Y-%m-%d) commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
$PYTHON experiments/benchmarks/gpu.py
