#!/usr/bin/env bash
# What the job files share; each sources it from the project folder. It carries a job from its first line to its last:
#
#   site -> modules -> environment -> archive -> workplace -> the notebooks -> results back -> requeue or report
#
# The workplace is a copy of the project on the node's own disk: code as it was when the job began, data/ by rsync, an
# empty runs/. Relative paths mean the same there, so a run has the same parameters and the same name as on a laptop.
# runs/ is copied to the archive every COPY_SECONDS and at every end: success, failure, scancel, time limit.

# --- Your site: slurm/site.sh, made from site.example.sh. What the environment says counts more. ----------------------
WORKROOT=${WORKROOT:-$PWD} # the project; the job files prefer the folder that sbatch was called in
if [[ -r $WORKROOT/slurm/site.sh ]]; then
  GIVEN=$(export -p)
  set -a
  # shellcheck disable=SC1091  # every site has its own
  source "$WORKROOT/slurm/site.sh" || echo "WARNING: $WORKROOT/slurm/site.sh ended with an error (above)"
  set +a
  eval "$GIVEN"
fi
VENV=${VENV:-$WORKROOT/.venv}      # the environment; where it is missing, WORKROOT/.venv
MODULES=${MODULES:-}               # modules to load, separated by spaces
ARCHIVE=${ARCHIVE:-runs}           # folder of the run folders that stay; relative to WORKROOT
PERSIST_DATA=${PERSIST_DATA:-data} # what a job needs of the project's data; relative to WORKROOT
MIN_TMP_GB=${MIN_TMP_GB:-20}       # less than this free on the node's disk: the job works in the archive
COPY_SECONDS=${COPY_SECONDS:-600}  # between two copies of runs/; a node that dies costs one
MAX_REQUEUES=${MAX_REQUEUES:-10}
STOP_SECONDS=${STOP_SECONDS:-240} # from the signal before the time limit to the end of training; < 300
TERM_SECONDS=${TERM_SECONDS:-20}  # from SIGTERM to the end of training; less than the cluster's KillWait
export WANDB_PROJECT=${WANDB_PROJECT:-TaskMerge}
# ----------------------------------------------------------------------------------------------------------------------

export PYTHONUTF8=1 TOKENIZERS_PARALLELISM=false
INTERRUPTED=75 # python -m biomerge_lib: training stopped on request, with a checkpoint
RESTARTS=${SLURM_RESTART_COUNT:-0}
JOB_NAME=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
JOB_NAME=${JOB_NAME:-${SLURM_JOB_ID:-}}
CODE=(biomerge_lib notebooks parameters) # copied; all else in the project is linked
LEAVE_OUT=()                             # what of runs/ is not copied back
OVERRIDES=()
WORKPLACE='' STAGED='' BIOMERGE_JOB_DIR='' STAGE='' CHILD='' COPIER='' TIMER='' SIGNALLED='' ENDED='' COPIED=yes

