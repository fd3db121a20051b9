#!/usr/bin/env bash
# From a fresh checkout to a finished RLHF run on this machine's CPUs. Arguments go to `async-rlhf train`:
#   tools/quickstart.sh -s schedule.mode=sync
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null
tools/setup_env.sh

# Where the results will be, for the last line.
dir=runs/quickstart
for argument in "$@"; do
    case ${argument#-s} in
        run.name=*) dir=runs/${argument#*run.name=} ;;
        run.dir=*) dir=${argument#*run.dir=} ;;
    esac
done

started=$(date +%s)
code=0
"${ASYNC_RLHF_VENV:-.venv}/bin/async-rlhf" train examples/quickstart.yaml "$@" || code=$?
if ((code)); then
    echo "failed: async-rlhf train ended with exit code $code after $(($(date +%s) - started)) s; logs, if it got that far, in $dir/logs"
elif [[ -f $dir/summary.json ]] && (($(stat -c %Y "$dir/summary.json") >= started)); then
    echo "done: results in $dir (summary.json, metrics.jsonl, samples.jsonl, trace.json) after $(($(date +%s) - started)) s"
else
    echo "done: async-rlhf train ended with exit code 0"
fi
exit "$code"
