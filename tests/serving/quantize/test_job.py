"""`glowplug quantize`, with the real llm-compressor where the test is a long one."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from serving import errors
from serving.quantize import choice, job, verdict
from tests.fixtures import tiny_llama
from tests.serving.quantize import test_decisions

CACHE = Path(__file__).parents[3] / ".cache"
GLOWPLUG = Path(sys.executable).with_name("glowplug")
LAYER = "model.layers.0.mlp.up_proj"


def checkpoint(directory: Path, layers: dict[str, tuple[str, tuple[int, ...]]], change: int = 0) -> Path:
    directory.mkdir()
    data = bytearray(test_decisions.file_of(layers))
    data[-1] = change
    (directory / "model.safetensors").write_bytes(data)
    (directory / "config.json").write_text("{}")
    return directory


PLAIN: dict[str, tuple[str, tuple[int, ...]]] = {
    f"{LAYER}.weight": ("BF16", (32, 16)),
    "lm_head.weight": ("BF16", (32, 16)),
}
GOOD: dict[str, tuple[str, tuple[int, ...]]] = {
    f"{LAYER}.weight": ("F8_E4M3", (32, 16)),
    f"{LAYER}.weight_scale": ("F32", (32, 1)),
    "lm_head.weight": ("BF16", (32, 16)),
}


@pytest.mark.parametrize(
    ("made", "change", "said"),
    [
        (GOOD, 0, None),
        (GOOD, 1, "changed lm_head"),
        ({**GOOD, f"{LAYER}.weight_scale": ("F32", (1,))}, 0, "no scale for each output channel"),
        (PLAIN, 0, "made BF16"),
        ({name: each for name, each in GOOD.items() if name != "lm_head.weight"}, 0, "lost tensor lm_head"),
    ],
)
def test_a_result_is_compared_with_what_was_asked_for(
    tmp_path: Path, made: dict[str, tuple[str, tuple[int, ...]]], change: int, said: str | None
) -> None:
    source = job.read(checkpoint(tmp_path / "source", PLAIN))
    result = job.read(checkpoint(tmp_path / "made", made, change))
    chosen = choice.choose({name: each for name, (_, each) in source.tensors.items()}, attention=True)
    if said is None:
        job._check(source, result, chosen)
    else:
        with pytest.raises(errors.UnavailableError, match=said):
            job._check(source, result, chosen)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([GLOWPLUG, "quantize", *map(str, arguments)], capture_output=True, text=True)


def test_an_interpreter_without_the_quantizer(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", PLAIN)
    result = command(source, tmp_path / "out")
    assert result.returncode == 8
    assert "pip install torch llmcompressor" in result.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["source"]


def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", PLAIN)
    result = command(source, tmp_path / "out", "--python", tmp_path / "no-python")
    assert (result.returncode, "--python" in result.stderr) == (8, True)


@pytest.mark.parametrize(
    ("source", "out", "code", "said"),
    [
        ("nowhere", "out", 4, "no *.safetensors"),
        ("bare", "out", 4, "config.json"),
        ("damaged", "out", 3, "safetensors"),
        ("good", "full", 9, "is there already"),
        ("good", "far/away/out", 4, "not a directory"),
    ],
)
def test_wrong_directories(tmp_path: Path, source: str, out: str, code: int, said: str) -> None:
    checkpoint(tmp_path / "good", PLAIN)
    (checkpoint(tmp_path / "bare", PLAIN) / "config.json").unlink()
    (checkpoint(tmp_path / "damaged", PLAIN) / "model.safetensors").write_bytes(
        b"not tensors, and long enough"
    )
    checkpoint(tmp_path / "full", PLAIN)
    result = command(tmp_path / source, tmp_path / out)
    assert (result.returncode, said in result.stderr) == (code, True), result.stderr
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_nothing_quantized_to_evaluate(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", PLAIN)
    result = command("eval", source, source, "--text", __file__)
    assert (result.returncode, "none of its layers is quantized" in result.stderr) == (3, True)


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter with llm-compressor, made once for a checkout."""
    folder = CACHE / "quantize"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "quantize.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            install = [folder / "bin/pip", "install", "-q", "torch==2.13.0", "llmcompressor==0.14.0"]
            subprocess.run(install, check=True)
            (folder / "made").touch()
    return str(folder / "bin/python")


@pytest.fixture(scope="module")
def model(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantize") / "tiny"
    subprocess.run([python, tiny_llama.__file__, directory], check=True, capture_output=True)
    return directory


@pytest.mark.soak
def test_quantized_and_judged(python: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = job.quantize(model, out, python)
    assert len(made.quantized) == 14
    assert set(made.kept.values()) == {"embeddings", "the head"}
    assert made.bytes_after < made.bytes_before
    assert made.peak_bytes - made.import_bytes < 8 * made.largest_shard_bytes
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["format"], config["kv_cache_scheme"]) == ("float-quantized", None)
    text = Path(job.__file__).read_text()
    loose, tight = verdict.Limits(0.01, 0.5), verdict.Limits(1e-9, 0.5)
    done = job.evaluate(model, out, text, python, loose, max_tokens=1024)
    assert done.verdict.accepted
    assert set(done.drifts) == {"all", "attention", "mlp"}
    assert 0 < done.drifts["mlp"].kl_mean < done.drifts["all"].kl_mean
    assert (out / job.REPORT).exists()
    refused = job.evaluate(model, out, text, python, tight, max_tokens=1024)
    assert not refused.verdict.accepted
    assert not (out / job.REPORT).exists()


@pytest.mark.soak
def test_an_original_has_not_moved_from_itself_and_attention_stays(
    python: str, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = job.quantize(model, out, python, attention=False)
    assert set(made.quantized.values()) == {"mlp"}
    done = job.evaluate(model, out, "def main():\n" * 200, python, verdict.Limits(1, 0), max_tokens=512)
    assert set(done.drifts) == {"all", "mlp"}
    assert done.drifts["all"] == done.drifts["mlp"]


_REAL_AGAINST_OURS = """
import contextlib, sys, torch, transformers
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import runner
ids = torch.arange(2, 300)
load = transformers.AutoModelForCausalLM.from_pretrained
model, quantized = (load(each, dtype=torch.float32).eval() for each in sys.argv[2:])
modules = dict(model.named_modules())
names = [name for name, each in modules.items() if isinstance(each, torch.nn.Linear) and "layers" in name]
weights = runner._quantized_weights(Path(sys.argv[3]), set(names))
with torch.inference_mode(), contextlib.ExitStack() as undo:
    theirs = quantized(ids[None]).logits
    for name in names:
        runner._replace(modules[name], *weights[name], undo)
    print((theirs - model(ids[None]).logits).abs().max().item())
"""


@pytest.mark.soak
def test_what_is_judged_is_what_compressed_tensors_computes(python: str, model: Path, tmp_path: Path) -> None:
    job.quantize(model, tmp_path / "out", python)
    arguments = [Path(job.__file__).parent, model, tmp_path / "out"]
    said = subprocess.run(
        [python, "-c", _REAL_AGAINST_OURS, *arguments], check=True, capture_output=True, text=True
    )
    assert float(said.stdout) < 1e-5
