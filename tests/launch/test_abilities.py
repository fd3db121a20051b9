"""How many GPUs a machine has, as a process of its own says."""

from pathlib import Path
from types import SimpleNamespace

from megatron_async_rlhf.config.load import load_config
from megatron_async_rlhf.launch import abilities


def test_what_packages_print_when_they_are_imported_is_no_answer(monkeypatch):
    told = 'Loading plugins ...\n{"gpus": 4, "problems": []}\n'
    monkeypatch.setattr(
        abilities.subprocess, "run", lambda *arguments, **more: SimpleNamespace(returncode=0, stdout=told, stderr="")
    )
    assert abilities.count_gpus(load_config(Path(__file__).parents[2] / "examples/llama8b_async.yaml")) == 4
