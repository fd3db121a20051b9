#!/usr/bin/env bash
# Makes .venv hold tools/cpu.lock and this project (editable). Call it before anything else: once it has
# succeeded, the next call only compares a hash; after an interruption it continues where it was.
#   PYTHON            interpreter to use (3.11 or 3.12)
#   ASYNC_RLHF_VENV   where, instead of .venv (relative to the project)
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null
root=$PWD
venv=${ASYNC_RLHF_VENV:-.venv}
[[ $venv == /* ]] || venv=$root/$venv
lock=tools/cpu.lock
stamp=$venv/.async_rlhf_stamp
log=$venv/setup.log
packages=$(grep -c == "$lock")
steps=5
step=0
title=

die() {
    echo "error: $*" >&2
    exit 1
}

version_of() {  # prints 3.11; nothing if it does not run (a pyenv shim may exist and still fail)
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

supported() { [[ $1 == 3.11 || $1 == 3.12 ]]; }

# The paths are part of the stamp: a copied tree must not continue importing from the old one.
want="$(cat "$lock" setup.py | sha256sum | cut -d' ' -f1) $root $venv"
ready() {
    [[ -f $stamp && $(<"$stamp") == "$want" && -x $venv/bin/python ]] || return 1
    [[ -z ${PYTHON:-} || $(version_of "$PYTHON") == "$(version_of "$venv/bin/python")" ]]
}
if ready; then exit 0; fi

[[ $(uname -sm) == "Linux x86_64" ]] || die "$lock is for Linux x86_64, this is $(uname -sm)"

# One set-up of this tree at a time. pip inherits the lock, so one that outlives its script is waited for too.
if command -v flock >/dev/null; then
    exec 9<"$lock"
    if ! flock -n 9; then
        echo "set-up: waiting for another set-up of $root"
        flock 9 || true
        if ready; then exit 0; fi
    fi
fi

# Settings meant for another environment would install to, or find packages in, the wrong place.
unset PYTHONPATH PYTHONHOME
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off

python=
if [[ -n ${PYTHON:-} ]]; then
    supported "$(version_of "$PYTHON")" || die "PYTHON=$PYTHON is not a working Python 3.11 or 3.12"
    python=$PYTHON
else
    for candidate in python3.11 python3.12 python3; do  # 3.11 first: it is what the lock was resolved with
        if supported "$(version_of "$candidate")"; then
            python=$candidate
            break
        fi
    done
fi

children=()
trap 'kill "${children[@]}" 2>/dev/null || true; echo "set-up: interrupted; the next call continues from here" >&2; exit 130' INT TERM HUP

begin() {
    step=$((step + 1))
    title=$1
    echo "set-up $step/$steps: $title (${SECONDS} s)"
}

start() {  # a command in the background, its output in the log
    echo "+ $*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null &
    children+=($!)
}

finish() {  # waits for what was started, with a sign of life every 10 s; fails if one of them failed
    local told=$SECONDS code=0 child
    for child in "${children[@]}"; do
        while kill -0 "$child" 2>/dev/null; do
            sleep 0.2
            if ((SECONDS - told >= 10)); then
                told=$SECONDS
                echo "  ... ${SECONDS} s$(progress)"
            fi
        done
        wait "$child" || code=$?
    done
    children=()
    return "$code"
}

progress() {
    if ((step == 3)); then
        echo ", $(grep -oE '^(Collecting|Processing|Requirement already satisfied:) [^ ]*' "$log" | sort -u | wc -l) packages fetched"
    fi
}

run() {
    start "$@"
    finish
}

failed() {
    echo "--- last lines of $log" >&2
    tail -n 15 "$log" >&2
    die "set-up failed at step $step of $steps ($title) after ${SECONDS} s; ${1:-see $log}"
}

# Scripts in bin/ name the venv's path in their first line, so a venv that was moved or copied is made anew, as is one
# of another Python or with its interpreter gone.
usable() {
    local version made
    version=$(version_of "$venv/bin/python")
    supported "$version" || return 1
    [[ -z ${PYTHON:-} || $version == "$(version_of "$PYTHON")" ]] || return 1
    made=$(grep '^command = ' "$venv/pyvenv.cfg" 2>/dev/null || true)
    [[ -z $made || $made == *" $venv" ]] || return 1
    "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

rm -f "$stamp"
if usable; then
    : >"$log"
    begin "virtual environment is there"
    # pip writes INSTALLER last. A package without it was interrupted, and pip would take it for installed.
    for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
        [[ -f $info/INSTALLER ]] || rm -rf "$info"
    done
else
    [[ -n $python ]] || die "needs Python 3.11 or 3.12: no working python3.11, python3.12 or python3 on PATH; or set PYTHON"
    if [[ -f $venv/pyvenv.cfg ]]; then  # so it is a venv, and not some other folder that must not be emptied
        echo "set-up: $venv is incomplete, moved or of another Python: making it anew"
        find "$venv" -mindepth 1 -delete
    fi
    mkdir -p "$venv"
    : >"$log"
    begin "virtual environment"
    run "$python" -m venv "$venv" || failed "Debian and Ubuntu have venv in a package of its own: python3-venv"
fi
pip_install=("$venv/bin/python" -m pip install --no-deps)

# torch first, on its own: only it may come from PyTorch's index, and only if the configured one lacks the +cpu build.
torch=$(grep '^torch==' "$lock")
begin "$torch"
if ! run "${pip_install[@]}" "$torch"; then
    echo "  not in the configured index; trying PyTorch's own"
    run "${pip_install[@]}" --timeout 15 --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "$torch" ||
        failed "neither the configured index nor download.pytorch.org has given $torch for Python $(version_of "$venv/bin/python")"
fi

# Two pips, each with every other line: most of the time goes into unpacking and compiling, on one core each. Should one
# stumble (over the network, or over the other), a single one has the last word.
begin "$((packages - 1)) more packages of $lock"
grep == "$lock" | sed -n 'p;n' >"$venv/lock.odd"
grep == "$lock" | sed -n 'n;p' >"$venv/lock.even"
start "${pip_install[@]}" -r "$venv/lock.odd"
start "${pip_install[@]}" -r "$venv/lock.even"
finish || run "${pip_install[@]}" -r "$lock" || failed

begin "this project, editable"
run "${pip_install[@]}" --no-build-isolation -e . || failed

begin "check"
run "$venv/bin/python" tools/check_env.py "$lock" || failed

printf '%s\n' "$want" >"$stamp"
echo "set-up: done in ${SECONDS} s ($venv)"
