# shellcheck shell=bash
# What all jobs of this folder do; they source it with `config`, `lead` (the seconds of --signal) and a function
# `overrides` that prints what a number of nodes changes. The same command runs once on each node: the first one supervises,
# the others do as it says. A job of a whole pipeline also sets `command=pipeline`, and `looked_at`, the configuration that
# its node is looked at with.
#
# Settings (environment):
#   RUN_DIR          run directory, on a file system that all nodes share   runs/<job name>-<job id>
#   VENV             virtual environment, where no container is used        .venv
#   SLURM_CONTAINER  image for enroot/pyxis instead of it; mounts besides this folder: CONTAINER_MOUNTS=/data:/data,...
#   DOCTOR=0         do not look at the nodes before the run
# Everything else is an argument: -s section.key=value, as for `async-rlhf train`; -s stage.section.key=value of a pipeline.

: "${config:?is set by the job that sources this}" "${lead:?is set by the job that sources this}"
command=${command:-train}
case $command in
  train) directory_key=run.dir begun=config.yaml ;;
  pipeline) directory_key=dir begun=pipeline.json ;;
esac
nodes=${SLURM_JOB_NUM_NODES:-1}
dry_run=0
arguments=()
for argument in "$@"; do
  case ${argument#--set=} in
    "$directory_key"=* | "-s$directory_key"=*) # the job looks there too, and a start after this one
      echo "error: ${argument#-s}: a job runs in RUN_DIR; set that instead: RUN_DIR=runs/trial sbatch ..." >&2
      exit 2 ;;
    --nodes=*) nodes=${argument#--nodes=} ;; # for a dry run; a job's number is Slurm's
    --dry-run) dry_run=1 ;;
    *) arguments+=("$argument") ;;
  esac
done
[ -e "$config" ] || { echo "error: no $PWD/$config: submit from the top of the repository" >&2; exit 2; }
mapfile -t settings < <(overrides "$nodes")
if [ "$command" = train ]; then
  settings=(-s "launch.nodes=$nodes" "${settings[@]}")
elif [ "$nodes" != 1 ]; then
  echo "error: --nodes=$nodes: this job runs its stages on one node; for more: async-rlhf launch $config --executor slurm" >&2
  exit 2
fi

# srun would read it as an OCI bundle of its own.
image=${SLURM_CONTAINER:-}
unset SLURM_CONTAINER
# Left from a job that this one was submitted in; srun refuses them beside what this one asks for.
[ -z "${SLURM_MEM_PER_NODE:-}" ] || unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU
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
  exec "${program[@]}" "$command" "$config" --dry-run "${settings[@]}" "${arguments[@]}"
fi
[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: submit it: sbatch $0 (or look at its plan: bash $0 --nodes=$nodes --dry-run)" >&2; exit 2; }

RUN_DIR=${RUN_DIR:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID} # the same after a requeue
settings+=(-s "$directory_key=$RUN_DIR")
# A pipeline continues by itself with what is left to do; what it is looked at with knows nothing of stages.
if [ "$command" = train ]; then
  run=(train "$config" --resume "${settings[@]}" "${arguments[@]}")
  look=(doctor "$config" "${settings[@]}" "${arguments[@]}")
else
  run=(pipeline "$config" "${settings[@]}" "${arguments[@]}")
  look=(doctor "${looked_at:?is set by the job that sources this}")
fi
# One task on each node, which may use all of it. What one leaves behind the others end within a minute, each in its
# own way: where Slurm kills the rest of a step (KillOnBadExit), the first node's exit code would be lost.
step=(srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 --cpu-bind=none --wait=60 --kill-on-bad-exit=0)
step+=("${container[@]}")
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)), run directory $RUN_DIR"
env | grep -E '^(NCCL|TORCH_NCCL|GLOO)_' | sort

if [ "${DOCTOR:-1}" != 0 ]; then
  PYTHONWARNINGS=ignore "${step[@]}" --wait=0 --label "${program[@]}" "${look[@]}" || exit 1
fi

