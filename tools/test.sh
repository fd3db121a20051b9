#!/usr/bin/env bash
# Sets the environment up and runs the tests, all of them or a choice of some minutes. Other arguments go to pytest:
#   tools/test.sh --quick
#   tools/test.sh -m "not slow" tests/config
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null
tools/setup_env.sh

if [[ ${1:-} == --quick ]]; then
    shift
    set -- -m quick "$@"
fi
code=0
# Three at a time, also on two cores, since most wait for servers to start; tests/conftest.py says which stay together.
"${ASYNC_RLHF_VENV:-.venv}/bin/python" -m pytest -q -n 3 --dist loadfile --durations=10 "$@" || code=$?
if ((code)); then
    echo "failed: pytest ended with exit code $code"
else
    echo "passed: all tests that ran"
fi
exit "$code"
