#!/usr/bin/env bash
# The shape of the LLaMA jobs on the CPUs of two nodes, in minutes: a learner of two pipeline stages, one on each node,
# and a generator on the second. To see that a cluster, its file system and its ports are fit for the real ones.
#   sbatch slurm/cpu_smoke.sh
#   bash slurm/cpu_smoke.sh --nodes=2 --dry-run
#SBATCH --job-name=cpu_smoke
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --signal=B:TERM@20
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
# shellcheck disable=SC2034
lead=20 # seconds, as --signal has it
# shellcheck disable=SC2034
config=examples/cpu_smoke.yaml

overrides() {
  printf '%s\n' -s launch.interrupt_grace_s=60
}

# shellcheck source=slurm/job.sh
source slurm/job.sh
