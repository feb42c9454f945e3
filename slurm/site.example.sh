#!/usr/bin/env bash
# Your site's settings, which jobs, submit_chain.sh, submit_sweep.sh and `preflight --site` read:
#
#   cp slurm/site.example.sh slurm/site.sh       git ignores the copy: edit it
#   source slurm/site.sh                         for what you start yourself: sbatch, setup_env.sh, hf, python
#   python -m biomerge_lib preflight --site      what is missing, and what to do
#
# A variable of the environment counts more than its line here. docs/cluster.md has all variables. No secrets in this
# file: `hf auth login` and `wandb login` keep them in your home folder.

# What sbatch asks for, instead of the job files' own: partition gpu, one A100, four hours.
#export SBATCH_PARTITION=gpu     # sinfo
#export SBATCH_ACCOUNT=myproject
#export SBATCH_GRES=gpu:a100:1   # sinfo --format="%P %G"
#export SBATCH_TIMELIMIT=08:00:00
#export SBATCH_QOS=normal
#export CPU_OPTIONS="--partition=cpu" # submit_chain.sh: for the stages without a GPU

# Modules that jobs load, separated by spaces. The environment brings CUDA's libraries and Python: most sites need none.
#export MODULES="2024 Python/3.12.3-GCCcore-13.3.0"

# Places. The home folder is too small for most of them on many clusters; the project's own folder is the default.
#export VENV=/scratch/$USER/biomerge-venv # 15 GB
#export HF_HOME=/scratch/$USER/huggingface # models from the hub: 16 GB for an 8B
#export ARCHIVE=/project/$USER/biomerge-runs # run folders: 17 GB a merged 8B

# Nodes without internet: the model is fetched before, and W&B gets its curves afterwards.
#export HF_HUB_OFFLINE=1
#export WANDB_MODE=offline
