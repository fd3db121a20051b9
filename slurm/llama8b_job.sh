# shellcheck shell=bash
# What the asynchronous LLaMA job and its synchronous twin have in common, which is all but `mode`: on each node 4 GPUs learn,
# 3 generate and 1 scores.
# shellcheck disable=SC2034
config=examples/llama3.1-8b_no_robots/rlhf.yaml
# shellcheck disable=SC2034
lead=600 # seconds, as --signal has it

overrides() {
  printf '%s\n' -s "schedule.mode=${mode:?is set by the job that sources this}"
  printf '%s\n' -s "learner.ranks=$((4 * $1))" -s "generator.replicas=$((3 * $1))" -s "reward.replicas=$1"
  printf '%s\n' -s launch.interrupt_grace_s=500
  if [ "$1" -gt 1 ]; then
    printf '%s\n' -s learner.distributed_optimizer=true
  fi
}

# shellcheck source=slurm/job.sh
source slurm/job.sh
