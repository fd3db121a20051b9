#!/usr/bin/env bash
# Looks the packages of tools/cpu.lock up among PyPI's advisories, in an environment of its own (.venv-audit):
#   tools/audit.sh
#   tools/audit.sh --ignore-vuln GHSA-xxxx-xxxx-xxxx      one that does not concern this project
# Exit code 1: a package has a known vulnerability; 3: nothing could be looked up.
set -euo pipefail
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null
venv=.venv-audit
if [[ ! -x $venv/bin/pip-audit ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q 'pip-audit>=2.7,<3' || exit 3
fi

rm -f "$venv/found.json"
"$venv/bin/pip-audit" -r tools/cpu.lock --no-deps --disable-pip -f json -o "$venv/found.json" "$@" || [[ -s $venv/found.json ]]
exec "$venv/bin/python" - "$venv/found.json" <<'PYTHON'
import json
import sys

with open(sys.argv[1]) as file:
    packages = json.load(file)["dependencies"]
holes = [(package, hole) for package in packages for hole in package.get("vulns", [])]
for package, hole in holes:
    fixed = ", ".join(hole["fix_versions"]) or "no version yet"
    print(f"{package['name']} {package['version']}: {hole['id']}, mended in {fixed}")
looked_up = sum("skip_reason" not in package for package in packages)
print(f"{looked_up} of {len(packages)} packages were looked up")
if not looked_up:
    print("the advisories cannot be reached")
sys.exit(1 if holes else 0 if looked_up else 3)
PYTHON
