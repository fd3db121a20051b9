"""`model.hf` may name a Hugging Face directory or a checkpoint made of one; both are checked without torch."""

from pathlib import Path

import pytest
from hf_models import TOKENIZER_FILES

from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.converter.convert import import_hf
from megatron_async_rlhf.data.tokenizer import DATE
from megatron_async_rlhf.errors import CheckpointError, ConfigError
from megatron_async_rlhf.jobs import described
from megatron_async_rlhf.jobs.described import missing_inputs
from megatron_async_rlhf.jobs.inputs import make_model_template


@pytest.fixture
def checkpoint(make_model, tmp_path: Path) -> Path:
    import_hf(make_model().directory, tmp_path / "checkpoint", tensor_parallel=2, pipeline_parallel=1, dtype=None)
    return tmp_path / "checkpoint"


def template_of(source: Path, directory: Path) -> dict[str, bytes]:
    make_model_template(RunConfig.model_validate({"model": {"hf": str(source)}, "learner": {}}), directory)
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != DATE}


def test_a_run_gets_the_same_template_from_either(make_model, checkpoint: Path, tmp_path: Path):
    template = template_of(checkpoint, tmp_path / "template")
    assert set(template) == {"config.json", "generation_config.json", *TOKENIZER_FILES}
    assert template == template_of(make_model().directory, tmp_path / "of the original")


def test_a_checkpoint_that_is_not_all_there_is_refused(checkpoint: Path, tmp_path: Path):
    (checkpoint / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"has no .metadata"):
        template_of(checkpoint, tmp_path / "template")
    (checkpoint / "hf/config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config.json"):
        template_of(checkpoint, tmp_path / "template")


def test_a_checkpoint_can_be_planned_with_where_torch_is_not_installed(make_model, tmp_path: Path, monkeypatch):
    """Its weights are not checked then, and the dry run says so."""
    import_hf(make_model().directory, tmp_path / "checkpoint", tensor_parallel=1, pipeline_parallel=1, dtype=None)
    config = RunConfig.model_validate({"model": {"hf": str(tmp_path / "checkpoint")}})
    assert missing_inputs(config).lines == []
    monkeypatch.setattr(described, "find_spec", lambda name: None)
    assert [line.split(": ")[0] for line in missing_inputs(config).lines] == ["weights"]


def test_additional_templates_go_along(make_model, tmp_path: Path):
    directory = make_model().directory
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/tool_use.jinja").write_text("tools")
    import_hf(directory, tmp_path / "checkpoint", tensor_parallel=1, pipeline_parallel=1, dtype=None)
    assert (tmp_path / "checkpoint/hf/additional_chat_templates/tool_use.jinja").read_text() == "tools"
