"""The command line: `trtllm-mm-cache serve|frontend|encode|pd|drop|ask|plan`.

Every subcommand imports what it needs when it runs, so that `--help` answers at once and no
command loads an engine it does not use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from trtllm_mm_cache import __version__
from trtllm_mm_cache.cli.options import parse, settings_options
from trtllm_mm_cache.errors import ConfigurationError, MmCacheError
from trtllm_mm_cache.imports import without_collector
from trtllm_mm_cache.settings import (
    AskSettings,
    DropSettings,
    EncodeSettings,
    EngineName,
    FrontendSettings,
    PdSettings,
    PlanSettings,
    ServeSettings,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="trtllm-mm-cache")
@click.pass_context
def cli(context: click.Context) -> None:
    """Multimodal serving that never runs the vision encoder twice on the same image.

    `serve` starts everything on this machine; then `ask photo.jpg "What is this?"`. Elsewhere start
    `frontend`, one or more `encode` workers and one or more `pd` workers, in any order.
    """
    # Dynamo reads these when it is imported. A command that prints results shows none of its lines.
    os.environ.setdefault("DYN_LOG", "off" if context.invoked_subcommand == "drop" else "warn")
    os.environ.setdefault("DYN_SDK_DISABLE_ANSI_LOGGING", "1")


@cli.command()
@settings_options(ServeSettings)
def serve(settings: ServeSettings) -> None:
    """Start frontend, encode workers and PD workers on this machine, and keep them up.

    Takes the options of the PD workers; what processes must agree on counts for all. Ctrl-C stops everything,
    SIGTERM lets what runs finish first.
    """
    from trtllm_mm_cache.serve.plan import make_plan
    from trtllm_mm_cache.serve.run import run_serve

    plan = make_plan(settings)
    try:
        encode_settings = parse(EncodeSettings, plan.encode_arguments()[1:])
    except click.UsageError as error:
        raise ConfigurationError(f"ENCODE_EXTRA_ARGS: {error.format_message()}") from error
    sys.exit(run_serve(plan, encode_settings))


@cli.command(hidden=True)
@click.argument("engine")
def warm_start(engine: EngineName) -> None:
    """Fork workers for `serve`, which starts this."""
    from trtllm_mm_cache.serve.warm import fork_workers

    arguments = fork_workers(engine)
    if arguments is not None:
        main(arguments)


@cli.command()
@settings_options(FrontendSettings)
def frontend(settings: FrontendSettings) -> None:
    """Serve the OpenAI HTTP API and route requests to the PD workers."""
    from trtllm_mm_cache.frontend.process import run_frontend

    run_frontend(settings)


@cli.command()
@settings_options(EncodeSettings)
def encode(settings: EncodeSettings) -> None:
    """Run an encode worker: images in, embeddings out, over NIXL."""
    with without_collector():
        from trtllm_mm_cache.encode.process import run_encode_worker

    run_encode_worker(settings)


@cli.command()
@settings_options(PdSettings)
def pd(settings: PdSettings) -> None:
    """Run a prefill+decode worker with its embedding cache."""
    with without_collector():
        from trtllm_mm_cache.pd.process import run_pd_worker

    run_pd_worker(settings)


@cli.command()
@settings_options(DropSettings)
def drop(settings: DropSettings) -> None:
    """Drop cached embeddings on every worker: of one image, one key, all of one salt, or everything.

    What a request holds remains valid for it, what is on its way is served and not kept. Fetched http(s)
    files are dropped too.
    """
    # In a worker's container that port is the worker's.
    os.environ.pop("DYN_SYSTEM_PORT", None)
    from trtllm_mm_cache.cli.drop import run_drop

    run_drop(settings)


@cli.command()
@click.argument("arguments", nargs=-1, required=True, metavar="[IMAGE]... QUESTION")
@settings_options(AskSettings)
def ask(settings: AskSettings, arguments: tuple[str, ...]) -> None:
    """Ask a running server about images and stream its answer.

    IMAGE is a file or an http(s) URL; any number of them may precede the QUESTION.
    """
    from trtllm_mm_cache.cli.ask import ask_server

    *images, question = arguments
    ask_server(images, question, settings)


@cli.command()
@settings_options(PlanSettings)
def plan(settings: PlanSettings) -> None:
    """Say how much memory a working set of images takes, and which flags to set.

    Loads no weights: a directory with a model's configuration and tokenizer files is enough.
    """
    from trtllm_mm_cache.cli.plan import make_plan

    click.echo(make_plan(settings).text())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (sys.argv's, if not given) and exit; an operator's mistake ends in one line."""
    try:
        status = cli.main(
            None if arguments is None else [*arguments], prog_name="trtllm-mm-cache", standalone_mode=False
        )
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else cli.name
        _exit(f"{error.format_message()} ({command} --help shows what there is)", 2)
    except click.ClickException as error:
        _exit(error.format_message(), error.exit_code)
    except click.Abort:
        _exit("interrupted", 130)
    except ConfigurationError as error:
        _exit(str(error), 2)
    except MmCacheError as error:
        _exit(str(error), 1)
    sys.exit(status)


def _exit(message: str, status: int) -> NoReturn:
    from trtllm_mm_cache.observability.logs import say

    say(f"error: {message}")
    sys.exit(status)


if __name__ == "__main__":
    main()
