# shellcheck shell=bash
# What all jobs of this folder do; they source it with `config`, `lead` (the seconds of --signal) and a function
# `overrides` that prints what a number of nodes changes. The same command runs once on each node: the first one supervises, the others do as it says.
#
# Settings (environment):
#   RUN_DIR          run directory, on a file system that all nodes share   runs/<job name>-<job id>
#   VENV             virtual environment, where no container is used        .venv
#   SLURM_CONTAINER  image for enroot/pyxis instead of it; mounts besides this folder: CONTAINER_MOUNTS=/data:/data,...
#   DOCTOR=0         do not look at the nodes before the run
# Everything else is an argument: -s section.key=value, as for `async-rlhf train`.

: "${config:?is set by the job that sources this}" "${lead:?is set by the job that sources this}"
nodes=${SLURM_JOB_NUM_NODES:-1}
dry_run=0
arguments=()
for argument in "$@"; do
  case ${argument#--set=} in
    run.dir=* | -srun.dir=*) # the job looks there too, and a start after this one
      echo "error: ${argument#-s}: a job runs in RUN_DIR; set that instead: RUN_DIR=runs/trial sbatch ..." >&2
      exit 2 ;;
    --nodes=*) nodes=${argument#--nodes=} ;; # for a dry run; a job's number is Slurm's
    --dry-run) dry_run=1 ;;
    *) arguments+=("$argument") ;;
  esac
done
[ -f "$config" ] || { echo "error: no $PWD/$config: submit from the top of the repository" >&2; exit 2; }
mapfile -t scaled < <(overrides "$nodes")
settings=(-s "launch.nodes=$nodes" "${scaled[@]}")

# srun would read it as an OCI bundle of its own.
image=${SLURM_CONTAINER:-}
unset SLURM_CONTAINER
if [ -n "$image" ]; then
  mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  container=("--container-image=$image" "--container-mounts=$mounts" "--container-workdir=$PWD")
  program=(python3 -m megatron_async_rlhf)
else
  container=()
  program=("${VENV:-.venv}/bin/python" -m megatron_async_rlhf)
  [ -x "${program[0]}" ] || { echo "error: no ${program[0]}: set up the environment (README.md), or set VENV" >&2; exit 2; }
fi

if [ "$dry_run" = 1 ]; then
  exec "${program[@]}" train "$config" --dry-run "${settings[@]}" "${arguments[@]}"
fi
[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: submit it: sbatch $0 (or look at its plan: bash $0 --nodes=2 --dry-run)" >&2; exit 2; }

RUN_DIR=${RUN_DIR:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID} # the same after a requeue
settings+=(-s "run.dir=$RUN_DIR")
# One task on each node, which may use all of it. What one leaves behind the others end within half a minute, each in its
# own way: where Slurm kills the rest of a step (KillOnBadExit), the first node's exit code would be lost.
step=(srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 --cpu-bind=none --wait=30 --kill-on-bad-exit=0)
step+=("${container[@]}")
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)), run directory $RUN_DIR"
env | grep -E '^(NCCL|TORCH_NCCL|GLOO)_' | sort

if [ "${DOCTOR:-1}" != 0 ]; then
  PYTHONWARNINGS=ignore "${step[@]}" --wait=0 --label "${program[@]}" doctor "$config" "${settings[@]}" "${arguments[@]}" || exit 1
fi

last_checkpoint() {
  [ ! -d "$RUN_DIR/checkpoints" ] || find "$RUN_DIR/checkpoints" -maxdepth 1 -name 'step_*[0-9]' | sort | tail -n 1
}

# The run then saves a checkpoint and ends with 130. Slurm may send the signal a minute early; the run may not even have
# made its directory yet.
# shellcheck disable=SC2317 # by the trap
ask() {
  local left
  left=$(($(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s) - $(date +%s) - lead))
  if [ "$left" -gt 0 ] && [ "$left" -le 60 ]; then sleep "$left"; fi
  until [ -e "$RUN_DIR/config.yaml" ]; do sleep 1; done
  touch "$RUN_DIR/stop"
}

# The time limit is near (--signal), or somebody asked: scancel --batch --signal=TERM. After a plain scancel the job is
# over, and must not come back. Asked twice a run ends without saving.
# shellcheck disable=SC2317 # by the trap
on_term() {
  signalled=1
  if [ "$requeue" = 0 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    requeue=1
    ask &
  fi
}
requeue=0
before=$(last_checkpoint)
rm -f "$RUN_DIR/stop"
trap on_term TERM
"${step[@]}" "${program[@]}" train "$config" --resume "${settings[@]}" "${arguments[@]}" &
running=$!
until # the wait was ended by the run, not by a signal
  signalled=0
  code=0
  wait "$running" || code=$?
  [ "$signalled" = 0 ]
do :; done
if [ "$requeue" = 1 ] && [ "$code" = 130 ]; then
  if [ "$(last_checkpoint)" = "$before" ]; then
    echo "error: no step was made before the time limit, so a requeue would make none either: raise --time" >&2
    exit 1
  fi
  echo "saved $(last_checkpoint); back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