say() { printf '%s%(%F %T)T: %s\n' "${JOB_NAME:+job $JOB_NAME, }" -1 "$*"; }
warn() { say "WARNING: $*"; }
die() {
  say "ERROR: $1"
  shift
  (($#)) && printf '  %s\n' "$@"
  exit 2
}

begin_job() {
  say "$SLURM_JOB_NAME on $(hostname -s), project $WORKROOT$( ((RESTARTS)) && echo ", requeue $RESTARTS of at most $MAX_REQUEUES")"
  trap on_exit EXIT
  trap on_stop USR1
  trap on_term TERM
  cd "$WORKROOT" || die "WORKROOT=$WORKROOT is no folder."
  load_modules
  activate_environment
  find_archive
}

load_modules() {
  local loader
  [[ -n $MODULES ]] || return 0
  for loader in /etc/profile.d/{modules,lmod,z00_lmod}.sh; do
    # shellcheck source=/dev/null
    if ! declare -F module >/dev/null && [[ -r $loader ]]; then source "$loader"; fi
  done
  if declare -F module >/dev/null; then
    module purge
    # shellcheck disable=SC2086  # one word a module
    module load $MODULES || warn "module load $MODULES failed (above): going on without. Set MODULES (slurm/site.sh) to your site's names."
  else
    warn "no module command on this node: going on without '$MODULES'. Set MODULES= to silence this."
  fi
}

activate_environment() {
  local venv
  unset PYTHONHOME PYTHONPATH # modules set them; they would shadow the environment's packages
  for venv in "$VENV" "$WORKROOT/.venv"; do
    # shellcheck source=/dev/null
    [[ -r $venv/bin/activate ]] && source "$venv/bin/activate" && break
  done
  [[ -r $venv/bin/activate ]] || die "no environment at VENV=$VENV or $WORKROOT/.venv." \
    "Make it once, on a login node: BIOMERGE_DEVICE=cuda bash slurm/setup_env.sh"
  [[ $venv == "$VENV" ]] || say "there is no $VENV: using $venv"
}

is_writable() { mkdir -p -- "$1" 2>/dev/null && : 2>/dev/null >"$1/.writable-$JOB_NAME" && rm -f -- "$1/.writable-$JOB_NAME"; }

find_archive() {
  local wanted place
  [[ $ARCHIVE == /* ]] || ARCHIVE=$WORKROOT/$ARCHIVE
  wanted=$ARCHIVE
  for place in "$wanted" "$WORKROOT/runs" "$HOME/biomerge-runs"; do
    is_writable "$place" && ARCHIVE=$place && break
  done || die "the archive $wanted cannot be written, nor can $WORKROOT/runs and $HOME/biomerge-runs: no result could be kept." \
    "Set ARCHIVE=/a/folder/with/room."
  [[ $ARCHIVE == "$wanted" ]] || warn "the archive $wanted cannot be written: results go to $ARCHIVE."
}

# For training: the project's code, its data and an empty runs/ on the node's own disk. Where that is full or missing,
# and for notebooks that read much and write little: a folder beside the run folders, with data and runs as links.
make_workplace() { # staged or linked
  local path
  if [[ $1 == staged ]] && has_room; then
    WORKPLACE=${TMPDIR:-/tmp}/biomerge-$JOB_NAME STAGED=yes
    fill_workplace || warn "${TMPDIR:-/tmp} has no room for the code and $PERSIST_DATA (above): the job works in $ARCHIVE."
  fi
  if [[ -z $STAGED ]]; then
    WORKPLACE=$ARCHIVE/.workplace-$JOB_NAME
    fill_workplace || die "the project cannot be copied to $ARCHIVE (above)."
  fi
  mkdir -p "$WORKROOT"/{data,tokenizers,backbones}
  for path in "$WORKROOT"/*; do
    [[ -e $WORKPLACE/${path##*/} ]] || ln -s "$path" "$WORKPLACE/"
  done
  BIOMERGE_JOB_DIR=$WORKPLACE/.messages
  BIOMERGE_COMMIT=${BIOMERGE_COMMIT:-$(git -C "$WORKROOT" describe --always --dirty --abbrev=12 '--exclude=*' 2>/dev/null)}
  if ! mkdir -p "$BIOMERGE_JOB_DIR" || ! cd "$WORKPLACE"; then die "$WORKPLACE cannot be written."; fi
  export BIOMERGE_JOB_DIR BIOMERGE_COMMIT PYTHONPATH=$WORKPLACE
  [[ -z $STAGED ]] || export BIOMERGE_ARCHIVE=$ARCHIVE
}

has_room() {
  local tmp=${TMPDIR:-/tmp} free problem=''
  free=$(df -Pk -- "$tmp" 2>/dev/null | awk 'NR == 2 { print int($4 / 1000000) }')
  command -v rsync >/dev/null || problem="there is no rsync on this node"
  is_writable "$tmp" || problem="TMPDIR=$tmp cannot be written"
  ((${free:-0} >= MIN_TMP_GB)) || problem="TMPDIR=$tmp is full (${free:-0} GB free, MIN_TMP_GB=$MIN_TMP_GB)"
  [[ -z $problem ]] || { warn "$problem: the job works in $ARCHIVE." && return 1; }
}

# An empty WORKPLACE (of this job before it was requeued, maybe) with the code, and data/ and runs/ where it is staged;
# STAGED is empty afterwards when they find no room.
fill_workplace() {
  local from=${PERSIST_DATA#"$WORKROOT"/} kept=$WORKPLACE problem
  if [[ -e $kept/.not-copied ]]; then
    WORKPLACE='' STAGED='' # so that nothing of it is copied over what the archive has now, nor removed
    die "before it was requeued, this job left results in $kept/runs that could not be copied to $ARCHIVE." \
      "Copy what you need of them, remove $kept, and requeue the job."
  fi
  rm -rf -- "$WORKPLACE"
  if ! problem=$({ mkdir -p "${WORKPLACE%/*}" && mkdir -m 700 "$WORKPLACE" && cp -r -- "${CODE[@]/#/$WORKROOT/}" "$WORKPLACE/"; } 2>&1); then
    echo "${problem##*$'\n'}" # cp tells of each file
  elif [[ -z $STAGED ]]; then
    ln -s "$ARCHIVE" "$WORKPLACE/runs" && return
  elif mkdir "$WORKPLACE"/{runs,data}; then
    [[ -d $WORKROOT/$from ]] || return 0 # none yet: the notebook says what it misses
    (cd "$WORKROOT" && rsync -aR -- "$from/" "$WORKPLACE/") &&
      say "$from/ is copied to $WORKPLACE ($(du -sh "$WORKPLACE/$from" | cut -f1))" && return
  fi
  rm -rf -- "$WORKPLACE"
  STAGED=''
  return 1
}

# Checkpoints that training has deleted go in the archive, too; nothing else there is ever deleted. In a trap a bare
# `return` gives the status from before the trap, and what could not be copied would be removed as copied.
copy_back() {
  local run
  [[ -n $STAGED && -d $WORKPLACE/runs ]] || return 0
  rsync -a --exclude=.lock --exclude='.*.partial' "${LEAVE_OUT[@]/#/--exclude=}" "$WORKPLACE/runs/" "$ARCHIVE/" || return 1
  for run in "$WORKPLACE"/runs/*/; do
    [[ -n $(compgen -G "$run/checkpoints/checkpoint-*") ]] || continue
    rsync -a --delete-after "$run/checkpoints/" "$ARCHIVE/$(basename -- "$run")/checkpoints/" || return 1
  done
}

keep_copying() {
  trap - EXIT USR1 TERM INT
  while sleep "$COPY_SECONDS"; do
    copy_back || warn "results could not be copied to $ARCHIVE (above); trying again in $COPY_SECONDS s"
  done
}

# SLURM sends SIGTERM to every process of the job at once, and papermill, torchrun and wandb's agent would kill the
# training before it can write a checkpoint. A blocked signal stays blocked in all that a command starts.
WITHOUT_SIGTERM='import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.execvp(sys.argv[1], sys.argv[1:])'

# Runs a command to its end, through signals to this script; its exit status is in STATUS.
run_command() {
  [[ -z $STAGED || -n $COPIER ]] || { keep_copying & COPIER=$!; }
  if [[ $STAGE == 03_train ]]; then
    python -ISc "$WITHOUT_SIGTERM" "$@" &
  else
    "$@" &
  fi
  CHILD=$!
  local status
  STATUS=127
  while true; do
    SIGNALLED=
    wait "$CHILD"
    status=$?
    [[ -n $SIGNALLED ]] || break
  done
  ((status == 127)) || STATUS=$status
  CHILD=''
  [[ -z $TIMER ]] || kill "$TIMER" 2>/dev/null
  TIMER=''
  # An agent ends well whatever becomes of its run.
  if [[ -e $BIOMERGE_JOB_DIR/interrupted ]]; then
    STATUS=$INTERRUPTED
  elif ((STATUS == 0)) && [[ -e $BIOMERGE_JOB_DIR/failure ]]; then
    STATUS=1
  fi
  return 0
}

ask_to_stop() { # seconds until the command is killed
  : >"$BIOMERGE_JOB_DIR/stop"
  local child=$CHILD
  [[ -n $child && -z $TIMER ]] || return 0
  (
    trap - EXIT USR1 TERM INT
    sleep "$1"
    : >"$BIOMERGE_JOB_DIR/overdue"
    kill -KILL "$child"
  ) &
  TIMER=$!
}

on_stop() { # SLURM's warning before the time limit, or of preemption
  SIGNALLED=yes
  [[ -d $BIOMERGE_JOB_DIR ]] || return 0
  say "SIGUSR1: the time limit or a preemption is near; training writes a checkpoint and stops (at most $STOP_SECONDS s)"
  ask_to_stop "$STOP_SECONDS"
}

on_term() { # scancel, the time limit, preemption: SIGKILL follows
  SIGNALLED=yes ENDED=yes
  [[ -d $BIOMERGE_JOB_DIR ]] || exit 143
  say "SIGTERM: copying back what there is, then what training still writes (at most $TERM_SECONDS s)"
  ask_to_stop "$TERM_SECONDS"
  copy_back
}

on_exit() {
  local code=$? again='' # the status of a die, or of the last command
  trap '' USR1 TERM INT
  trap - EXIT
  [[ -z $CHILD ]] || kill -KILL "$CHILD" 2>/dev/null
  [[ -z $TIMER ]] || kill "$TIMER" 2>/dev/null
  [[ -z $COPIER ]] || { kill "$COPIER" 2>/dev/null && wait "$COPIER" 2>/dev/null; }
  if ! copy_back; then
    COPIED=''
    { : >"$WORKPLACE/.not-copied"; } 2>/dev/null
    warn "results could not be copied to $ARCHIVE (above). They are on $(hostname -s) in $WORKPLACE/runs."
    ((code)) || code=74
  fi
  report_end "$code"
  if [[ -n $COPIED ]]; then
    [[ -n $ENDED || ! (-e $BIOMERGE_JOB_DIR/interrupted || -e $BIOMERGE_JOB_DIR/overdue) ]] || again=yes
    [[ -z $WORKPLACE ]] || { cd / && rm -rf -- "$WORKPLACE"; }
  fi
  if [[ -n $again ]] && ((RESTARTS < MAX_REQUEUES)); then
    say "requeue $((RESTARTS + 1)) of at most $MAX_REQUEUES"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until SLURM ends this
    warn "this cluster does not requeue: submit the same command again to go on"
  elif [[ -n $again ]]; then
    say "requeued $RESTARTS times already (MAX_REQUEUES=$MAX_REQUEUES): submit the same command again to go on"
  fi
  exit "$code"
}

# The last lines of the log: how it ended, and what to open.
report_end() { # exit status
  local log notebook='' what="exit status $1" results="results are in $ARCHIVE"
  if (($1 == 0)); then
    say "finished after $SECONDS s; $results"
  elif [[ -n $ENDED ]]; then
    say "ended by SIGTERM after $SECONDS s; $results. The same command goes on from the newest checkpoint."
  elif [[ -e $BIOMERGE_JOB_DIR/interrupted ]]; then
    say "stopped after $SECONDS s with $(<"$BIOMERGE_JOB_DIR/interrupted"); $results"
  elif [[ -e $BIOMERGE_JOB_DIR/overdue ]]; then
    say "training did not stop in time and was ended; results up to the newest checkpoint are in $ARCHIVE"
  else
    log=$(scontrol show job "$SLURM_JOB_ID" -o 2>/dev/null | sed -n 's/.* StdOut=\([^ ]*\).*/\1/p')
    [[ ! -e $BIOMERGE_JOB_DIR/failure ]] || { read -r notebook && what=$(cat); } <"$BIOMERGE_JOB_DIR/failure"
    {
      say "FAILED after $SECONDS s: $what"
      [[ -z $notebook ]] || printf '  notebook  %s\n' "${notebook/#"$WORKPLACE/runs"/$ARCHIVE}"
      printf '  log       %s\n' "$log"
    } | tee -a "${CHAIN_LOG:-/dev/null}"
    [[ -z $STAGED ]] || df -Pk -- "$WORKPLACE" | awk 'NR == 2 && $4 < 100000 { print "  disk      " $6 " is full" }'
  fi
}

read_overrides() { # name=value ...; runs_dir is the archive
  local word
  for word; do
    if [[ $word == runs_dir=* ]]; then ARCHIVE=${word#*=}; else OVERRIDES+=("$word"); fi
  done
}

# Executes notebooks, one after the other, with the same parameters; 03_train when none is named.
run_notebooks() { # "default=override ..." [notebook ...] [name=value ...]
  local notebooks=() defaults
  read -ra defaults <<<"$1"
  shift
  while (($#)) && [[ $1 != *=* && $1 != -* ]]; do
    notebooks+=("$1")
    shift
  done
  read_overrides "${defaults[@]}" "$@"
  ((${#notebooks[@]})) || notebooks=(03_train)
  STAGE=${notebooks[0]}
  begin_job
  python -m biomerge_lib parameters "${OVERRIDES[@]}" >/dev/null || exit 2
  if [[ " ${notebooks[*]} " == *" 03_train "* ]]; then make_workplace staged; else make_workplace linked; fi
  for STAGE in "${notebooks[@]}"; do
    run_command python -m biomerge_lib run "$STAGE" "${OVERRIDES[@]}"
    ((STATUS == 0)) || exit "$STATUS"
  done
}

# Trains one point of a sweep: the one of this array task of a file's grid, or the next that the W&B server hands out.
run_sweep() { # sweep file [name=value ...] | [entity/project/]sweep
  STAGE=03_train
  LEAVE_OUT=('/*/merged') # an 8B's merged model is 16 GB; running 03_train again makes it from the checkpoint
  local sweep=$1
  read_overrides "${@:2}"
  if [[ $sweep != *.yaml ]] && ((${#OVERRIDES[@]})); then
    die "${OVERRIDES[*]}: W&B's agents run the command that the server has, and take no more parameters." \
      "Write them into the sweep file's command, and: wandb sweep FILE"
  fi
  begin_job
  make_workplace staged
  if [[ $sweep == *.yaml ]]; then
    run_command python -m biomerge_lib sweep --point "${SLURM_ARRAY_TASK_ID:?submit this file with --array}" "$sweep" "${OVERRIDES[@]}"
  else
    run_command wandb agent --count 1 "$sweep"
  fi
  exit "$STATUS"
}
