#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append --signal=USR1@120
# The one entry:  ./launch.sh MODE [CONFIG.toml ...] [key=value ...]     (./launch.sh --help lists the modes)
#
# The first call makes .venv and installs a complete lock into it: requirements/gpu.txt where there is an NVIDIA GPU, else
# requirements/cpu.txt. Later calls only start Python, until that lock changes.
#   RLHF_PYTHON=/path/to/python   use this interpreter and install nothing
#   CUDA_VISIBLE_DEVICES=         (set, but empty) pretend that there is no GPU
# On Slurm:  sbatch --nodes=N [--gpus-per-node=8] launch.sh MODE ...  starts it on every node; preempted, or two minutes before its time is
# over (the #SBATCH line above), the run saves the step at hand, is requeued, and continues.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -d $root/rlhf && -n ${SLURM_JOB_ID-} ]]; then # sbatch runs a copy of this file, somewhere else
  root=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/launch\.sh.*|\1|p')
fi
venv=$root/.venv
torch_cpu=https://download.pytorch.org/whl/cpu/torch/ # PyPI's torch is a CUDA build
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

fail() {
  echo "launch.sh: $*" >&2
  exit 2
}

lock_file() { # device files, because nvidia-smi can take seconds to answer
  if [[ ${CUDA_VISIBLE_DEVICES-all} != @(|-1) ]] && compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
    echo "$root/requirements/gpu.txt"
  else
    echo "$root/requirements/cpu.txt"
  fi
}

find_python() { # one that can make virtual environments and that the locks have wheels for
  local python
  for python in python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  fail "no Python 3.11 to 3.13 with venv: install one (on Debian and Ubuntu: apt install python3-venv), or set RLHF_PYTHON"
}

installed() { # the stamp is a copy of the lock, written last, so a broken installation has none
  [[ -x $venv/bin/python ]] && cmp -s "$lock" "$venv/lock.txt"
}

install() { # anew, never over an older lock; of several callers one installs and the others wait
  local python hint="" options=(--no-deps --no-compile --only-binary=:all: --no-input --disable-pip-version-check)
  (
    flock 9
    installed && exit
    python=$(find_python)
    echo "launch.sh: installing ${lock#"$root/"} into .venv (a few minutes; output in .venv/install.log)" >&2
    "$python" -m venv --clear "$venv"
    if [[ $lock == */cpu.txt ]]; then
      if reachable "$torch_cpu"; then options+=(--find-links "$torch_cpu"); else hint="; $torch_cpu is out of reach"; fi
    fi
    # -I: what the caller's PYTHONPATH holds does not count as installed.
    if ! "$venv/bin/python" -I -m pip install "${options[@]}" --requirement "$lock" >"$venv/install.log" 2>&1; then
      fail "pip: $(grep '^ERROR' "$venv/install.log" | tail -n 1)$hint; all of its output is in .venv/install.log"
    fi
    cp "$lock" "$venv/lock.txt"
  ) 9>"$venv.lock"
}

reachable() {
  timeout 5 "$venv/bin/python" -I -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=3)' "$1" 2>/dev/null
}

choose_python() { # sets python
  if [[ -n ${RLHF_PYTHON-} ]]; then
    python=$(command -v "$RLHF_PYTHON") || fail "RLHF_PYTHON=$RLHF_PYTHON is not an executable: give the path of a Python, or unset it"
    return
  fi
  lock=$(lock_file)
  installed || install
  python=$venv/bin/python
}

asks_for_help() { # no argument at all does, too
  local argument
  for argument in "${@:---help}"; do
    if [[ $argument == --help || $argument == -h ]]; then return 0; fi
  done
  return 1
}

check() { # everything that CI checks; with arguments, only those tests
  cd "$root"
  if (($#)); then
    exec "$python" -m pytest "$@"
  fi
  "$python" -m ruff format --check .
  "$python" -m ruff check .
  "$python" -m mypy
  exec "$python" -m pytest --durations=15
}

case ${1-} in
  test)
    choose_python
    check "${@:2}"
    ;;
  demo | tutorial)
    choose_python
    exec "$python" "$root/tools/$1.py" "${@:2}"
    ;;
  prepare_data)
    choose_python
    exec "$python" "$root/tools/prepare_data.py" "${@:2}"
    ;;
esac
if asks_for_help "$@" && [[ -z ${RLHF_PYTHON-} && ! -x $venv/bin/python ]]; then
  python=$(find_python) # help needs nothing but Python, and should not wait for an installation
else
  choose_python
fi
exec "$python" -m rlhf "${@:---help}"
