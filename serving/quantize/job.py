"""`glowplug quantize`: a checkpoint in, an FP8 checkpoint out, whole or not at all; and its evaluation.

Called by `glowplug/verbs/quantize.py`. Reads headers itself (`tensors`), decides what is quantized
(`choice`), has `runner.py` do it in another interpreter, and checks what came out: every layer that was
chosen is FP8 with a scale for each output channel, every other tensor is the same bytes as before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from serving import errors
from serving.quantize import choice, tensors, verdict

REPORT = "glowplug-quantize.json"
"""In an accepted checkpoint: what was measured, by which limits."""
_RUNNER = Path(__file__).with_name("runner.py")
_LINES = 12
_CHUNK_BYTES = 4 << 20
INSTALL = "python3 -m venv DIR && DIR/bin/pip install torch llmcompressor==0.14.*"


@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """What was made. Bytes are of weights on disk; `peak_bytes` is the quantizer's resident memory at its
    largest, of which `import_bytes` was there before it read anything."""

    quantized: Mapping[str, str]
    kept: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    largest_shard_bytes: int
    peak_bytes: int
    import_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured, by group and for all, and what follows."""

    drifts: Mapping[str, verdict.Drift]
    verdict: verdict.Verdict


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory with safetensors files: each tensor with its file."""

    directory: Path
    tensors: Mapping[str, tuple[Path, tensors.Tensor]]
    shards: Mapping[Path, int]

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.size_bytes for _, tensor in self.tensors.values())


def read(directory: Path) -> Checkpoint:
    """The checkpoint in a directory. NotFoundError, DocumentError."""
    paths = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    if not paths:
        raise errors.NotFoundError(f"{directory}: no *.safetensors file there")
    if not (directory / "config.json").is_file():
        raise errors.NotFoundError(f"{directory}: no config.json there, as transformers' models have")
    found: dict[str, tuple[Path, tensors.Tensor]] = {}
    for path in paths:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = tensors.header_bytes(file.read(tensors.PREFIX_BYTES), size, str(path))
            for name, tensor in tensors.decode(file.read(length), size, str(path)).items():
                if name in found:
                    raise errors.DocumentError(f"{path}: tensor {name} is in {found[name][0].name}, too")
                found[name] = path, tensor
    return Checkpoint(directory, found, {path: path.stat().st_size for path in paths})


def quantize(
    model: Path, out: Path, python: str, *, attention: bool = True, ignore: Sequence[str] = ()
) -> Quantized:
    """Make `out`. Nothing of it is there unless all of it is."""
    source = read(model)
    layers = {name: tensor for name, (_, tensor) in source.tensors.items()}
    chosen = choice.choose(layers, attention=attention, ignore=ignore)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise errors.ConflictError(f"{out} is there already; remove it, or name another directory")
    parent = out.resolve().parent
    if not parent.is_dir():
        raise errors.NotFoundError(f"{parent} is not a directory; make it first")
    _require_space(parent, source, chosen)
    with _beside(parent, out.name) as partial:
        order = {"model": str(model.resolve()), "out": str(partial), "ignore": chosen.ignore()}
        answer = _run(python, "quantize", order)
        made = read(partial)
        _check(source, made, chosen)
        shutil.copymode(model, partial)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    return Quantized(
        quantized=chosen.quantized,
        kept=chosen.kept,
        bytes_before=source.weight_bytes,
        bytes_after=made.weight_bytes,
        largest_shard_bytes=max(source.shards.values()),
        peak_bytes=int(answer["peak_bytes"]),
        import_bytes=int(answer["import_bytes"]),
    )


def evaluate(
    model: Path,
    quantized: Path,
    text: str,
    python: str,
    limits: verdict.Limits,
    *,
    window_tokens: int = 1024,
    max_tokens: int = 16_384,
) -> Evaluation:
    """Compare a quantized checkpoint with its original on a text, by group of layers. An accepted one gets
    REPORT; of a refused one an earlier REPORT is taken away."""
    source, made = read(model), read(quantized)
    groups: dict[str, list[str]] = {verdict.ALL: []}
    for name in sorted(made.tensors):
        module, _, kind = name.rpartition(".")
        if kind == "weight_scale" and f"{module}.weight" in source.tensors:
            groups[verdict.ALL].append(module)
            groups.setdefault(choice.group_of(module), []).append(module)
    if not groups[verdict.ALL]:
        raise errors.DocumentError(
            f"{quantized}: none of its layers is quantized; is it the right directory?"
        )
    order = {
        "model": str(model.resolve()),
        "quantized": str(quantized.resolve()),
        "groups": groups,
        "text": text,
        "window_tokens": window_tokens,
        "max_tokens": max_tokens,
    }
    answer = _run(python, "drift", order)
    drifts = {name: verdict.Drift(**drift) for name, drift in answer["drifts"].items()}
    judged = verdict.judge(drifts, limits)
    report = quantized / REPORT
    if judged.accepted:
        document = {
            "limits": dataclasses.asdict(limits),
            "drifts": {name: dataclasses.asdict(drift) for name, drift in drifts.items()},
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        report.write_text(json.dumps(document, indent=1) + "\n")
    else:
        report.unlink(missing_ok=True)
    return Evaluation(drifts, judged)


def _require_space(parent: Path, source: Checkpoint, chosen: choice.Choice) -> None:
    saved = sum(
        tensor.size_bytes - tensor.size_bytes * 8 // (16 if tensor.dtype != "F32" else 32)
        for name, (_, tensor) in source.tensors.items()
        if name.removesuffix(".weight") in chosen.quantized
    )
    needed, free = source.weight_bytes - saved, shutil.disk_usage(parent).free
    if free < needed:
        raise errors.ConfigurationError(
            f"{parent} has {free / 1e9:.1f} GB free, the result needs {needed / 1e9:.1f} GB"
        )


@contextlib.contextmanager
def _beside(parent: Path, name: str) -> Iterator[Path]:
    partial = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run(python: str, what: str, order: Mapping[str, Any]) -> dict[str, Any]:
    """The runner's answer. ConfigurationError where that interpreter lacks what it needs, UnavailableError
    with its last lines where it fails."""
    # -P: the script's own directory has modules of ours, and must hide none of theirs.
    command = [python, "-P", str(_RUNNER), what]
    try:
        done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, check=False)
    except OSError as exc:
        raise errors.ConfigurationError(f"cannot run {python}: {exc.strerror}; name one by --python") from exc
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-_LINES:]
        if lines and "ModuleNotFoundError" in lines[-1]:
            raise errors.ConfigurationError(
                f"{python}: {lines[-1]}; make an environment ({INSTALL}) and name its interpreter by "
                "--python or GLOWPLUG_QUANTIZE_PYTHON"
            )
        raise errors.UnavailableError(
            f"the quantizer ended with code {done.returncode}:\n" + "\n".join(lines)
        )
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _check(source: Checkpoint, made: Checkpoint, chosen: choice.Choice) -> None:
    """Refuse a result that is not what was asked for."""
    for name, (path, tensor) in source.tensors.items():
        module, _, kind = name.rpartition(".")
        if name not in made.tensors:
            raise errors.UnavailableError(f"the quantizer lost tensor {name}; its version may be another one")
        made_path, made_tensor = made.tensors[name]
        if kind == "weight" and module in chosen.quantized:
            scale = made.tensors.get(f"{module}.weight_scale")
            if made_tensor.dtype != "F8_E4M3" or made_tensor.shape != tensor.shape:
                raise errors.UnavailableError(f"the quantizer made {made_tensor.dtype} of {name}, not FP8")
            if scale is None or scale[1].shape not in ((tensor.shape[0], 1), (tensor.shape[0],)):
                raise errors.UnavailableError(f"the quantizer gave {name} no scale for each output channel")
        elif _digest(path, tensor) != _digest(made_path, made_tensor):
            raise errors.UnavailableError(f"the quantizer changed {name}, which was to stay as it is")


def _digest(path: Path, tensor: tensors.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(tensor.begin)
        left = tensor.size_bytes
        while left:
            piece = file.read(min(left, _CHUNK_BYTES))
            if not piece:
                raise errors.UnavailableError(f"{path} became shorter while it was read")
            hasher.update(piece)
            left -= len(piece)
    return tensor.dtype, tensor.shape, hasher.digest()
