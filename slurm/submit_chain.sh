#!/usr/bin/env bash
# Submits the notebooks, in their order, as jobs that wait for each other; when one fails, those after it are cancelled.
#
#   bash slurm/submit_chain.sh corpora=[corpora/bc5cdr_iob] data_dir=data/bc5cdr/ner runtime=a100
#   bash slurm/submit_chain.sh 03_train 04_greedy_dev 06_report data_dir=data/bc5cdr/ner
#
#   JOB_FILE=slurm/job_single_ner_h100.sbatch   which job trains (default: slurm/job_single_ner.sbatch)
#   GPU_OPTIONS="--time=12:00:00"               more sbatch options for those that want a GPU (03, 04, 05)
#   CPU_OPTIONS="--partition=cpu"               more sbatch options for the others (01, 02, 06)
#
# When a stage fails, logs/chain-<when>.txt says which notebook, cell and log to open.
set -eo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
WORKROOT=$PWD
# shellcheck disable=SC1091
source slurm/common.sh
activate_environment

read -ra gpu_options <<<"${GPU_OPTIONS:-}"
read -ra cpu_options <<<"--gres=none --cpus-per-task=4 --mem=16G --time=01:00:00 ${CPU_OPTIONS:-}"
stages=$(python -m biomerge_lib.experiment.stages) # a name and cpu or gpu a line
notebooks=()
while (($#)) && [[ $1 != *=* && $1 != -* ]]; do
  [[ -f notebooks/$1.ipynb ]] || { echo "submit_chain: there is no notebooks/$1.ipynb" >&2 && exit 2; }
  notebooks+=("$1")
  shift
done
((${#notebooks[@]})) || mapfile -t notebooks < <(cut -d ' ' -f 1 <<<"$stages")
python -m biomerge_lib parameters "$@" >/dev/null # nothing is submitted when one of them is wrong
mkdir -p logs
CHAIN_LOG=$PWD/logs/chain-$(date +%Y%m%d-%H%M%S).txt
export CHAIN_LOG WORKROOT
before=()
for notebook in "${notebooks[@]}"; do
  options=("${gpu_options[@]}")
  [[ $stages != *"$notebook cpu"* ]] || options=("${cpu_options[@]}")
  job=$(sbatch --parsable --job-name="$notebook" "${options[@]}" "${before[@]}" \
    "${JOB_FILE:-slurm/job_single_ner.sbatch}" "$notebook" "$@")
  echo "$notebook: job $job, logs/$notebook-$job.out"
  before=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
done
echo "when one fails, $CHAIN_LOG says what to open"
