#!/usr/bin/env bash
# All benchmarks on one GPU in under nine minutes:  benchmarks/run_gpu.sh OUT [NAME ...]      (with names, only these)
# trl, the comparison with TRL, runs only where it is named: it takes eight more.
#
# Each has a time limit of its own, so that one that fails does not take the others with it. OUT/results.jsonl collects the JSON lines, which
# belong into benchmarks/results/ when they are to be kept (benchmarks/table.py makes the README's table of them); OUT/NAME.log is what each said.
#   PYTHON=python3     the interpreter
set -uo pipefail

names=" ${*:2} "
out=$(mkdir -p -- "$1" && cd -- "$1" && pwd)
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
failed=0

run() { # NAME SECONDS ARGUMENT ...
  local name=$1 limit=$2 start=$SECONDS rc=0
  shift 2
  [[ $names == "  " || $names == *" $name "* ]] || return 0
  timeout -k 5 "$limit" "$python" "$@" >"$out/$name.log" 2>&1 || rc=$?
  grep '^{"benchmark"' "$out/$name.log" >>"$out/results.jsonl"
  echo "== $name: exit code $rc after $((SECONDS - start)) s"
  if ((rc)); then
    failed=1
    tail -n 25 "$out/$name.log"
  else
    grep -v '^{"benchmark"' "$out/$name.log" | tail -n "${SHOW:-60}"
  fi
}

run kernels 60 -m pytest -q -p no:cacheprovider tests/gpu/test_kernels.py tests/gpu/test_attention.py
run attention 40 benchmarks/attention.py
SHOW=140 run train 150 benchmarks/train.py --kernels fused --profile
run plain 80 benchmarks/train.py --kernels plain --cases fixed --repeat 2
run publish 40 benchmarks/publish.py
run switch 210 benchmarks/switch.py --rollout
scratch=$(mktemp -d)
run step 240 benchmarks/step.py "$scratch" --limit 225
if [[ $names == *" trl "* ]]; then
  if "$python" -c 'import trl' 2>/dev/null; then
    run trl 560 benchmarks/trl_grpo.py "$scratch"
  else
    echo "== trl: skipped, as trl is not installed (pip install trl==1.16.0 datasets liger-kernel)"
  fi
fi
rm -rf "$scratch"
exit "$failed"
