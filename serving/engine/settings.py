"""What `glowplug engine` is told: the engine and how to run it, as one document or as options of the verb.

Called by the verb and by whoever writes the document for it (the providers). The engine itself is described
with the endpoint document's own words (`serving.endpoint`). `load` reads YAML or JSON; unknown keys are
errors.
"""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
import yaml
from pydantic import Field

from serving import endpoint, errors
from serving.models.settings import ModelCache
from serving.observability import RequestLog

_MOST_HANG_SECONDS = 60.0


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


_Seconds = Annotated[float, Field(gt=0, le=86_400, strict=False, allow_inf_nan=False)]


class Queue(_Part):
    """Requests above the limit wait here; above that, or after that, they get 429."""

    requests: int = Field(default=64, ge=0, le=100_000)
    seconds: _Seconds = 10.0


class Remote(_Part):
    """A port for status and limit, for those who have the token in the file."""

    port: int = Field(ge=0, le=65_535)
    token_file: str


class Health(_Part):
    """When the engine counts as hung, and is killed and started again."""

    stall_seconds: _Seconds = 30.0
    """No progress for so long, with probes failing, is a hang."""
    probe_interval_seconds: _Seconds = 5.0
    """A probe is sent when nothing has moved for so long."""
    probe_timeout_seconds: _Seconds = 10.0

    @pydantic.model_validator(mode="after")
    def _in_time(self) -> Health:
        latest = self.stall_seconds + self.probe_interval_seconds + self.probe_timeout_seconds
        if latest >= _MOST_HANG_SECONDS:
            raise ValueError(
                f"stall, interval and timeout add up to {latest:g} s; keep them below "
                f"{_MOST_HANG_SECONDS:g} s, so that a hang is seen within a minute"
            )
        return self


class Container(_Part):
    """The engine's program runs in a container; paths and programs are then the image's."""

    ctr: tuple[str, ...] = Field(min_length=1, strict=False)
    """The command, with containerd's address and namespace."""
    name: str
    image: str
    """As containerd calls it."""
    snapshotter: str
    options: tuple[str, ...] = Field(default=(), strict=False)
    """Further ones of `ctr run`."""


class Settings(_Part):
    """One engine on one port."""

    engine: Annotated[endpoint.CommandEngine | endpoint.VllmEngine, Field(discriminator="kind")]
    model: str | None = None
    """A directory, s3://BUCKET/PREFIX or oci:REF#FOLDER. vllm needs one; a command finds it at $MODEL."""
    model_cache: ModelCache = ModelCache()
    """Where models from s3:// and oci: are kept."""
    container: Container | None = None
    model_name: str | None = None
    """What clients call the model; `model` if left out."""
    fp8: bool = False
    """Quantize weights to FP8 while they are loaded, unless the checkpoint is quantized already."""
    address: str = "127.0.0.1"
    port: int = Field(8_000, ge=0, le=65_535)
    """0 takes a free one, which the status names."""
    control: str | None = None
    """Unix socket for status, limit and drain; `engine.sock` in the run directory if left out."""
    remote: Remote | None = None
    """Where the engine is controlled from other machines: a pod's."""
    run_directory: str | None = None
    """Sockets and shared memory; a temporary one if left out. Not two engines in one."""
    cache_directory: str | None = None
    """Compiled kernels and graphs, kept for the next start."""
    limit: int = Field(64, ge=1, le=100_000)
    """Requests in flight."""
    queue: Queue = Field(default_factory=Queue)
    health: Health = Health()
    drain: endpoint.Drain = endpoint.Drain()
    cpus: int | None = Field(None, ge=1, le=4_096)
    """Processors to plan for; what the cgroup and the affinity leave, if left out."""
    memory_bytes: int | None = Field(None, ge=1 << 20)
    """Memory that the engine may use; the machine's, if left out. What is used is shown as a part of it."""
    cgroup: str | None = None
    """The control group that the engine runs in, where that is not its process tree: a container's."""
    gpus: tuple[str, ...] | None = Field(None, max_length=64, strict=False)
    """The GPUs that the engine has, by the machine's numbers or by UUID, where its own environment does not
    tell: a container's. How busy they are is shown."""
    stream_weights: int | None = Field(None, ge=1, le=1_024)
    """Read weights by that many parallel requests (run:ai streamer)."""
    traces_endpoint: str | None = None
    """URL to which spans are posted (OTLP over HTTP), children of the caller's `traceparent`, where that says
    that the request is sampled."""
    service: str = Field("engine", pattern=r"^[A-Za-z0-9._-]{1,100}$")
    """What traces and the request log call it: the endpoint's name."""
    instance: str = Field("0", pattern=r"^[A-Za-z0-9._-]{1,100}$")
    """Which of its replicas."""
    request_log: RequestLog | None = None
    """A sample of requests, written as Parquet; changed while it runs by `POST /request-log`."""

    @pydantic.model_validator(mode="after")
    def _complete(self) -> Settings:
        if isinstance(self.engine, endpoint.VllmEngine) and not self.model:
            raise ValueError("model: the engine vllm needs one: a directory, s3://BUCKET/PREFIX or oci:REF")
        return self


def load(text: str, where: str) -> Settings:
    """The settings in a YAML or JSON text. DocumentError, which names the key."""
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise errors.DocumentError(f"{where}: not YAML: {exc}") from exc
    if not isinstance(document, dict):
        raise errors.DocumentError(f"{where}: settings are a mapping of keys, as in `model: /models/chat`")
    return check(document, where)


def check(document: dict[str, Any], where: str) -> Settings:
    """The settings in a parsed document. DocumentError, which names the key."""
    try:
        return Settings.model_validate(document)
    except pydantic.ValidationError as exc:
        found = []
        for each in exc.errors(include_url=False):
            key = ".".join(str(part) for part in each["loc"] if part not in ("vllm", "command"))
            message = str(each["msg"]).removeprefix("Value error, ")
            found.append(f"{where}: {key + ': ' if key else ''}{message[:1].lower()}{message[1:]}")
        raise errors.DocumentError("\n".join(dict.fromkeys(found))) from exc
