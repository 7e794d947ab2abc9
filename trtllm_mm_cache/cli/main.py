"""The command line: `trtllm-mm-cache frontend|encode|pd|drop|ask|plan`.

Every subcommand imports what it needs when it runs, so that `--help` answers at once and no
command loads an engine it does not use.
"""

from __future__ import annotations

import os
import sys

import click

from trtllm_mm_cache import __version__
from trtllm_mm_cache.cli.options import settings_options
from trtllm_mm_cache.errors import ConfigurationError, MmCacheError
from trtllm_mm_cache.settings import (
    AskSettings,
    DropSettings,
    EncodeSettings,
    FrontendSettings,
    PdSettings,
    PlanSettings,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="trtllm-mm-cache")
@click.pass_context
def cli(context: click.Context) -> None:
    """Multimodal serving that never runs the vision encoder twice on the same image.

    Start `frontend`, one or more `encode` workers and one or more `pd` workers, in any order; or all
    of them with launch/disagg_e_pd.sh. Then `ask photo.jpg "What is this?"`.
    """
    # Dynamo reads these when it is imported. A command that prints results shows none of its lines.
    os.environ.setdefault("DYN_LOG", "off" if context.invoked_subcommand == "drop" else "warn")
    os.environ.setdefault("DYN_SDK_DISABLE_ANSI_LOGGING", "1")


@cli.command()
@settings_options(FrontendSettings)
def frontend(settings: FrontendSettings) -> None:
    """Serve the OpenAI HTTP API and route requests to the PD workers."""
    from trtllm_mm_cache.runtime.frontend import run_frontend

    run_frontend(settings)


@cli.command()
@settings_options(EncodeSettings)
def encode(settings: EncodeSettings) -> None:
    """Run an encode worker: images in, embeddings out, over NIXL."""
    from trtllm_mm_cache.encode.process import run_encode_worker

    run_encode_worker(settings)


@cli.command()
@settings_options(PdSettings)
def pd(settings: PdSettings) -> None:
    """Run a prefill+decode worker with its embedding cache."""
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


def main() -> None:
    """Entry point: run the command line; an operator's mistake ends in one line and exit code 2."""
    try:
        cli.main(standalone_mode=True)
    except MmCacheError as error:
        from trtllm_mm_cache.observability.logs import say

        say(f"error: {error}")
        sys.exit(2 if isinstance(error, ConfigurationError) else 1)


if __name__ == "__main__":
    main()
