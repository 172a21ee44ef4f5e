"""`glowplug engine`: run a model server as a supervised child, behind one port; and what goes with it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from glowplug import subcommands
from glowplug.verbs import engine_calibrate


class _Verbs(subcommands.Verbs):
    """Whatever does not begin with a verb is `run`'s."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else ["run", *args])


@click.group("engine", cls=_Verbs)
def command() -> None:
    """Run a model server (`run`, which need not be said), or measure one."""


command.add_command(engine_calibrate.command)


@command.command("run")
@click.option(
    "--config",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Settings, YAML or JSON (docs/engine.md); the options below win over them.",
)
@click.option("--model", metavar="DIR", help="Serve this checkpoint with vLLM; ARGS are vLLM's.")
@click.option("--model-name", metavar="NAME", help="What clients call the model.")
@click.option("--python", metavar="PROGRAM", help="The interpreter that has vLLM (default python3).")
@click.option("--address", metavar="IP", help="Where to listen (default 127.0.0.1).")
@click.option("--port", type=click.IntRange(0, 65_535), help="Default 8000; 0 takes a free one.")
@click.option("--control", metavar="PATH", help="Unix socket for status, limit and drain.")
@click.option("--cache", "cache_directory", metavar="DIR", help="Compiled kernels and graphs, kept.")
@click.option("--instance", metavar="NAME", help="Which of its service's replicas this is (default 0).")
@click.option("--limit", type=click.IntRange(1, 100_000), help="Requests in flight (default 64).")
@click.argument("args", metavar="[-- ARGS...]", nargs=-1, type=click.UNPROCESSED)
def run(file: Path | None, args: tuple[str, ...], python: str | None, **given: Any) -> None:
    """Run an engine: vLLM on a model (--model DIR; ARGS are further options of vLLM), any program that serves
    HTTP on the port in $PORT (ARGS are the program), or what a settings file describes (--config).

    It is restarted when it crashes or hangs, admits as many requests as the limit says and answers 429 to the
    rest, and finishes what it has when it is told to stop (SIGTERM)."""
    from serving.engine import settings, supervise

    overrides = {name: value for name, value in given.items() if value is not None}
    if file is not None:
        if args or python or "model" in overrides:
            raise click.UsageError("--config describes the engine: leave --model, --python and ARGS out")
        document = settings.load(file.read_text(), str(file)).model_dump(exclude_unset=True)
    elif "model" in overrides:
        engine: dict[str, Any] = {"kind": "vllm", "arguments": args}
        document = {"engine": engine if python is None else {**engine, "python": python}}
    elif args:
        document = {"engine": {"kind": "command", "command": args}}
    else:
        raise click.UsageError("give --model DIR, -- PROGRAM..., or --config FILE")
    asyncio.run(supervise.Supervisor(settings.check({**document, **overrides}, "options")).run())
