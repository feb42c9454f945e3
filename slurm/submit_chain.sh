#!/usr/bin/env bash
# Submits notebooks 01 to 06 as jobs that wait for each other; when one fails, those after it are cancelled.
#
#   bash slurm/submit_chain.sh corpora=[corpora/bc5cdr_iob] data_dir=data/bc5cdr/ner runtime=a100
#   bash slurm/submit_chain.sh 03_train 04_greedy_dev 06_report data_dir=data/bc5cdr/ner
#
#   JOB_FILE=slurm/job_single_ner_h100.sbatch   which job trains (default: slurm/job_single_ner.sbatch)
#   GPU_OPTIONS="--time=12:00:00"               more sbatch options for 03, 04 and 05
#   CPU_OPTIONS="--partition=cpu"               more sbatch options for 01, 02 and 06, which need no GPU
#
# When a stage fails, logs/chain-<when>.txt says which notebook, cell and log to open.
set -eo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
WORKROOT=$PWD
# shellcheck disable=SC1091
source slurm/common.sh
activate_environment

JOB_FILE=${JOB_FILE:-slurm/job_single_ner.sbatch}
read -ra gpu_options <<<"${GPU_OPTIONS:-}"
read -ra cpu_options <<<"--gres=none --cpus-per-task=4 --mem=16G --time=01:00:00 ${CPU_OPTIONS:-}"
notebooks=()
while (($#)) && [[ $1 != *=* && $1 != -* ]]; do
  notebooks+=("$1")
  shift
done
((${#notebooks[@]})) || notebooks=(01_tokenizer 02_data 03_train 04_greedy_dev 05_vllm_eval 06_report)

for notebook in "${notebooks[@]}"; do # nothing is submitted when one of them is misspelt
  [[ -f notebooks/$notebook.ipynb ]] || { echo "submit_chain: there is no notebooks/$notebook.ipynb" >&2 && exit 2; }
done
python -m biomerge_lib parameters "$@" >/dev/null
mkdir -p logs
CHAIN_LOG=$PWD/logs/chain-$(date +%Y%m%d-%H%M%S).txt
export CHAIN_LOG WORKROOT
before=()
for notebook in "${notebooks[@]}"; do
  case $notebook in
    01_* | 02_* | 06_*) options=("${cpu_options[@]}") ;;
    *) options=("${gpu_options[@]}") ;;
  esac
  job=$(sbatch --parsable --job-name="$notebook" "${options[@]}" "${before[@]}" "$JOB_FILE" "$notebook" "$@")
  echo "$notebook: job $job, logs/$notebook-$job.out"
  before=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
done
echo "when one fails, $CHAIN_LOG says what to open"
