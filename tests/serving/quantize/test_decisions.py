"""What a checkpoint holds, which of its layers become FP8, and whether the result is good enough."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving.quantize import choice, tensors, verdict

ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def file_of(layers: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A safetensors file of zeros."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in layers.items():
        size = ITEM_BYTES[dtype]
        for each in shape:
            size *= each
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}  # type: ignore[dict-item]
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def parse(data: bytes) -> dict[str, tensors.Tensor]:
    length = tensors.header_bytes(data[:8], len(data), "shard")
    return tensors.decode(data[8 : 8 + length], len(data), "shard")


def llama(*, dtype: str = "BF16", layers: int = 2) -> dict[str, tensors.Tensor]:
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": (dtype, (64, 32)),
        "lm_head.weight": (dtype, (64, 32)),
        "model.norm.weight": (dtype, (32,)),
    }
    for number in range(layers):
        layer = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{layer}.self_attn.{name}.weight"] = (dtype, (32, 32))
        for name in ("gate_proj", "up_proj", "down_proj"):
            found[f"{layer}.mlp.{name}.weight"] = (dtype, (32, 32))
        found[f"{layer}.input_layernorm.weight"] = (dtype, (32,))
    return parse(file_of(found))


def test_a_file_as_it_should_be() -> None:
    found = parse(file_of({"a.weight": ("BF16", (4, 2)), "b": ("F32", ())}))
    assert (found["a.weight"].shape, found["a.weight"].size_bytes) == ((4, 2), 16)
    assert found["b"].end == found["a.weight"].end + 4


@given(st.binary(max_size=300))
def test_bytes_of_strangers_are_a_document_error(data: bytes) -> None:
    try:
        found = parse(data)
    except errors.DocumentError:
        return
    assert all(each.end <= len(data) for each in found.values())


@given(st.data())
def test_a_changed_file_is_refused_or_says_what_it_holds(data: st.DataObject) -> None:
    whole = bytearray(file_of({"a.weight": ("BF16", (4, 2)), "b": ("F32", (3,))}))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        found = parse(cut)
    except errors.DocumentError:
        return
    assert sum(each.size_bytes for each in found.values()) == 28
    assert max(each.end for each in found.values()) == len(cut)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "BF16", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "X9", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [2], "data_offsets": [0]},
        {"dtype": "BF16", "shape": [True, True], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [2], "data_offsets": [4, 0]},
        {"dtype": ["BF16"], "shape": [2], "data_offsets": [0, 4]},
        [],
    ],
)
def test_entries_that_are_none(entry: object) -> None:
    text = json.dumps({"a": entry}).encode()
    with pytest.raises(errors.DocumentError, match="tensor a"):
        parse(struct.pack("<Q", len(text)) + text + bytes(4))


def test_a_header_larger_than_the_file_allocates_nothing() -> None:
    with pytest.raises(errors.DocumentError, match="claims a header"):
        parse(struct.pack("<Q", 1 << 60) + b"{}")


def test_linear_layers_become_fp8_and_the_ends_stay() -> None:
    chosen = choice.choose(llama(), attention=True)
    assert len(chosen.quantized) == 14
    assert set(chosen.quantized.values()) == {"attention", "mlp"}
    assert chosen.kept == {"model.embed_tokens": "embeddings", "lm_head": "the head"}


def test_attention_can_stay_as_it_is() -> None:
    chosen = choice.choose(llama(), attention=False)
    assert set(chosen.quantized.values()) == {"mlp"}
    assert sum(reason.startswith("attention") for reason in chosen.kept.values()) == 8


def test_what_is_asked_for_stays() -> None:
    chosen = choice.choose(llama(), attention=True, ignore=[r"model\.layers\.0\."])
    assert all(name.startswith("model.layers.1.") for name in chosen.quantized)
    assert "model.layers.0.mlp.up_proj" in chosen.ignore()


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.0.mlp.gate.weight", (16, 32), "an expert router"),
        ("visual.blocks.0.attn.qkv.weight", (32, 32), "another modality"),
        ("model.layers.0.mlp.odd.weight", (8, 32), "its shape [8, 32] is no multiple of 16"),
        ("transformer.wte.weight", (32, 32), "embeddings"),
    ],
)
def test_why_a_layer_stays(name: str, shape: tuple[int, ...], reason: str) -> None:
    layers = llama() | parse(file_of({name: ("BF16", shape)}))
    assert choice.choose(layers, attention=True).kept[name.removesuffix(".weight")] == reason


def test_experts_become_fp8() -> None:
    name = "model.layers.0.block_sparse_moe.experts.3.w1"
    chosen = choice.choose(parse(file_of({f"{name}.weight": ("BF16", (32, 32))})), attention=True)
    assert chosen.quantized == {name: "mlp"}


@pytest.mark.parametrize(
    ("ignore", "dtype", "said"),
    [
        (["("], "BF16", "not a regular expression"),
        ([r"model\.layer\."], "BF16", r"matches no layer; names look like model\.embed_tokens"),
        ([".*"], "BF16", "no layer to quantize"),
        ([], "F8_E4M3", "quantized already"),
    ],
)
def test_choices_that_are_none(ignore: list[str], dtype: str, said: str) -> None:
    with pytest.raises(errors.DocumentError, match=said):
        choice.choose(llama(dtype=dtype), attention=True, ignore=ignore)


def drift(kl: float, agreement: float = 1.0) -> verdict.Drift:
    return verdict.Drift(kl, 3 * kl, agreement, 1000)


def test_good_enough() -> None:
    judged = verdict.judge({verdict.ALL: drift(0.01), "mlp": drift(0.01)}, verdict.Limits())
    assert judged == verdict.Verdict(True, (), None)


def test_too_far_and_which_group_it_is() -> None:
    drifts = {verdict.ALL: drift(0.05, 0.9), "attention": drift(0.04), "mlp": drift(0.01)}
    judged = verdict.judge(drifts, verdict.Limits())
    assert not judged.accepted
    assert len(judged.broken) == 2
    assert judged.advice is not None
    assert "--no-attention" in judged.advice


def test_not_a_number_is_no_agreement() -> None:
    judged = verdict.judge({verdict.ALL: drift(float("nan"), float("nan"))}, verdict.Limits())
    assert len(judged.broken) == 2
