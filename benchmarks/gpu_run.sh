#!/usr/bin/env bash
# Everything that a GPU is needed for, in one call of at most nine minutes on a bare machine that has torch, Triton and nvcc:
#
#   benchmarks/gpu_run.sh OUTPUT_FOLDER
#
# Tests (odd shapes first), the sanitizer on small shapes, qualification, benchmarks with cold caches. Each stage has a
# limit of its own and leaves what it found, so that a run that is cut off still leaves a record.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: benchmarks/gpu_run.sh OUTPUT_FOLDER}")
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTHON="${PYTHON:-python3}"
failed=0

# stage NAME SECONDS COMMAND...: its output is shown, and kept in OUTPUT_FOLDER/NAME.log.
stage() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  local status=${PIPESTATUS[0]}
  echo "== $name: status $status after $((SECONDS - start)) s"
  [ "$status" = 0 ] || failed=1
}

{
  git describe --always --dirty 2>/dev/null || true
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv 2>/dev/null || true
  for name in torch triton setuptools; do
    "$PYTHON" -c "import $name; print('$name', $name.__version__)" || true
  done
} | tee "$out/machine.txt"

# The CUDA kernels for this GPU alone, in the bare minimum of time; those for CPUs are not what this is about. setup.py
# finds nvcc, or says what is missing: without them every test of theirs is skipped, which must not pass in silence.
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
stage build 90 env USE_CPP=0 USE_CUDA=1 RL_KERNELS_CUDA_ARCH_LIST="$arch" "$PYTHON" setup.py --quiet build_ext --inplace

stage linear 90 "$PYTHON" -m pytest -q -n 8 -p no:cacheprovider -m gpu tests/gpu -k "linear"
stage conv 90 "$PYTHON" -m pytest -q -n 8 -p no:cacheprovider -m gpu tests/gpu -k "conv and not linear"
stage rest 40 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/gpu -k "not right"
if command -v compute-sanitizer >/dev/null; then
  stage sanitizer 50 compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu \
    tests/gpu/test_small.py
fi
stage qualify 100 "$PYTHON" -m rl_kernels qualify --backend triton --backend cuda --device cuda --dtype bfloat16 --quick \
  --output "$out"
stage benchmarks 80 env RL_KERNELS_CACHE="$out" "$PYTHON" -m benchmarks run --device cuda --cold --dtype bfloat16 \
  --rivals ceiling,naive,add --backend triton --backend cuda --backend streamed --output "$out/benchmarks.json"
exit "$failed"
