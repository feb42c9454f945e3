#!/usr/bin/env bash
# What a job would find on this machine, for `python -m biomerge_lib preflight --site`, which adds the model and W&B.
#
# Prints a verdict, a check and what there is to say, with tabs between, a line each; behind a NUL the environment that
# a job has after its modules. Settings are those of slurm/site.sh and the environment.
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit
WORKROOT=$PWD
# shellcheck disable=SC1091
source slurm/common.sh
SAID=$(mktemp) || exit
trap 'rm -f -- "$SAID"' EXIT
NEEDED_GB=20 # an 8B is 16 GB wherever it lies: in HF_HOME, in backbones/, merged in a run folder

told() { # verdict check text
  printf '%s\t%s\t%s\n' "$1" "$2" "$(tr '\n\t' '  ' <<<"$3")"
}

# Tells the warning or the error that a step of a job prints, or that all is well.
check() { # check "all is well" command ...
  local verdict=ok said
  "${@:3}" >"$SAID" 2>&1 || verdict=refused
  said=$(sed 's/^.*\(WARNING\|ERROR\): *//' "$SAID")
  if grep -q 'WARNING: ' "$SAID"; then verdict=warning; fi
  told "$verdict" "$1" "${said:-$2}"
}

apart() { ("$@"); } # what may end the job must not end this

check_jobs() {
  local file=${JOB_FILE:-slurm/job_single_ner.sbatch} said
  if ! command -v sbatch >/dev/null; then
    told note sbatch "there is no sbatch on this machine: jobs are submitted from a login node"
  elif said=$(sbatch --test-only "$file" 2>&1); then
    told ok sbatch "$file: $(grep -o 'to start at.*' <<<"$said")"
  else
    told refused sbatch "$file: ${said##*sbatch: }. Set SBATCH_PARTITION, SBATCH_GRES, SBATCH_ACCOUNT in slurm/site.sh\
$(sinfo --noheader --format='; there is partition %P with %G' 2>/dev/null | sort -u | tr -d '\n')"
  fi
}

# The environment's CUDA against the driver's. A driver runs what is built for its own CUDA version or an older one.
check_driver() {
  local built python smi driver serves
  python=$([[ -x $VENV/bin/python ]] && echo "$VENV/bin/python" || echo "$WORKROOT/.venv/bin/python")
  built=$("$python" -Ic 'import importlib.metadata as m
print(max((d.version for d in m.distributions() if d.name.startswith("nvidia-cuda-runtime")), default=""))' 2>/dev/null)
  [[ -n $built || ! -x $python ]] ||
    told warning cuda "the environment is for a CPU alone. For GPUs: BIOMERGE_DEVICE=cuda bash slurm/setup_env.sh"
  if ! smi=$(nvidia-smi 2>&1); then
    told note driver "no GPU on this machine, so that its driver is not seen. On a compute node: sbatch --gres=gpu:1 \
--time=10 --output=logs/site-%j.out --wrap='$python -m biomerge_lib preflight --site'"
    return
  fi
  driver=$(sed -n 's/.*\(Driver\|KMD\) Version: *\([0-9.]*\).*/\2/p' <<<"$smi" | head -n 1)
  serves=$(sed -n 's/.*CUDA [A-Z ]*Version: *\([0-9.]*\).*/\1/p' <<<"$smi" | head -n 1)
  if [[ -n $built && ${serves%%.*} -lt ${built%%.*} ]]; then
    told refused driver "driver $driver serves CUDA ${serves:-?}, the environment is built for CUDA ${built%.*}, which wants a \
newer one (CUDA 13: 580, CUDA 12: 525). Take nodes that have it, or load CUDA's compatibility libraries, or install torch for an older CUDA: \
docs/cluster.md#an-older-driver"
  else
    told ok driver "$(nvidia-smi --query-gpu=name,memory.total --format=csv,noheader | paste -sd ';'): driver $driver, CUDA $serves"
  fi
}

check_place() { # name folder
  local place=$2 free
  while [[ ! -e $place ]]; do place=$(dirname -- "$place"); done
  free=$(df -Pk -- "$place" | awk 'NR == 2 { print int($4 / 1000000) }')
  if ! is_writable "$place"; then
    told refused disk "$1: $2 cannot be written. Set $1 in slurm/site.sh to a folder that can be"
  elif ((free < NEEDED_GB)); then
    told warning disk "$1: $2 has $free GB free, a copy of an 8B is 16 GB. Set $1 in slurm/site.sh to a place with room"
  else
    told ok disk "$1: $2 has $free GB free (a quota may be smaller)"
  fi
}

if [[ -r slurm/site.sh ]]; then
  told ok site "$WORKROOT/slurm/site.sh"
else
  told note site "there is no slurm/site.sh, so the defaults hold: cp slurm/site.example.sh slurm/site.sh, and edit it"
fi
check modules "${MODULES:-none are asked for}" load_modules
check venv "$VENV" apart activate_environment
check_jobs
check_driver
check archive "run folders are kept in $ARCHIVE" apart find_archive
[[ $ARCHIVE == /* ]] || ARCHIVE=$WORKROOT/$ARCHIVE
check_place ARCHIVE "$ARCHIVE"
check_place WORKROOT "$WORKROOT/backbones"
check_place HF_HOME "${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}"
check_place XDG_CACHE_HOME "${XDG_CACHE_HOME:-$HOME/.cache}"
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  check TMPDIR "${TMPDIR:-/tmp} has room for a copy of the project" has_room
fi
printf '\0'
env -0
