#!/usr/bin/env bash
# Runs the whole pipeline on this machine's CPU in minutes, with the embedded model and corpus; 05 where it is asked for.
#
#   bash slurm/run_local_debug.sh                                  --subsample 0.01 --num_train_epochs 0.1
#   bash slurm/run_local_debug.sh --subsample 0.05 --learning_rate 1e-3
#   bash slurm/run_local_debug.sh --with-vllm                      05 as well, with a real vLLM server
#
# Every other argument is a parameter (name=value or --name value), handed to all notebooks. Training goes on from the
# shipped adapter for some steps, so that curves, answers and errors are real ones: it checks the wiring, not a method.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export CUDA_VISIBLE_DEVICES="" PYTHONUTF8=1 TOKENIZERS_PARALLELISM=false
bash slurm/setup_env.sh
python=${VENV:-.venv}/bin/python

leave_out=05_vllm_eval
arguments=()
for argument in "$@"; do
  if [[ $argument == --with-vllm ]]; then leave_out=''; else arguments+=("$argument"); fi
done
if [[ -z $leave_out ]] && ! "$python" -c 'import importlib.util as u; raise SystemExit(u.find_spec("vllm") is None)'; then
  leave_out=05_vllm_eval
  echo "vLLM is not installed here: $leave_out is left out"
fi
notebooks=$("$python" -m biomerge_lib.experiment.stages | cut -d ' ' -f 1)
for notebook in $notebooks; do
  [[ $notebook != "$leave_out" ]] || continue
  from=$SECONDS
  "$python" -m biomerge_lib run "$notebook" --run_id debug --existing_run replace \
    --init_adapter shipped --learning_rate 2e-4 --subsample 0.02 --num_train_epochs 2 \
    --logging_steps 1 --eval_steps 3 --save_steps 3 "${arguments[@]}"
  echo "$notebook took $((SECONDS - from)) s"
done
echo "the pipeline took $SECONDS s; open runs/debug/report.html"
