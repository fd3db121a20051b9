#!/usr/bin/env bash
# LLaMA 3.1 8B on No Robots, synchronous online DPO against a served reward model: the RL stage of the paper's
# instruction-following run (examples/llama3.1-8b_no_robots). On each node of 8 GPUs 4 learn, 3 generate and 1 scores.
#   sbatch slurm/llama8b_sync.sh -s model.hf=/data/sft-policy -s reward.model=/data/reward-model -s data.train=/data/no_robots.jsonl
#   sbatch --nodes=4 slurm/llama8b_sync.sh ...              learner, generators and reward models grow with the nodes
#   bash slurm/llama8b_sync.sh --nodes=4 --dry-run          the plan, without Slurm
# Its asynchronous twin on the same hardware: slurm/llama8b_async.sh. All stages on one node: slurm/llama8b_pipeline.sh.
#SBATCH --job-name=llama8b_sync
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
mode=sync
# shellcheck source=slurm/llama8b_job.sh
source slurm/llama8b_job.sh
