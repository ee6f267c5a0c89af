#!/usr/bin/env bash
# What only a GPU can tell, in under 8 minutes: which kernels its compiler takes, the peak of its memory, and times.
#
#   measurements/on_gpu.sh [FILE]            appends JSON lines to FILE (measurements/gpu.jsonl); from the repository's root
#   SMALL=1 measurements/on_gpu.sh [FILE]    the same commands on the CPU, at sizes for a trial
#   PYTHON=python3.13                        the interpreter; it needs jaxrelu[benchmark], with jax for the GPU
set -euo pipefail

file=${1:-measurements/gpu.jsonl}
platform=gpu sizes=2^20,2^27 shape="--batch 16384 --width 1024" seconds=(60 40 360)
if [[ ${SMALL:-} ]]; then
  platform=cpu sizes=2^12 shape="--batch 128 --width 256 --layers 2" seconds=(300 300 1200)
fi

cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
# a process that measures a peak must find its program compiled: trying kernels takes memory too, and the peak never falls
export JAX_COMPILATION_CACHE_DIR=$cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
# the processes of the peaks stand beside the one that started them
export XLA_PYTHON_CLIENT_PREALLOCATE=false

failed=0
# Runs the benchmark for at most so many seconds; what it has measured until then is kept.
measure() {
  timeout --signal=INT --kill-after=10 "$1" "${PYTHON:-python}" -m jaxrelu.benchmark --platform "$platform" \
    --dtype float32,bfloat16 --json "$file" "${@:2}" || failed=$?
  echo "$SECONDS s so far"
}

# bandwidth beside a copy
measure "${seconds[0]}" --what elementwise --activations relu,leaky_relu,elu --sizes "$sizes" --quick
# elu's polynomial beside jnp's functions
measure "${seconds[1]}" --what expm1 --sizes "$sizes" --quick
# shape stays unquoted, as it is several words
measure "${seconds[2]}" --what memory,step,peak --networks mlp,conv,conv_norm,resnet18,transformer \
  --activations relu $shape --quick
exit "$failed"
