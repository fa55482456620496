#!/usr/bin/env bash
# Everything that needs a GPU, in one call of some ten minutes: the CUDA tests, and the tables at the GPU sizes. Results under $1.
# The rows of Inductor's budget are there so that one lies at the peak of `auto`, and one at that of `exact`.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: tools/gpu.sh RESULTS_FOLDER}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$out"
python3 -c "import importlib.metadata as m; print(m.version('actpass'))" 2>/dev/null || python3 -m pip install -q --no-deps --no-build-isolation -e .
failed=0

bench() { # bench NAME ARGUMENTS: one table; the others are made all the same if it fails
    python3 tools/bench.py --device cuda --autocast "${@:2}" --json "$out/$1.json" --markdown "$out/$1.md" || failed=1
}

bench llama-350m --workload llama-350m --batch 128 --seq 256 --rounds 3 --steps 5 \
    --rows inductor inductor-budget=0.6 inductor-budget=0.4 actcomp:exact actcomp:auto actcomp:int4
bench llama-1b --workload llama-1b --batch 128 --seq 256 --rounds 2 --steps 3 --rows inductor actcomp:auto
bench llama-60m-projections --workload llama-60m --batch 64 --seq 256 --optimizer --steps 20 --mean --rounds 3 \
    --rows inductor actcomp:haar:0.25,skip_unprofitable=false actcomp:prac:0.25,skip_unprofitable=false,activation_rank=null \
    actcomp:oasis:0.25,skip_unprofitable=false,activation_rank=null
python3 -m pytest -m gpu tests/test_gpu.py | tee "$out/tests.txt" || failed=1
exit $failed
