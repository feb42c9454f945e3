#!/usr/bin/env bash
# Runs the whole pipeline on this machine's CPU in minutes: 01 to 04 and 06, with the embedded model and corpus.
#
#   bash slurm/run_local_debug.sh                                  --subsample 0.01 --num_train_epochs 0.1
#   bash slurm/run_local_debug.sh --subsample 0.05 --learning_rate 1e-3
#   bash slurm/run_local_debug.sh --with-vllm                      05 as well, with a real vLLM server
#
# Every other argument is a parameter (name=value or --name value), handed to all notebooks.
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
export CUDA_VISIBLE_DEVICES="" PYTHONUTF8=1 TOKENIZERS_PARALLELISM=false

with_vllm=false
arguments=()
for argument in "$@"; do
  if [[ $argument == --with-vllm ]]; then with_vllm=true; else arguments+=("$argument"); fi
done

bash slurm/setup_env.sh
python=${VENV:-.venv}/bin/python

started=$SECONDS
notebooks=(01_tokenizer 02_data 03_train 04_greedy_dev)
if $with_vllm; then
  if "$python" -c 'import vllm' 2>/dev/null; then
    notebooks+=(05_vllm_eval)
  else
    echo "vLLM is not installed here: 05_vllm_eval is left out"
  fi
fi
for notebook in "${notebooks[@]}" 06_report; do
  from=$SECONDS
  "$python" -m biomerge_lib run "$notebook" \
    --run_id debug --existing_run replace --subsample 0.01 --num_train_epochs 0.1 "${arguments[@]}"
  echo "$notebook took $((SECONDS - from)) s"
done
echo "the pipeline took $((SECONDS - started)) s; open runs/debug/"
