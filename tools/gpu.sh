#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the CUDA tests, and the five-row tables at the GPU sizes. Results under $1.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: tools/gpu.sh RESULTS_FOLDER}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$out"
python3 -c "import importlib.metadata as m; print(m.version('actpass'))" 2>/dev/null || python3 -m pip install -q --no-deps --no-build-isolation -e .
python3 -m pytest -m gpu tests/test_gpu.py | tee "$out/tests.txt"
rows="eager inductor inductor-budget=0.5 inductor-recompute inductor-fp8 actcomp:exact actcomp:auto actcomp:int4 actcomp:haar:0.25"
for workload in llama-60m llama-130m llama-350m; do
    # shellcheck disable=SC2086
    python3 tools/bench.py --workload "$workload" --device cuda --autocast --rows $rows \
        --json "$out/$workload.json" --markdown "$out/$workload.md"
done
