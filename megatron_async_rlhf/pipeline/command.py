"""`async-rlhf pipeline`: from a recipe to stages that are run, and what came of them."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_async_rlhf.launch.surroundings import check_surroundings
from megatron_async_rlhf.launch.terminal import outlive_readers
from megatron_async_rlhf.options import warn


def pipeline(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or a folder with pipeline.yaml, such as examples/mini.")],
    set: Annotated[
        list[str], typer.Option("--set", "-s", help="Override one key: stage.section.key=value. Repeatable.")
    ] = [],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every stage, print the plan of each, start nothing.")
    ] = False,
) -> None:
    """Run the stages of a recipe one after the other: SFT, reward model, RLHF, evaluation.

    Stages that are done are skipped, one that was cut off continues. Exit code 0 if all are completed, 1 if one failed, 130 if
    it was interrupted.

    Example: async-rlhf pipeline examples/mini
    """
    from rich.console import Console

    from megatron_async_rlhf.launch.recipe import load_recipe
    from megatron_async_rlhf.pipeline.driver import Driver
    from megatron_async_rlhf.pipeline.dry_run import plan_pipeline
    from megatron_async_rlhf.pipeline.plot import write_plot
    from megatron_async_rlhf.pipeline.records import PIPELINE

    loaded = load_recipe(recipe, set)
    if dry_run:
        return plan_pipeline(loaded, typer.echo)
    warn(check_surroundings())
    outlive_readers()
    console = Console(highlight=False, soft_wrap=True)
    with console.status("") as status:
        driver = Driver(
            loaded,
            note=lambda line: console.print(line, markup=False),
            watch=(lambda line: status.update(line.replace("[", r"\["))) if console.is_terminal else None,
        )
        code = driver.run()
    for path in (loaded.directory / PIPELINE, write_plot(loaded)):
        if path is not None:
            console.print(f"{path}", markup=False)
    raise typer.Exit(code)
