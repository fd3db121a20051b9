"""The `async-rlhf` command."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_async_rlhf.config.load import dump_config, load_config
from megatron_async_rlhf.config.root import RunConfig
from megatron_async_rlhf.errors import AsyncRLHFError, CheckpointError, ConfigError, DataError, MappingError
from megatron_async_rlhf.telemetry.files import POLICY_TEMPLATE_DIR

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_EXIT_BAD_INPUT = 2

ConfigArgument = Annotated[Path, typer.Argument(help="YAML configuration, such as examples/quickstart.yaml.")]
SetOption = Annotated[list[str], typer.Option("--set", "-s", help="Override one key: section.key=value. Repeatable.")]

Dtype = Literal["bfloat16", "float32"]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Round the weights to this; else they keep their dtype.")]
ModelConfigOption = Annotated[
    Path | None,
    typer.Option(help="Hugging Face directory describing a checkpoint that Megatron saved without a description."),
]


@app.callback()
def _root() -> None:
    """Asynchronous RLHF: Megatron-core learns while vLLM generates."""


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Also say what of this configuration the machine cannot do.")
    ] = None,
    set: SetOption = [],
) -> None:
    """Show what this machine can run, and how to get what is missing; exit code 1 if a run cannot work.

    Example: async-rlhf doctor examples/quickstart.yaml
    """
    from megatron_async_rlhf.doctor import examine, problems

    resolved = load_config(config, set) if config is not None else None
    broken = False
    for finding in examine():
        advice = f"  ({finding.advice})" if finding.advice and finding.state != "ok" else ""
        typer.echo(f"{finding.state:8}{finding.what}: {finding.detail}{advice}")
        broken |= finding.state == "broken"
    for problem in problems(resolved) if resolved is not None and not broken else []:
        typer.echo(f"{'cannot':8}{problem}")
        broken = True
    raise typer.Exit(int(broken))


@app.command()
def train(
    config: ConfigArgument,
    set: SetOption = [],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print plan and estimate, start nothing.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the last checkpoint in run.dir; from the beginning if there is none."
        ),
    ] = False,
) -> None:
    """Run the whole RLHF job on this machine.

    Example: async-rlhf train examples/quickstart.yaml -s schedule.mode=sync -s run.name=sync
    """
    from megatron_async_rlhf.estimate.report import refuse_too_large
    from megatron_async_rlhf.launch.abilities import check_device
    from megatron_async_rlhf.launch.plan import plan_processes
    from megatron_async_rlhf.launch.resume import find_resumption
    from megatron_async_rlhf.launch.run_directory import check_writable, create_run_directory, reopen_run_directory
    from megatron_async_rlhf.prepare import load_materials, make_model_template

    resolved = load_config(config, set)
    check_writable(resolved)
    run_dir, version = resolved.run.path.absolute(), None
    if resume:
        resumption = find_resumption(resolved)
        typer.echo(resumption.note)
        if resumption.finished:
            return
        version = resumption.version
    if dry_run:
        _print_plan(resolved)
        return
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch) / "model" if version is None else run_dir / POLICY_TEMPLATE_DIR
        if version is None:
            make_model_template(resolved, template)
        architecture = load_materials(resolved, template).architecture
        refuse_too_large(resolved, architecture)
        plan = plan_processes(resolved, run_dir, architecture.context_length, version)
        if resolved.run.device == "cuda":
            (Path(scratch) / "config.yaml").write_text(dump_config(resolved))
            check_device(Path(scratch) / "config.yaml")
        aside = None
        if version is None:
            run_dir, aside = create_run_directory(resolved, template)
        else:
            reopen_run_directory(resolved, version)
    if aside is not None:
        typer.echo(f"an earlier run is now in {aside}")

    from megatron_async_rlhf.launch.display import Display
    from megatron_async_rlhf.launch.local import Supervisor

    raise typer.Exit(Supervisor(resolved, plan, run_dir, Display()).run())


@app.command()
def simulate(
    config: ConfigArgument,
    set: SetOption = [],
    generators: Annotated[int | None, typer.Option(min=1, help="Default: generator.replicas.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Completions in all; default: schedule.steps.")] = None,
    from_run: Annotated[
        Path | None, typer.Option(help="A finished run: lengths and times are as they were there, unless given.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="constant:TOKENS or lognormal:MEAN:SIGMA.")] = None,
    token_s: Annotated[float | None, typer.Option(min=0, help="Seconds of a decoding step, whatever is in it.")] = None,
    sequence_s: Annotated[float | None, typer.Option(min=0, help="And for each sequence in it.")] = None,
    train_s: Annotated[float | None, typer.Option(min=0, help="Seconds of an optimizer step.")] = None,
    train_token_s: Annotated[float | None, typer.Option(min=0, help="And for each token in it.")] = None,
    push_s: Annotated[float | None, typer.Option(min=0, help="Seconds the engines are paused for new weights.")] = None,
    crashes_per_hour: Annotated[float, typer.Option(min=0, help="Of each generator.")] = 0.0,
    back_s: Annotated[float, typer.Option(min=0.1, help="Seconds until it is back, on average.")] = 60.0,
    slow: Annotated[int, typer.Option(min=0, help="So many generators are three times as slow.")] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    trace: Annotated[Path | None, typer.Option(help="Write the timeline, for Perfetto.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Run the scheduler on imaginary machines, in virtual time, next to the synchronous schedule.

    All promises of the schedule are checked meanwhile; exit code 1 if one is broken.

    Example: async-rlhf simulate examples/llama8b_async.yaml --samples 20000 --push-s 4
    """
    from megatron_async_rlhf.simulate import command

    resolved = command.load_sized(config, set, samples)
    number = generators or resolved.generator.replicas
    speeds = {
        "token_s": token_s,
        "sequence_s": sequence_s,
        "train_s": train_s,
        "train_token_s": train_token_s,
        "push_s": push_s,
    }
    scenario = command.make_scenario(
        resolved,
        from_run,
        lengths,
        speeds,
        generators=number,
        crashes_per_hour=crashes_per_hour,
        back_s=back_s,
        slowness=dict.fromkeys(range(min(slow, number)), 3.0),
        seed=seed,
    )
    report = command.run(resolved, scenario, trace)
    if json_:
        typer.echo(json.dumps(report, indent=1))
        return
    from rich.console import Console

    from megatron_async_rlhf.simulate.report import show

    show(Console(), report)


