#!/usr/bin/env bash
# LLaMA 3.1 8B on No Robots, all stages of the paper's instruction-following run on one node of 8 GPUs: supervised fine-tuning,
# a reward model, asynchronous online DPO, win rate (examples/llama3.1-8b_no_robots).
#   sbatch slurm/llama8b_pipeline.sh -s sft.model.hf=/data/Llama-3.1-8B -s sft.data.train=/data/no_robots.jsonl \
#     -s reward_model.data.train=/data/pairs.jsonl -s rlhf.data.train=/data/no_robots.jsonl -s eval.data.train=/data/no_robots.jsonl
#   bash slurm/llama8b_pipeline.sh --dry-run                  the plan of every stage, without Slurm
# Near its time limit the stage under way saves, and the job goes back into the queue and on from there: stages that are done
# are not done again. RUN_DIR=runs/... sbatch slurm/llama8b_pipeline.sh continues with an earlier job's by hand.
#SBATCH --job-name=llama8b_pipeline
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
command=pipeline
# shellcheck disable=SC2034
config=examples/llama3.1-8b_no_robots
# shellcheck disable=SC2034
looked_at=$config/rlhf.yaml
# shellcheck disable=SC2034
lead=600 # seconds, as --signal has it

overrides() {
  local stage
  for stage in sft reward_model rlhf eval; do
    printf '%s\n' -s "$stage.launch.interrupt_grace_s=500"
  done
}

# shellcheck source=slurm/job.sh
source slurm/job.sh
