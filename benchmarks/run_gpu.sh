#!/usr/bin/env bash
# All benchmarks on one GPU in under nine minutes:  benchmarks/run_gpu.sh OUT [NAME ...]      (with names, only these)
# What takes longer or needs more runs only where it is named: trl (a GRPO step beside TRL's, 8 minutes), ppo (20 steps of the largest PPO that a GPU
# of 140 GiB and a host of 128 hold, and one of 1B), save (seconds of a checkpoint), tail (rollouts of long-tailed lengths, 8 minutes), two, two_steps (what needs two GPUs, and whole
# steps on them) and train_tp4 (four).
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

extra() { # GROUP NAME SECONDS ARGUMENT ...: only where the group or the name is named
  local group=$1
  shift
  if [[ $names == *" $group "* || $names == *" $1 "* ]]; then names="  " run "$@"; fi
}

run kernels 80 -m pytest -q -p no:cacheprovider tests/gpu --ignore tests/gpu/test_memory.py
run attention 40 benchmarks/attention.py
SHOW=140 run train 150 benchmarks/train.py --kernels fused --profile
run plain 80 benchmarks/train.py --kernels plain --cases fixed --repeat 2
run publish 40 benchmarks/publish.py
run switch 260 benchmarks/switch.py --rollout
scratch=$(mktemp -d)
step=(benchmarks/step.py "$scratch")
extra save save 400 benchmarks/save.py "$scratch/save"
run step 240 "${step[@]}" --limit 225
extra ppo ppo 580 "${step[@]}" --mode rlhf --layers 20 --steps 20 --limit 560 batch.prompts=8
extra ppo ppo_1b 180 "${step[@]}" --mode rlhf --model 1b --limit 165
extra tail tail 560 benchmarks/tail.py --check
torchrun=(-m torch.distributed.run --nproc-per-node 2)
extra two publish_tp 60 "${torchrun[@]}" benchmarks/publish.py --train-tp 2 --engine-tp 1
extra two publish_pp 60 "${torchrun[@]}" benchmarks/publish.py --train-pp 2 --engine-tp 2
extra two train_dp 90 "${torchrun[@]}" benchmarks/train.py --kernels fused --cases fixed --repeat 2
extra two train_tp 90 "${torchrun[@]}" benchmarks/train.py --kernels fused --cases fixed --repeat 2 --tp 2
extra four train_tp4 90 -m torch.distributed.run --nproc-per-node 4 benchmarks/train.py --kernels fused --cases fixed --repeat 2 --tp 4
extra two_steps two_grpo 220 "${step[@]}" --layers 32 --limit 205 parallel.tp=2
extra two_steps two_ppo_1b 150 "${step[@]}" --mode rlhf --model 1b --limit 135
extra two_steps two_ppo 480 "${step[@]}" --mode rlhf --layers 40 --steps 20 --limit 460 parallel.tp=2 batch.prompts=8
if [[ $names == *" trl "* ]]; then
  if "$python" -c 'import trl' 2>/dev/null; then
    run trl 560 benchmarks/trl_grpo.py "$scratch"
  else
    echo "== trl: skipped, as trl is not installed (pip install trl==1.16.0 datasets liger-kernel)"
  fi
fi
rm -rf "$scratch"
exit "$failed"
