"""A comparison as files: JSON, figures, and one page that shows every scenario of a directory.

Called by the verb. `write` puts `SCENARIO.json` and `SCENARIO-FIGURE.svg` into the directory; `write_index`
makes `index.html` of all the JSON files in it, so that a comparison may be made scenario by scenario.
"""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path
from typing import Any

from serving import errors
from serving.autoscaler.simulate import judgement, plots, table
from serving.autoscaler.simulate.judgement import Outcome, Verdict
from serving.autoscaler.simulate.sweep import Comparison

_FIGURES = {
    "frontiers": plots.frontiers,
    "replicas": plots.over_time,
    "latency": plots.latencies,
    "cost": plots.cost,
}
_FORMAT = 1


def document(comparison: Comparison) -> dict[str, Any]:
    """The figures of a comparison as plain values."""
    return {
        "format": _FORMAT,
        "scenario": comparison.scenario,
        "outcomes": [dataclasses.asdict(each) for each in comparison.outcomes],
        "verdicts": [dataclasses.asdict(each) for each in comparison.verdicts()],
    }


def write(directory: Path, comparison: Comparison) -> None:
    """See the module. ConfigurationError where the directory cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, draw in _FIGURES.items():
            (directory / f"{comparison.scenario}-{name}.svg").write_bytes(draw(comparison))
        path = directory / f"{comparison.scenario}.json"
        path.write_text(json.dumps(document(comparison), indent=1) + "\n")
    except OSError as exc:
        raise errors.ConfigurationError(f"{directory}: cannot be written: {exc}") from exc


def write_index(directory: Path) -> Path:
    """The page, from what is there."""
    sections = []
    for path in sorted(directory.glob("*.json")):
        outcomes, verdicts = _read(path)
        sections.append(_section(path.stem, outcomes, verdicts))
    found = directory / "index.html"
    found.write_text(_PAGE.format(sections="\n".join(sections)))
    return found


def _read(path: Path) -> tuple[list[Outcome], list[Verdict]]:
    try:
        value = json.loads(path.read_text())
        if value["format"] != _FORMAT:
            raise ValueError(f"format {value['format']}, this reads {_FORMAT}")
        outcomes = [Outcome(**each) for each in value["outcomes"]]
        verdicts = [Verdict(**{**each, "above": tuple(each["above"])}) for each in value["verdicts"]]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise errors.DocumentError(f"{path}: not a comparison of this version: {exc}; delete it") from exc
    return outcomes, verdicts


def _section(name: str, outcomes: list[Outcome], verdicts: list[judgement.Verdict]) -> str:
    text = html.escape("\n".join(table.lines(outcomes, verdicts)))
    figures = "\n".join(
        f'<img src="{html.escape(name)}-{figure}.svg" alt="{html.escape(name)}: {figure}">'
        for figure in _FIGURES
    )
    return f"<h2>{html.escape(name)}</h2>\n<pre>{text}</pre>\n{figures}"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Autoscaling policies, compared</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ overflow-x: auto; font-size: 12px; background: #f4f4f4; padding: 0.8rem; }}
img {{ max-width: 100%; display: block; margin: 1rem 0; }}
</style>
<h1>Autoscaling policies, compared</h1>
<p>Late: longer than twice the request's own work plus 1 s. Lost: its replica failed. Hours: replica-hours,
starting and draining ones included. Turns: the most reversals of the wanted size within 10 minutes.</p>
{sections}
</html>
"""
