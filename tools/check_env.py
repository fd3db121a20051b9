"""Fails with one line per problem unless the packages of a lock file are here at its versions and the engines import."""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

problems = []
for line in Path(sys.argv[1]).read_text().splitlines():
    if not line or line.startswith("#"):
        continue
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate():
        continue
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        found = "missing"
    if str(requirement.specifier) != f"=={found}":
        problems.append(f"{requirement.name} is {found}, the lock says {requirement.specifier}")
for module in ("torch", "transformers", "vllm", "megatron.core"):
    try:
        importlib.import_module(module)
    except Exception as error:  # any failure here means that nothing else can run
        problems.append(f"import {module}: {type(error).__name__}: {error}")
if problems:
    sys.exit("\n".join(problems))
