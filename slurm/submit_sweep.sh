#!/usr/bin/env bash
# Submits a sweep file's grid as a job array, without the points that are finished with the same parameters and data.
# The same command again retries what failed. No W&B server is needed.
#
#   bash slurm/submit_sweep.sh parameters/sweep/lora_ner_span.yaml
#   bash slurm/submit_sweep.sh parameters/sweep/lora_ner_span.yaml data_dir=data/bc5cdr/ner num_train_epochs=2
#   python -m biomerge_lib sweep parameters/sweep/lora_ner_span.yaml       the ranking so far
#
#   AT_ONCE=4                                points at a time
#   SWEEP_OPTIONS="--time=08:00:00"          more sbatch options
set -eo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
WORKROOT=$PWD
# shellcheck disable=SC1091
source slurm/common.sh

(($#)) || { sed -n '2,/^set -/s/^# \{0,1\}//p' "$0" && exit 2; }
read -ra options <<<"${SWEEP_OPTIONS:-}"
activate_environment
export WORKROOT
points=$(python -m biomerge_lib sweep --pending "$@")
[[ -n $points ]] || { echo "all points are finished:" && exec python -m biomerge_lib sweep "$@"; }
mkdir -p logs
job=$(sbatch --parsable --array="$points%${AT_ONCE:-4}" "${options[@]}" slurm/job_sweep_ner.sbatch "$@")
echo "job $job trains the points $points: logs/ner_sweep-${job}_*.out"
echo "the ranking so far: $VIRTUAL_ENV/bin/python -m biomerge_lib sweep $*"
