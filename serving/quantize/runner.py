"""The work that needs PyTorch: `python runner.py quantize|drift`, by an interpreter that has llm-compressor.

Started by `job`; imports nothing of ours. The order comes as a JSON object on standard input; the answer is
one JSON object in the last line of standard output; what libraries say goes to standard error.

`quantize` {model, out, ignore}: every linear layer that `ignore` does not name becomes FP8 (E4M3), one scale
per output channel, activations quantized per token as they come. Shard by shard: memory is bounded by the
largest one. Answer: {peak_bytes, import_bytes}.

`drift` {model, quantized, groups, text, window_tokens, max_tokens}: how far next-token distributions move
when the layers of each group compute as the quantized checkpoint says; `groups` has lists of module names by
name.
Weights stay FP8 in memory beside the original ones, and are widened layer by layer as they are used. Answer:
{drifts: {group: {kl_mean, kl_p99, agreement, tokens}}}.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Read the order, do it, answer."""
    answers, sys.stdout = sys.stdout, sys.stderr
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    order = json.load(sys.stdin)
    answer = {"quantize": quantize, "drift": drift}[sys.argv[1]](order)
    print(json.dumps(answer), file=answers, flush=True)


def quantize(order: dict[str, Any]) -> dict[str, int]:
    from llmcompressor import model_free_ptq  # type: ignore[import-not-found]

    import_bytes = _peak_bytes()
    model_free_ptq(order["model"], order["out"], scheme="FP8_DYNAMIC", ignore=order["ignore"], max_workers=1)
    return {"peak_bytes": _peak_bytes(), "import_bytes": import_bytes}


def drift(order: dict[str, Any]) -> dict[str, Any]:
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(order["model"])
    # On processors, in single precision: their half precisions are slow, and round where GPUs do not.
    precision = "auto" if device == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(order["model"], dtype=precision)
    model = model.to(device).eval()
    tokens = tokenizer(order["text"], return_tensors="pt").input_ids[0][: order["max_tokens"]]
    windows = [each.to(device) for each in tokens.split(order["window_tokens"]) if len(each) > 1]
    if not windows:
        sys.exit("the text has fewer than 2 tokens; give more")
    weights = _quantized_weights(Path(order["quantized"]), set().union(*map(set, order["groups"].values())))
    modules = dict(model.named_modules())
    missing = sorted(weights.keys() - modules.keys())
    if missing:
        sys.exit(f"transformers has no layer {missing[0]} in this model, which the checkpoint quantizes")
    drifts = {}
    with torch.inference_mode():
        for group, names in order["groups"].items():
            parts = [_compare(model, modules, weights, names, window) for window in windows]
            divergence = torch.cat([each for each, _ in parts])
            same = torch.cat([each for _, each in parts])
            drifts[group] = {
                "kl_mean": divergence.mean().item(),
                "kl_p99": divergence.quantile(0.99).item(),
                "agreement": same.float().mean().item(),
                "tokens": len(same),
            }
    return {"drifts": drifts}


def _compare(model: Any, modules: Any, weights: Any, names: list[str], window: Any) -> tuple[Any, Any]:
    """KL divergence in nats, and whether the likeliest token is the same, at each position."""
    before = model(window[None]).logits[0].float().log_softmax(-1)
    with contextlib.ExitStack() as undo:
        for name in names:
            weight, scale = weights[name]
            _replace(modules[name], weight, scale, undo)
        after = model(window[None]).logits[0].float().log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1)
    return divergence.cpu(), (before.argmax(-1) == after.argmax(-1)).cpu()


def _replace(module: Any, weight: Any, scale: Any, undo: contextlib.ExitStack) -> None:
    """Have a linear layer compute with FP8 weights, and activations rounded to FP8 per token."""
    import torch

    largest = torch.finfo(torch.float8_e4m3fn).max

    def forward(x: Any) -> Any:
        step = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / largest
        rounded = ((x / step).clamp(-largest, largest).to(torch.float8_e4m3fn).to(x.dtype) * step).to(x.dtype)
        wide = (weight.to(x.dtype) * scale.to(x.dtype)).to(x.dtype)
        return torch.nn.functional.linear(rounded, wide, module.bias)

    module.forward = forward
    undo.callback(lambda: module.__dict__.pop("forward", None))


def _quantized_weights(directory: Path, names: set[str]) -> dict[str, tuple[Any, Any]]:
    import safetensors  # type: ignore[import-not-found]
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt", device=device) as file:
            for key in file.keys():  # noqa: SIM118 - it is not a mapping
                module, _, kind = key.rpartition(".")
                if module in names and kind in ("weight", "weight_scale"):
                    found.setdefault(module, {})[kind] = file.get_tensor(key)
    return {name: (each["weight"], each["weight_scale"]) for name, each in found.items()}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
