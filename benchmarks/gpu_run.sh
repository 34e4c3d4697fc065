#!/usr/bin/env bash
# All that a GPU is needed for, in two calls of 240 and 330 seconds at most, on a bare machine that has torch, Triton and
# nvcc; in between there is time to mend what the first one found:
#
#   benchmarks/gpu_run.sh 1 FOLDER
#   benchmarks/gpu_run.sh 2 FOLDER
#
# FOLDER gets two files, also where the call is killed: see benchmarks/gpu/__init__.py.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -u -m benchmarks.gpu.calls "$@"
