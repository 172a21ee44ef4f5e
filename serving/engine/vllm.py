"""How vLLM is started for a small, fast model: settings in, arguments and environment out.

Pure; called by the supervisor (`kinds`). What it decides, and why:

- Several API server processes, because parsing, tokenizing and streaming are Python's work and hold up the
  engine's own loop otherwise: one for every two processors beyond the engine's pair, four at most.
- Priority scheduling, so that health probes pass in front. Async scheduling is vLLM's default.
- The limit is kept in front of vLLM (`gate`), not by --max-num-queued-reqs, which sheds probes too, and by
  503.
- Keep-alive longer than any router's idle timeout: a connection closed by us while a request is on its way is
  an error to its client.
- OMP_NUM_THREADS by the cgroup's processors, not the host's.
- All caches of compiled code below one directory, which an image or a node can keep.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from serving.endpoint import VllmEngine
from serving.engine.settings import Settings

KEEP_ALIVE_SECONDS = 75
_MOST_API_SERVERS = 4
_ENGINE_PROCESSORS = 2
_STREAMS = 16
PROBE_PRIORITY = -1_000_000
"""Lower comes first."""


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the model's own config.json says. Of a model that is not a directory, nothing is known."""

    quantized: bool = False
    multimodal: bool = False


def read_checkpoint(config: str) -> Checkpoint:
    """From the text of a config.json; one that cannot be read is vLLM's to complain about."""
    try:
        document = json.loads(config)
    except (ValueError, RecursionError):
        return Checkpoint()
    if not isinstance(document, dict):
        return Checkpoint()
    return Checkpoint("quantization_config" in document, "vision_config" in document)


def api_servers(engine: VllmEngine, cpus: int) -> int:
    """How many API server processes."""
    return engine.api_servers or max(1, min(_MOST_API_SERVERS, (cpus - _ENGINE_PROCESSORS) // 2))


def model_name(settings: Settings) -> str:
    """What requests call the model."""
    return settings.model_name or settings.model or ""


def arguments(
    settings: Settings, engine: VllmEngine, model: str, checkpoint: Checkpoint, cpus: int
) -> list[str]:
    """vLLM's arguments. `model` is a directory, or an s3:// that is streamed. The document's own come last,
    so that they win."""
    found = [model, "--served-model-name", model_name(settings)]
    found += ["--middleware", "serving.engine.gate.Gate", "--disable-uvicorn-access-log"]
    found += ["--enable-prompt-tokens-details"]  # what was cached costs less, and is counted apart
    found += ["--api-server-count", str(api_servers(engine, cpus)), "--scheduling-policy", "priority"]
    found += ["--shutdown-timeout", str(max(1, round(settings.drain.seconds)))]
    if settings.fp8 and not checkpoint.quantized:
        found += ["--quantization", "fp8_per_channel"]
    if settings.stream_weights is not None or model.startswith("s3://"):
        extra = json.dumps({"concurrency": settings.stream_weights or _STREAMS})
        found += ["--load-format", "runai_streamer", "--model-loader-extra-config", extra]
    if checkpoint.multimodal:
        found += ["--mm-processor-kwargs", json.dumps({"backend": "torchvision"})]
    if settings.traces_endpoint is not None:
        found += ["--otlp-traces-endpoint", settings.traces_endpoint]
    return [*found, *engine.arguments]


def environment(settings: Settings, model: str, cpus: int) -> Mapping[str, str]:
    """Variables for vLLM. The document's own, added by the caller, win."""
    found = {
        "OMP_NUM_THREADS": str(cpus),
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
        # Lines of the log, from which the phases are read, must come when they are written.
        "PYTHONUNBUFFERED": "1",
    }
    if not model.startswith("s3://"):
        found["HF_HUB_OFFLINE"] = "1"
    if settings.traces_endpoint is not None:
        found["OTEL_SERVICE_NAME"] = settings.service
        found["OTEL_RESOURCE_ATTRIBUTES"] = f"service.instance.id={settings.instance}"
        found["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = "http/protobuf"
        # The router decides which requests have spans.
        found["OTEL_TRACES_SAMPLER"] = "parentbased_always_off"
    if settings.cache_directory is not None:
        for variable, folder in (
            ("VLLM_CACHE_ROOT", "vllm"),
            ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
            ("TRITON_CACHE_DIR", "triton"),
            ("CUDA_CACHE_PATH", "cuda"),
            ("FLASHINFER_WORKSPACE_BASE", "flashinfer"),
        ):
            found[variable] = f"{settings.cache_directory}/{folder}"
    return found


def probe_body(settings: Settings) -> bytes:
    """A request for one token, in front of all others."""
    request = {
        "model": model_name(settings),
        "prompt": [0],
        "max_tokens": 1,
        "temperature": 0,
        "priority": PROBE_PRIORITY,
    }
    return json.dumps(request).encode()
