"""`async-rlhf import-hf`, `export-hf` and `verify-weights`: weights between formats, and the proof that they are the same."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megatron_async_rlhf.errors import CheckpointError
from megatron_async_rlhf.installed import check_installed

Dtype = Literal["bfloat16", "float32"]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Round the weights to this; else they keep their dtype.")]
ModelConfigOption = Annotated[
    Path | None,
    typer.Option(help="Hugging Face directory describing a checkpoint that Megatron saved without a description."),
]


def import_hf(
    hf_dir: Annotated[
        Path,
        typer.Argument(help="Hugging Face directory (safetensors, config.json, tokenizer), or a name at the hub."),
    ],
    out: Annotated[Path, typer.Argument(help="The checkpoint to write; must not exist, or be empty.")],
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks the files are cut for.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1, help="Pipeline stages the files are cut for.")] = 1,
    dtype: DtypeOption = None,
) -> None:
    """Make a Megatron distributed checkpoint (`torch_dist`) of a Hugging Face model.

    Any number of ranks can load it, whatever it was cut for.

    Example: async-rlhf import-hf models/Qwen2.5-0.5B checkpoints/qwen --tensor-parallel 2 --pipeline-parallel 2
    """
    check_installed("torch")
    from megatron_async_rlhf.converter.convert import import_hf
    from megatron_async_rlhf.formats.hub_snapshot import local_model

    import_hf(
        local_model(hf_dir, "HF_DIR"),
        out,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        dtype=dtype,
    )
    typer.echo(f"wrote {out}")


def export_hf(
    checkpoint: Annotated[Path, typer.Argument(help="A Megatron `torch_dist` checkpoint, or a run directory.")],
    out: Annotated[Path, typer.Argument(help="The Hugging Face directory to write; must not exist, or be empty.")],
    dtype: DtypeOption = None,
    config: ModelConfigOption = None,
) -> None:
    """Make a Hugging Face directory of a Megatron checkpoint, or of the last policy of a run.

    Example: async-rlhf export-hf checkpoints/qwen exported/qwen --dtype bfloat16
    """
    check_installed("torch")
    from megatron_async_rlhf.converter.convert import export_hf

    export_hf(checkpoint, out, dtype=dtype, config=config)
    typer.echo(f"wrote {out}")


def verify_weights(
    a: Annotated[
        str,
        typer.Argument(help="A Hugging Face directory, a Megatron checkpoint, a run, or a running generator's URL."),
    ],
    b: Annotated[str, typer.Argument(help="What to compare it with; any of the four.")],
    cast: Annotated[
        Dtype | None, typer.Option(help="Compare after rounding both sides to this dtype; else dtypes must agree.")
    ] = None,
    config: ModelConfigOption = None,
) -> None:
    """Prove byte by byte that two holders of a model have the same weights; exit code 1 if they have not.

    Example: async-rlhf verify-weights models/Qwen2.5-0.5B checkpoints/qwen
    """
    check_installed("torch")
    from megatron_async_rlhf.converter.sources import open_holders

    compare_holders(*open_holders(a, b, config), cast)


def verify_checkpoint(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run: then all checkpoints that it has.")],
) -> None:
    """Compare every file of a checkpoint with the digest that was written beside it; exit code 1 if one is not as it was.

    Example: async-rlhf verify-checkpoint runs/quickstart
    """
    from megatron_async_rlhf.checkpoint.run_checkpoints import all_checkpoints
    from megatron_async_rlhf.formats.file_digests import check_digests

    broken = 0
    for checkpoint in all_checkpoints(path):
        try:
            read = check_digests(checkpoint)
        except CheckpointError as error:
            typer.echo(f"broken: {error}")
            broken += 1
        else:
            said = f"{read / 1e6:,.1f} MB, all as written" if read else "has no digests: an earlier version wrote it"
            typer.echo(f"{checkpoint}: {said}")
    if broken:
        raise typer.Exit(1)


def compare_holders(a: Any, b: Any, cast: Dtype | None) -> None:
    """Of two open holders of weights; exits with 1 if they differ."""
    from megatron_async_rlhf.converter.verify import compare

    result = compare(a, b, cast)
    compared = f"{result.num_bytes} bytes in {result.boxes} pieces compared"
    if not result.exact:
        compared += ", negative zeros taken for positive ones"
    if not result.differing:
        typer.echo(f"equal: {result.tensors} tensors, {compared}")
        return
    typer.echo(f"different: {result.first}")
    typer.echo(f"{len(result.differing)} of {result.tensors} tensors differ, {compared}")
    raise typer.Exit(1)
