"""Which layers of a checkpoint become FP8. Pure.

Weights get one scale per output channel, activations one per token as they come: no calibration, so that the
choice of layers is all there is to decide. Kept as they are: embeddings and the head (their error goes into
every logit), norms, routers of experts (a wrong expert is worse than a rounded weight), encoders of other
modalities, and what the kernels cannot take.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from serving import errors
from serving.quantize.tensors import WEIGHTS, Tensor

Group = Literal["attention", "mlp", "other"]
GROUPS: tuple[Group, ...] = ("attention", "mlp", "other")

_MULTIPLE = 16
"""Of both dimensions: what FP8 matrix kernels take."""

# By the parts of a module's name, as the model families write them.
_KEPT_PARTS = {
    "embeddings": re.compile(r"embed|wte|wpe"),
    "the head": re.compile(r"(lm_head|output_layer|score|classifier)\Z"),
    "an expert router": re.compile(r"(router|gate|shared_expert_gate)\Z"),
    "another modality": re.compile(r"(vision|visual|audio|image|multi_modal)"),
    "a norm": re.compile(r"norm"),
}
_ATTENTION = re.compile(r"(self_attn|attn|attention|self_attention|linear_attn)\Z")
_MLP = re.compile(r"(mlp|feed_forward|ffn|experts|block_sparse_moe|shared_expert)\Z")


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """`quantized`: module name -> its group. `kept`: module name -> why it stays as it is, of all others that
    have a weight of two dimensions."""

    quantized: Mapping[str, Group]
    kept: Mapping[str, str]

    def ignore(self) -> list[str]:
        """What the quantizer is to leave alone, by exact name."""
        return sorted(self.kept)


def choose(tensors: Mapping[str, Tensor], *, attention: bool, ignore: Iterable[str] = ()) -> Choice:
    """Decide for every linear layer. `ignore` are regular expressions that match from the start of a
    module's name. DocumentError for one that is none, or that matches nothing, and when nothing is left to
    quantize."""
    patterns = [_compiled(each) for each in ignore]
    unused = set(patterns)
    quantized: dict[str, Group] = {}
    kept: dict[str, str] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or len(tensor.shape) != 2:
            continue
        ignored = [pattern for pattern in patterns if pattern.match(module)]
        unused.difference_update(ignored)
        group = group_of(module)
        reason = "asked for" if ignored else _why_kept(module, tensor)
        if reason is None and group == "attention" and not attention:
            reason = "attention, switched off"
        if reason is None:
            quantized[module] = group
        else:
            kept[module] = reason
    if unused:
        names = ", ".join(sorted(pattern.pattern for pattern in unused))
        raise errors.DocumentError(f"--ignore {names}: matches no layer; names look like {_example(tensors)}")
    if not quantized:
        raise errors.DocumentError(
            f"there is no layer to quantize: {len(kept)} layers of two dimensions are all kept as they are, "
            f"e.g. {_sample(kept)}; is it quantized already?"
        )
    return Choice(quantized, kept)


def group_of(module: str) -> Group:
    """What a linear layer is part of, by its name."""
    for part in reversed(module.split(".")[:-1]):
        if _ATTENTION.search(part):
            return "attention"
        if _MLP.search(part):
            return "mlp"
    return "other"


def _why_kept(module: str, tensor: Tensor) -> str | None:
    parts = module.split(".")
    for reason, pattern in _KEPT_PARTS.items():
        # A whole encoder is kept by its name; the others are what the layer itself is called.
        where = parts if reason == "another modality" else parts[-1:]
        if any(pattern.search(part) for part in where):
            return reason
    if tensor.dtype not in WEIGHTS:
        return f"{tensor.dtype} already"
    if any(size % _MULTIPLE for size in tensor.shape):
        return f"its shape {list(tensor.shape)} is no multiple of {_MULTIPLE}"
    return None


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as exc:
        raise errors.DocumentError(f"--ignore {text!r}: not a regular expression: {exc}") from exc


def _example(tensors: Mapping[str, Tensor]) -> str:
    names = (name.removesuffix(".weight") for name, each in tensors.items() if len(each.shape) == 2)
    return next(names, "model.layers.0.mlp.down_proj")


def _sample(kept: Mapping[str, str]) -> str:
    return next((f"{name} ({reason})" for name, reason in kept.items()), "none")
