"""`glowplug quantize`: FP8 checkpoints, and whether they are good enough."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from glowplug import subcommands, terminal

if TYPE_CHECKING:
    from serving.quantize import job


class _ModelByDefault(subcommands.Verbs):
    """`quantize MODEL OUT` is `quantize model MODEL OUT`; a directory called eval is ./eval."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["model", *args]
        return super().parse_args(ctx, args)


_PYTHON = click.option(
    "--python",
    default=sys.executable,
    envvar="GLOWPLUG_QUANTIZE_PYTHON",
    show_envvar=True,
    show_default=False,
    help="The interpreter that has llm-compressor (default: this one).",
)
_DIRECTORY = click.Path(path_type=Path)


@click.group("quantize", cls=_ModelByDefault)
def command() -> None:
    """Make an FP8 checkpoint of a model, and compare it with the original.

    glowplug quantize MODEL_DIR OUT [--no-attention] [--ignore REGEX]

    glowplug quantize eval MODEL_DIR QUANTIZED_DIR --text FILE
    """


@command.command("model")
@click.argument("model", type=_DIRECTORY)
@click.argument("out", type=_DIRECTORY)
@click.option("--attention/--no-attention", default=True, help="Whether attention becomes FP8, too.")
@click.option(
    "--ignore", multiple=True, metavar="REGEX", help="Keep layers whose name begins so; repeatable."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
@_PYTHON
def quantize_model(
    model: Path, out: Path, attention: bool, ignore: tuple[str, ...], as_json: bool, python: str
) -> None:
    """Quantize the checkpoint in MODEL into OUT (compressed-tensors; vLLM loads it without a flag)."""
    from serving.quantize import job

    done = job.quantize(model, out, python, attention=attention, ignore=ignore)
    if as_json:
        print(json.dumps(dataclasses.asdict(done)))
        return
    kept: dict[str, int] = {}
    for reason in done.kept.values():
        kept[reason] = kept.get(reason, 0) + 1
    saved = 1 - done.bytes_after / done.bytes_before
    print(f"{out}: {len(done.quantized)} layers are FP8, one scale per output channel")
    print("  kept: " + ", ".join(f"{count} ({reason})" for reason, count in sorted(kept.items())))
    print(
        f"  weights {terminal.size(done.bytes_before)} -> {terminal.size(done.bytes_after)} "
        f"({saved:.0%} less)"
    )
    print(
        f"  peak memory {terminal.size(done.peak_bytes)}, {terminal.size(done.import_bytes)} of it "
        f"libraries; largest shard {terminal.size(done.largest_shard_bytes)}"
    )
    print(f"  not judged yet: glowplug quantize eval {model} {out} --text FILE")


@command.command("eval", context_settings={"show_default": True})
@click.argument("model", type=_DIRECTORY)
@click.argument("quantized", type=_DIRECTORY)
@click.option(
    "--text", type=click.File(encoding="utf-8", lazy=False), required=True, help="What to compare them on."
)
@click.option("--max-kl", default=0.02, help="Nats a token that are still good, at the mean.")
@click.option("--min-agreement", default=0.97, help="Share of positions with the same likeliest token.")
@click.option("--window", default=1024, help="Tokens at a time.")
@click.option("--max-tokens", default=16_384, help="Tokens of the text that are used.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
@_PYTHON
def evaluate(
    model: Path,
    quantized: Path,
    text: TextIO,
    max_kl: float,
    min_agreement: float,
    window: int,
    max_tokens: int,
    as_json: bool,
    python: str,
) -> None:
    """Compare next-token distributions, by group of layers. Code 1, and no report left in the checkpoint, if
    they are further apart than the limits."""
    from serving.quantize import job, verdict

    result = job.evaluate(
        model,
        quantized,
        text.read(),
        python,
        verdict.Limits(max_kl, min_agreement),
        window_tokens=window,
        max_tokens=max_tokens,
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        _print(result)
    sys.exit(0 if result.verdict.accepted else 1)


def _print(result: job.Evaluation) -> None:
    print(f"{'layers':10} {'KL mean':>9} {'KL p99':>9} {'same token':>11}")
    for name, drift in result.drifts.items():
        print(f"{name:10} {drift.kl_mean:9.5f} {drift.kl_p99:9.5f} {drift.agreement:11.2%}")
    if result.verdict.accepted:
        print("accepted")
        return
    print(f"refused: {'; '.join(result.verdict.broken)}")
    if result.verdict.advice:
        print(result.verdict.advice)
