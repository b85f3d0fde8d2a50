#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append --signal=USR1@120
# Start a run:  ./launch.sh MODE [CONFIG.toml ...] [key=value ...]     (./launch.sh --help lists the modes)
#
# The first call creates a virtual environment and installs all packages at the locked versions: requirements/gpu.txt
# into .venv-gpu if there is an NVIDIA GPU, else requirements/cpu.txt into .venv-cpu. Later calls
# install again only if the lock file has changed. Earlier releases used .venv for both. It is still used if
# it has the same lock file, and it is never changed.
#   ./launch.sh install cpu|gpu   install this one, with or without a GPU
#   RLHF_PYTHON=/path/to/python   use this interpreter and install nothing
#   CUDA_VISIBLE_DEVICES=         (set to the empty string) ignore the GPUs
# --help and --dry-run install nothing: they use an existing environment, or the system's Python.
# On Slurm:  sbatch --nodes=N [--gpus-per-node=8] launch.sh MODE ...  starts the run on every node. When the job is
# preempted, and two minutes before its time limit (#SBATCH line above), the run finishes the current step and saves a
# checkpoint. Then the job is requeued and continues.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -d $root/rlhf && -n ${SLURM_JOB_ID-} ]]; then # sbatch runs a copy of this file from another folder
  root=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/launch\.sh.*|\1|p')
fi
torch_cpu=https://download.pytorch.org/whl/cpu/torch/ # PyPI has only the CUDA build of torch
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

fail() {
  echo "launch.sh: $*" >&2
  exit 2
}

asks_for() { # whether a word of $1 is among the other arguments
  local argument
  for argument in "${@:2}"; do
    if [[ " $1 " == *" $argument "* ]]; then return 0; fi
  done
  return 1
}

this_machine() { # prints gpu or cpu; checks device files because nvidia-smi can take seconds
  if [[ ${CUDA_VISIBLE_DEVICES-all} != @(|-1) ]] && compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
    echo gpu
  else
    echo cpu
  fi
}

find_python() { # prints a Python of a supported version that has the module $1
  local python
  for python in python3 python3.13 python3.12 python3.11; do
    if "$python" -I -c "import sys, $1; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  fail "no Python 3.11 to 3.13 with venv: install one (on Debian and Ubuntu: apt install python3-venv), or set RLHF_PYTHON"
}

holds() { # whether folder $1 contains lock $2; the copy of the lock is written last, so it proves completeness
  [[ -x $1/bin/python ]] && cmp -s "$root/requirements/$2.txt" "$1/lock.txt"
}

install() { # installs lock $1 into an empty environment; concurrent callers wait for the first one
  # -I: ignore PYTHONPATH and the current folder.
  local name=.venv-$1 venv=$root/.venv-$1 lock=requirements/$1.txt
  local base hint="" options=(--no-deps --no-compile --only-binary=:all: --no-input --disable-pip-version-check)
  (
    flock 9
    if holds "$venv" "$1"; then exit; fi
    base=$(find_python ensurepip)
    echo "launch.sh: installing $lock into $name (a few minutes; output in $name/install.log)" >&2
    "$base" -I -m venv --clear "$venv"
    if [[ $1 == cpu ]]; then
      if reachable "$venv" "$torch_cpu"; then options+=(--find-links "$torch_cpu"); else hint="; $torch_cpu cannot be reached"; fi
    fi
    if ! "$venv/bin/python" -I -m pip install "${options[@]}" --requirement "$root/$lock" >"$venv/install.log" 2>&1; then
      fail "pip: $(grep '^ERROR' "$venv/install.log" | tail -n 1)$hint; see the full output in $name/install.log"
    fi
    cp "$root/$lock" "$venv/lock.txt"
  ) 9>"$venv.lock"
}

reachable() {
  timeout 5 "$1/bin/python" -I -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=3)' "$2" 2>/dev/null
}

any_python() { # prints the Python of any complete environment, or else the system's
  local venv
  for venv in "$root/.venv-$(this_machine)" "$root"/.venv{,-cpu,-gpu}; do
    if [[ -x $venv/bin/python && -f $venv/lock.txt ]]; then
      echo "$venv/bin/python"
      return
    fi
  done
  find_python sys
}

choose_python() { # sets python to this machine's environment, and installs it if needed; $@ is what will run
  local kind venv
  if [[ -n $python ]]; then return; fi
  kind=$(this_machine)
  for venv in "$root/.venv-$kind" "$root/.venv"; do
    if holds "$venv" "$kind"; then
      python=$venv/bin/python
      return
    fi
  done
  if (($#)); then # report a wrong mode before the installation, not after it
    python=$(any_python)
    "$python" "$@" --help >/dev/null || exit
  fi
  install "$kind"
  python=$root/.venv-$kind/bin/python
}

check() { # what CI checks; with arguments, only pytest with these arguments
  cd "$root"
  if (($#)); then
    exec "$python" -m pytest "$@"
  fi
  "$python" -m ruff format --check .
  "$python" -m ruff check .
  "$python" -m mypy
  exec "$python" -m pytest --durations=15
}

python=""
if [[ -n ${RLHF_PYTHON-} ]]; then
  python=$(command -v "$RLHF_PYTHON") || fail "RLHF_PYTHON=$RLHF_PYTHON is not an executable: give the path of a Python, or unset it"
fi
if [[ ${1-} == @(install|test) ]] && asks_for "-h --help" "$@"; then
  set -- --help
fi
light="-h --help" # commands with these options install nothing
case ${1-} in
  install)
    [[ $# == 2 && $2 == @(cpu|gpu) ]] || fail "install takes cpu or gpu, not '${*:2}': ./launch.sh install cpu"
    [[ -z $python ]] || fail "install $2: RLHF_PYTHON is set, so nothing can be installed; unset it"
    install "$2"
    echo "launch.sh: requirements/$2.txt is installed in $root/.venv-$2"
    exit
    ;;
  test)
    choose_python
    check "${@:2}"
    ;;
  demo | tutorial | prepare_data)
    run=("$root/tools/$1.py" "${@:2}")
    ;;
  *)
    run=(-P -m rlhf "${@:---help}") # -P: do not import modules, such as a torch.py, from the current folder
    light+=" --dry-run"
    ;;
esac
if [[ -z $python ]] && asks_for "$light" "${@:---help}"; then
  python=$(any_python)
fi
choose_python "${run[@]}"
exec "$python" "${run[@]}"
