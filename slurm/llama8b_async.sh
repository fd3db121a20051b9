#!/usr/bin/env bash
# LLaMA 3.1 8B on nodes of 8 GPUs, asynchronous online DPO: on each node 4 GPUs learn and 4 generate.
#   sbatch slurm/llama8b_async.sh -s model.hf=/data/Llama-3.1-8B-Instruct -s data.train=/data/gsm8k/train.jsonl
#   sbatch --nodes=4 slurm/llama8b_async.sh ...              learner and generators grow with the nodes
#   bash slurm/llama8b_async.sh --nodes=4 --dry-run          the plan, without Slurm
# Its synchronous twin on the same hardware: slurm/llama8b_sync.sh.
#SBATCH --job-name=llama8b_async
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
# shellcheck disable=SC2034
config=examples/llama8b_async.yaml
# shellcheck source=slurm/llama8b_job.sh
source slurm/llama8b_job.sh