# Checkpoints, exports and, of an evaluation, its answers with their size: of a run, or of the stages of a pipeline.
made() {
  [ ! -d "$RUN_DIR" ] || find "$RUN_DIR" -maxdepth 3 \
    \( -path '*/checkpoints/step_*[0-9]' -o -path '*/checkpoints/final' -o -path '*/progress/*.jsonl' -printf '%s ' \) \
    -printf '%p\n' | sort
}

# What squeue says of this job in one column. Slurm's controller may be too busy to answer at once.
told() {
  local answer tries
  for tries in {1..30}; do
    if answer=$(squeue -h -j "$SLURM_JOB_ID" -O "$1" | tr -d ' ') && [ -n "$answer" ]; then
      echo "$answer"
      return
    fi
    [ "$tries" = 30 ] || sleep 10
  done
}

put_back() {
  local tries
  for tries in {1..30}; do
    ! scontrol requeue "$SLURM_JOB_ID" || return 0
    sleep 10
  done
  echo "error: Slurm does not take the job back; continue with: RUN_DIR=$RUN_DIR sbatch ..." >&2
  exit 1
}

# The run then saves a checkpoint and ends with 130. Slurm may send the signal a minute early; the run may not even have
# made its directory yet.
# shellcheck disable=SC2317 # by the trap
ask() {
  local left
  left=$(($(date -d "$(told EndTime)" +%s) - $(date +%s) - lead))
  if [ "$left" -gt 0 ] && [ "$left" -le 60 ]; then sleep "$left"; fi
  until [ -e "$RUN_DIR/$begun" ]; do sleep 1; done
  touch "$RUN_DIR/stop"
}

# The time limit is near (--signal), or somebody asked: scancel --batch --signal=TERM. After a plain scancel the job is
# over, and must not come back. Asked twice a run ends without saving.
# shellcheck disable=SC2317 # by the trap
on_term() {
  signalled=1
  if [ "$requeue" = 0 ] && [ "$(told State)" = RUNNING ]; then
    requeue=1
    ask &
  fi
}
requeue=0
before=$(made)
rm -f "$RUN_DIR/stop" "$RUN_DIR/logs/exit_code"
trap on_term TERM
"${step[@]}" "${program[@]}" "${run[@]}" &
running=$!
until # the wait was ended by the run, not by a signal
  signalled=0
  code=0
  wait "$running" || code=$?
  [ "$signalled" = 0 ]
do :; done
# Where a node's task was killed, srun has that to say and not what the first one said.
if [ "$command" = train ] && [ -s "$RUN_DIR/logs/exit_code" ]; then code=$(<"$RUN_DIR/logs/exit_code"); fi
# Preempted with a time of grace, the run was told by Slurm itself: with 143 it ends while it is starting.
if [ "$requeue" = 0 ] && { [ "$code" = 130 ] || [ "$code" = 143 ]; }; then
  case $(told PreemptTime) in
    '' | N/A | NONE) ;;
    *)
      echo "preempted; back into the queue, to continue from what is saved in $RUN_DIR"
      put_back ;;
  esac
fi
if [ "$requeue" = 1 ] && [ "$code" = 130 ]; then
  left=$(($(date -d "$(told EndTime)" +%s) - $(date +%s))) # much, where somebody asked and not the time limit
  if [ "$(made)" = "$before" ] && [ "$left" -le $((lead + 120)) ]; then
    echo "error: no step was made before the time limit, so a requeue would make none either: raise --time" >&2
    exit 1
  fi
  echo "saved in $RUN_DIR; back into the queue"
  put_back
fi
# A machine was lost. When Slurm finds that out too (SlurmdTimeout) it ends the job and queues it again, without that machine.
if [ "$code" = 75 ] && { [ "$(made)" != "$before" ] || [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; }; then
  # The time limit may come near meanwhile.
  trap '[ "$(told State)" != RUNNING ] || put_back; exit 75' TERM
  limit=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p') || true
  limit=$((${limit:-300} + 60))
  echo "a machine was lost; waiting for Slurm to take the job back, at most $limit s"
  sleep "$limit" &
  wait $! || true
  put_back
fi
exit "$code"
