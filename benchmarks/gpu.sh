#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests, then figures for one or more shapes.
#   benchmarks/gpu.sh RESULTS_DIR [SHAPE ...]
# Uses the python3 on PATH with what is installed there. Checkpoints go to CHECKPOINTS (default
# /dev/shm/otpipe, since a 14B one has 30 GB), pads to PADS (default a temporary directory).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results="${1:?give a directory for the results}"
shift
mkdir -p "$results"
checkpoints="${CHECKPOINTS:-/dev/shm/otpipe}"
pads="${PADS:-$(mktemp -d)}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

echo "== tests that need a GPU"
timeout 240 python3 -m pytest -m gpu -p no:cacheprovider --no-header 2>&1 | tail -25 |
    tee "$results/tests.txt"

for shape in "$@"; do
    echo "== $shape"
    timeout "${SHAPE_TIMEOUT:-480}" python3 benchmarks/end_to_end.py --shape "$shape" --device cuda \
        --configs "${CONFIGS:-1:nccl,2:gloo}" --dtypes bfloat16 --repeats "${REPEATS:-3}" \
        --prefill-repeats "${PREFILL_REPEATS:-1}" --no-check --checkpoints "$checkpoints" \
        --store "$pads" --out "$results/$shape.json" 2>"$results/$shape.log" |
        tee "$results/$shape.md"
    tail -12 "$results/$shape.log"
    rm -rf "$checkpoints/$shape-None" "${pads:?}/pads"
done