@app.command()
def import_hf(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face directory: safetensors, config.json, tokenizer.")],
    out: Annotated[Path, typer.Argument(help="The checkpoint to write; must not exist, or be empty.")],
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks the files are cut for.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1, help="Pipeline stages the files are cut for.")] = 1,
    dtype: DtypeOption = None,
) -> None:
    """Make a Megatron distributed checkpoint (`torch_dist`) of a Hugging Face model.

    Any number of ranks can load it, whatever it was cut for.

    Example: async-rlhf import-hf models/Qwen2.5-0.5B checkpoints/qwen --tensor-parallel 2 --pipeline-parallel 2
    """
    from megatron_async_rlhf.checkpoint.convert import import_hf

    import_hf(hf_dir, out, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, dtype=dtype)
    typer.echo(f"wrote {out}")


@app.command()
def export_hf(
    checkpoint: Annotated[Path, typer.Argument(help="A Megatron `torch_dist` checkpoint, or a run directory.")],
    out: Annotated[Path, typer.Argument(help="The Hugging Face directory to write; must not exist, or be empty.")],
    dtype: DtypeOption = None,
    config: ModelConfigOption = None,
) -> None:
    """Make a Hugging Face directory of a Megatron checkpoint, or of the last policy of a run.

    Example: async-rlhf export-hf checkpoints/qwen exported/qwen --dtype bfloat16
    """
    from megatron_async_rlhf.checkpoint.convert import export_hf

    export_hf(checkpoint, out, dtype=dtype, config=config)
    typer.echo(f"wrote {out}")


@app.command()
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
    from megatron_async_rlhf.checkpoint.sources import open_holders
    from megatron_async_rlhf.weights.verify import compare

    result = compare(*open_holders(a, b, config), cast)
    compared = f"{result.num_bytes} bytes in {result.boxes} pieces compared"
    if not result.exact:
        compared += ", negative zeros taken for positive ones"
    if not result.differing:
        typer.echo(f"equal: {result.tensors} tensors, {compared}")
        return
    typer.echo(f"different: {result.first}")
    typer.echo(f"{len(result.differing)} of {result.tensors} tensors differ, {compared}")
    raise typer.Exit(1)


def _print_plan(config: RunConfig) -> None:
    """All that can be said without starting anything: of a model that is not here, what follows from its shape."""
    from megatron_async_rlhf.estimate.report import describe
    from megatron_async_rlhf.launch.plan import plan_processes
    from megatron_async_rlhf.prepare import load_materials, make_model_template, missing_inputs, outline

    missing = missing_inputs(config)
    if missing:
        architecture, transfer = outline(config, config.model.hf)
        prompts = "# prompts: not checked"
    else:
        with tempfile.TemporaryDirectory() as scratch:
            make_model_template(config, Path(scratch))
            materials = load_materials(config, Path(scratch))
        architecture, transfer = materials.architecture, materials.transfer
        prompts = f"# prompts: {len(materials.train)} to train on, {len(materials.eval)} held out"
    typer.echo(dump_config(config))
    typer.echo(f"# policy: {architecture.num_parameters / 1e6:.2f} M parameters")
    typer.echo(prompts)
    slices = sum(len(message) for messages in transfer.streams.values() for message in messages)
    rounds = max(len(messages) for messages in transfer.streams.values())
    megabytes = transfer.num_bytes * config.generator.replicas / 1e6
    typer.echo(f"# weights: {megabytes:.2f} MB a push: {slices} slices in {rounds} rounds to each generator")
    for line in describe(config, architecture):
        typer.echo(f"# {line}")
    for process in plan_processes(config, config.run.path.absolute(), architecture.context_length).processes:
        cores = f"cores {process.cores}" if process.cores else "any core"
        where = f"GPUs {process.gpus}" if process.gpus else cores
        typer.echo(f"# {process.name}: {where}: {' '.join(process.arguments)}")
    for line in missing:
        typer.echo(f"# not checked, and needed for a start: {line}")


def main() -> None:
    """Entry point; errors the user can mend are one line each on stderr, exit code 2 before anything started."""
    try:
        app(standalone_mode=True)
    except (ConfigError, DataError, CheckpointError, MappingError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(_EXIT_BAD_INPUT) from None
    except AsyncRLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
