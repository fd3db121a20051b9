#!/usr/bin/env bash
# Makes an environment for `async-rlhf launch`: NeMo-Run and this project (editable), without torch and vLLM, whose pins
# clash with NeMo-Run's. Once it has succeeded, the next call only compares a hash.
#   tools/setup_launch_env.sh [DIRECTORY]     default: .venv-launch (relative to the project)
#   PYTHON                                    interpreter to use (3.11 or newer)
set -euo pipefail
called_from=$PWD
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null
root=$PWD
venv=$root/.venv-launch
if (($#)); then
    venv=$1
    [[ $venv == /* ]] || venv=$called_from/$venv
fi
stamp=$venv/.async_rlhf_stamp
log=$venv/setup.log

die() {
    echo "error: $*" >&2
    exit 1
}

supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The paths are part of the stamp: a copied tree must not continue importing from the old one.
want="$(sha256sum setup.py | cut -d' ' -f1) $root $venv"
if [[ -f $stamp && $(<"$stamp") == "$want" && -x $venv/bin/python ]]; then
    echo "set-up: $venv/bin/async-rlhf launch works"
    exit 0
fi

python=${PYTHON:-}
if [[ -n $python ]]; then
    supported "$python" || die "PYTHON=$python is not a working Python 3.11 or newer"
else
    for candidate in python3.11 python3.12 python3.13 python3; do
        if supported "$candidate"; then
            python=$candidate
            break
        fi
    done
    [[ -n $python ]] || die "needs Python 3.11 or newer: no working python3.11, python3.12, python3.13 or python3 on PATH; or set PYTHON"
fi

# Settings meant for another environment would install to, or find packages in, the wrong place.
unset PYTHONPATH PYTHONHOME
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off

child=
trap '[[ -z $child ]] || kill "$child" 2>/dev/null; echo "set-up: interrupted; call it again" >&2; exit 130' INT TERM HUP

run() {  # TITLE COMMAND...: its output goes to the log; a sign of life every 10 s
    local title=$1 told=$SECONDS code=0
    shift
    echo "set-up: $title (${SECONDS} s)"
    echo "+ $*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - told >= 10)); then
            told=$SECONDS
            echo "  ... ${SECONDS} s"
        fi
    done
    wait "$child" || code=$?
    child=
    if ((code)); then
        echo "--- last lines of $log" >&2
        tail -n 15 "$log" >&2
        die "set-up failed: $title, after ${SECONDS} s; see $log"
    fi
}

if [[ -f $venv/pyvenv.cfg ]]; then  # so it is a venv, and not some other folder that must not be emptied
    echo "set-up: $venv is incomplete, moved or of an older version of the project: making it anew"
    find "$venv" -mindepth 1 -delete
elif [[ -e $venv && -n $(ls -A "$venv") ]]; then
    die "$venv is not empty and no virtual environment; name another directory"
fi
mkdir -p "$venv"
: >"$log"
run "virtual environment" "$python" -m venv "$venv"
run "NeMo-Run and this project, editable" "$venv/bin/python" -m pip install -e '.[launch]'
run "check: imports" "$venv/bin/python" -c 'import nemo_run, megatron_async_rlhf.launch.nemo.recipes'
run "check: async-rlhf launch --help" "$venv/bin/async-rlhf" launch --help

printf '%s\n' "$want" >"$stamp"
echo "set-up: $venv/bin/async-rlhf launch works (${SECONDS} s)"
