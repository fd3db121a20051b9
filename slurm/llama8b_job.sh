# shellcheck shell=bash
# What the asynchronous LLaMA job and its synchronous twin have in common, which is all but `config`: on each node 4 GPUs
# learn and 4 generate.
# shellcheck disable=SC2034
lead=600 # seconds, as --signal has it

overrides() {
  printf '%s\n' -s "learner.ranks=$((4 * $1))" -s "generator.replicas=$((4 * $1))" -s launch.interrupt_grace_s=500
  if [ "$1" -gt 1 ]; then
    printf '%s\n' -s learner.distributed_optimizer=true
  fi
}

# shellcheck source=slurm/job.sh
source slurm/job.sh
