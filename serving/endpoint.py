"""The endpoint document: one YAML text in, one frozen `Endpoint` out, or an error that names key, line and
remedy.

Called by the verbs (`glowplug serve`, `glowplug endpoint validate`) and by the server for what `apply` sends.
Pure: no file is opened here; whether a model directory exists is the provider's to say, when it is applied.
What contradicts itself (min over max) is an error at the key that is to be changed; `documents` says what is
wrong, and where.

The JSON schema of `Endpoint` is the reference (docs/endpoint-schema.json, written by `glowplug endpoint
schema`), and is what a Kubernetes custom resource carries as its `spec`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from documents import lines, reading, wording
from serving import errors
from serving.models import place
from serving.models.settings import ModelCache
from serving.observability import RequestLog, Tracing
from serving.placement import Kubernetes

MAX_DOCUMENT_BYTES = 1 << 20
_NAME = r"^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$"


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


_Seconds = Annotated[float, Field(gt=0, le=86_400, strict=False, allow_inf_nan=False)]
_Port = Annotated[int, Field(ge=0, le=65_535)]


class CommandEngine(_Part):
    """Any program that serves HTTP on the port that $PORT names."""

    kind: Literal["command"]
    command: tuple[str, ...] = Field(min_length=1, strict=False)
    """Program and arguments; not run by a shell."""
    environment: Mapping[str, str] = {}
    health_path: str = Field(default="/health", pattern="^/")
    """Answers 2xx once the program can take requests."""
    start_timeout_seconds: _Seconds = 300.0
    """A start that takes longer has failed."""


class VllmEngine(_Part):
    """vLLM's OpenAI server."""

    kind: Literal["vllm"]
    python: str = "python3"
    """The interpreter that has vLLM, because vLLM lives in an environment of its own."""
    arguments: tuple[str, ...] = Field(default=(), strict=False)
    """Further arguments for vLLM, after ours."""
    environment: Mapping[str, str] = {}
    api_servers: int | None = Field(default=None, ge=1, le=64)
    """API server processes; by the machine's processors if left out."""
    start_timeout_seconds: _Seconds = 1_800.0
    """A start that takes longer has failed."""


class ReservedEngine(_Part):
    """Kinds that the schema keeps free; a document that asks for one is refused."""

    kind: Literal["mlflow", "triton"]


class Objectives(_Part):
    """What the endpoint promises. Measured and shown; the stress test and the autoscaler judge by them."""

    p95_first_token_seconds: _Seconds | None = None
    p99_seconds: _Seconds | None = None
    output_tokens_per_second: float | None = Field(default=None, gt=0, strict=False)


class Replicas(_Part):
    """How many, and how many requests each should hold."""

    min: int = Field(default=1, ge=0, le=10_000)
    max: int | None = Field(default=None, ge=0, le=10_000)
    """`min`, if left out."""
    target_concurrency: float = Field(default=8.0, gt=0, le=100_000, strict=False)
    """Requests in flight that a replica should hold."""
    target_units: float | None = Field(default=None, gt=0, le=1e9, strict=False)
    """Model units in flight that a replica should hold, where `autoscaling.unit` is `units`: seconds of work
    that it has before it."""
    concurrency_limit: int | None = Field(default=None, ge=1, le=100_000)
    """Requests in flight that a replica admits; twice the target if left out."""

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Replicas:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max: {self.max} is below min ({self.min}); raise max or lower min")
        limit = self.concurrency_limit
        if limit is not None and limit < self.target_concurrency:
            raise ValueError(
                f"concurrency_limit: {limit} is below target_concurrency ({self.target_concurrency:g}): "
                "no replica could reach its target; raise the limit or lower the target"
            )
        return self

    @property
    def most(self) -> int:
        """The upper bound, given or not."""
        return self.min if self.max is None else self.max

    @property
    def limit(self) -> int:
        """The in-flight limit of each replica, given or not."""
        return self.concurrency_limit or max(1, round(2 * self.target_concurrency))


def _clock_time(value: object) -> object:
    """YAML reads an unquoted 18:30 as a number to base 60, which is its minutes."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 24 * 60:
        return f"{value // 60:02d}:{value % 60:02d}"
    return value


def _switch(value: object) -> object:
    """YAML reads an unquoted on or off as a truth value."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


_ClockTime = Annotated[
    str, Field(pattern=r"^(([01]\d|2[0-3]):[0-5]\d|24:00)$"), pydantic.BeforeValidator(_clock_time)
]
_Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


class Schedule(_Part):
    """A floor for a part of the day. Times are UTC, as 08:30; a span that ends before it begins goes over
    midnight."""

    days: tuple[_Day, ...] = Field(
        default=("mon", "tue", "wed", "thu", "fri", "sat", "sun"), strict=False, min_length=1
    )
    """The days on which it begins."""
    begins: _ClockTime
    ends: _ClockTime
    min: int = Field(ge=1, le=10_000)
    """Replicas, at the least."""

    @pydantic.model_validator(mode="after")
    def _spans(self) -> Schedule:
        if self.begins == self.ends:
            raise ValueError(f"ends: {self.ends} is when it begins; for a whole day, 00:00 to 24:00")
        return self


class LearnedLimit(_Part):
    """The in-flight limit of a replica, learned while it runs. The target keeps its ratio to it."""

    enabled: bool = False
    """Learn it; else it stays `replicas.concurrency_limit`."""
    min: int | None = Field(default=None, ge=1, le=100_000)
    """A quarter of `replicas.concurrency_limit` if left out."""
    max: int | None = Field(default=None, ge=1, le=100_000)
    """Four times `replicas.concurrency_limit` if left out."""
    latency_seconds: _Seconds | None = None
    """The mean time in service up to which a replica is filled. Half of `objectives.p99_seconds` if left out;
    None of both: throughput alone decides."""


class Autoscaling(_Part):
    """How the number of replicas follows the load, between `replicas.min` and `replicas.max`."""

    mode: Annotated[Literal["off", "dry-run", "on"], pydantic.BeforeValidator(_switch)] = "on"
    """`dry-run` decides, explains and changes nothing; `off` is `replicas.min`, or what `endpoint scale`
    says."""
    unit: Literal["requests", "units"] = "requests"
    """What load is counted in: requests in flight, or what they cost (`units`, `replicas.target_units`)."""
    start_seconds: _Seconds = 30.0
    """How long a replica's start takes, until starts were measured."""
    drain_seconds: _Seconds = 10.0
    """In what time requests that wait should be worked off."""
    down_window_seconds: _Seconds = 300.0
    """The size follows the largest demand of the last so many seconds."""
    idle_seconds: _Seconds = 600.0
    """Where `replicas.min` is 0: after so long without a request there is no replica."""
    tolerance_percent: float = Field(default=10.0, ge=0, le=100, strict=False)
    """Demand must fall so far below the size before that is lowered."""
    level_seconds: float = Field(default=30.0, ge=1, le=600, strict=False)
    """Demand is the mean of so long, or what has lasted. More is calmer, and cheaper where bursts are short;
    less is sooner."""
    lasting_seconds: float = Field(default=5.0, ge=1, le=600, strict=False)
    """Demand above that mean is believed once it has lasted so long, and twice a request's time. As much as
    `level_seconds`: only what is surely more, beside the mean."""
    headroom: float = Field(default=1.0, ge=0, le=10, strict=False)
    """Standard deviations of the requests in flight for which there is room below the limits."""
    provisioned_concurrency: float = Field(default=0.0, ge=0, le=1e9, strict=False)
    """Requests in flight for which there are always replicas, whatever comes."""
    schedules: tuple[Schedule, ...] = Field(default=(), strict=False)
    predict: bool = True
    """Be ready for what earlier days brought at this time."""
    limit: LearnedLimit = LearnedLimit()


class Fp8(_Part):
    """FP8 weights, for engines that know them. Which modules are left out is decided when a checkpoint is
    made (`glowplug quantize`); such a checkpoint needs nothing here."""

    enabled: bool = False
    """Quantize the weights of an ordinary checkpoint while they are loaded."""


class Resources(_Part):
    """What each replica may use, where the provider can hold it to that."""

    cpus: float | None = Field(default=None, gt=0, le=1_024, strict=False)
    memory_bytes: int | None = Field(default=None, ge=1 << 20)
    gpus: int = Field(default=0, ge=0, le=64)


class Limits(_Part):
    """What is refused before a replica sees it."""

    request_bytes: int = Field(default=16 << 20, ge=1_024, le=1 << 30)
    output_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    """The most tokens of one answer: requests that ask for more, or do not say, get so many."""
    keys_file: str | None = None
    """API keys, one `TENANT KEY [requests=N] [tokens=N | units=N] [priority=N]` a line, rates a second; read
    again when it changes. None: nobody is asked for one."""


class Units(_Part):
    """What a request costs, in seconds of a whole replica, as `glowplug engine calibrate` measures it."""

    request_seconds: float = Field(ge=0, le=3_600, strict=False)
    """For each request as such."""
    input_token_seconds: float = Field(ge=0, le=3_600, strict=False)
    """For each token of the prompt that was not cached."""
    output_token_seconds: float = Field(ge=0, le=3_600, strict=False)
    """For each token of the answer."""
    cached_token_seconds: float = Field(default=0.0, ge=0, le=3_600, strict=False)
    """For each token of the prompt that was cached."""


class Routing(_Part):
    """How requests reach replicas. Nothing here restarts anything."""

    address: str = "127.0.0.1"
    port: _Port = 8_080
    """0 takes a free one, which `status` names."""
    request_timeout_seconds: _Seconds = 600.0
    """The longest that a request may take, streams included."""
    idle_timeout_seconds: _Seconds = 300.0
    """The longest that a stream may say nothing."""
    balancing: Literal["p2c", "full_scan", "sticky"] = "p2c"
    """The less busy of two replicas; of all, for few of them; or the one that a session had, while that is
    not too busy, so that what its prompts begin with is cached there."""
    sticky_header: str = Field(default="x-session-id", pattern=r"^[a-z0-9-]{1,100}$")
    """The request header that names the session."""
    retry_budget_percent: float = Field(default=20.0, gt=0, le=100, strict=False)
    """Retries, where a connection could not be made, as a part of the requests in flight."""
    max_requests: int | None = Field(default=None, ge=1, le=1_000_000)
    """In flight on the whole endpoint; above it the router refuses. None: twice what the replicas admit, at
    `replicas.max`."""


class Drain(_Part):
    """How a replica leaves."""

    notice_seconds: float = Field(default=1.0, ge=0, le=60, strict=False)
    """Between being taken out of the routes and being told to stop."""
    seconds: _Seconds = 120.0
    """How long streams may go on before the replica is killed."""


class Update(_Part):
    """How a new version takes over, and when it does not."""

    steps_percent: tuple[Annotated[int, Field(ge=1, le=100)], ...] = Field(
        default=(10, 50, 100), strict=False, min_length=1
    )
    """The new version's part of the traffic, step by step; the last is 100."""
    step_seconds: float = Field(default=5.0, ge=0, le=86_400, strict=False)
    """The least time at each step."""
    max_error_percent: float = Field(default=5.0, ge=0, le=100, strict=False)
    """The new version's failed requests at a step, above which it is rolled back."""
    min_requests: int = Field(default=20, ge=1)
    """Requests before the error rate is judged. A step with fewer passes by its replicas' health alone."""
    ready_seconds: _Seconds = 1_800.0
    """New replicas that are not all ready by then are rolled back."""
    max_failed_starts: int = Field(default=3, ge=1, le=10)
    """Failed replicas of the new version after which it is rolled back."""

    @pydantic.model_validator(mode="after")
    def _ascending(self) -> Update:
        steps = self.steps_percent
        if any(low >= high for low, high in itertools.pairwise(steps)) or steps[-1] != 100:
            raise ValueError(f"steps_percent: {list(steps)} must rise and end at 100, as in [10, 50, 100]")
        return self


class Containerd(_Part):
    """Where the containerd provider finds its parts."""

    address: str = "/run/containerd/containerd.sock"
    namespace: str = "default"
    snapshotter: str = "glowplug"
    agent_state: str = "/run/glowplug"
    """The node agent's state directory: `glowplug pull` asks it for the image."""


class Endpoint(_Part):
    """One served model."""

    name: str = Field(
        pattern=_NAME, description="Lower-case letters, digits and dashes; unique on the machine."
    )
    engine: Annotated[CommandEngine | VllmEngine | ReservedEngine, Field(discriminator="kind")]
    model: str | None = None
    """A directory, s3://BUCKET/PREFIX, or oci:REF#FOLDER (a block image, mounted lazily). Required by engines
    other than `command`, which find it at $MODEL."""
    model_name: str | None = None
    """What clients call the model; the endpoint's name if left out."""
    model_cache: ModelCache = ModelCache()
    image: str | None = None
    """The image that replicas run in; for the providers `containerd` and `kubernetes`."""
    provider: Literal["process", "containerd", "kubernetes"] = "process"
    containerd: Containerd = Containerd()
    kubernetes: Kubernetes = Kubernetes()
    replicas: Replicas = Replicas()
    autoscaling: Autoscaling = Autoscaling()
    objectives: Objectives = Objectives()
    fp8: Fp8 = Fp8()
    resources: Resources = Resources()
    limits: Limits = Limits()
    units: Units | None = None
    """Count load in model units, too."""
    routing: Routing = Routing()
    drain: Drain = Drain()
    update: Update = Update()
    request_log: RequestLog | None = None
    """None: no request is kept."""
    tracing: Tracing | None = None
    """None: a caller's `traceparent` is passed on, and nothing else is done."""
    metadata: Mapping[str, str] = {}
    """Yours to write; shown, never read."""

    @pydantic.model_validator(mode="after")
    def _complete(self) -> Endpoint:
        if isinstance(self.engine, ReservedEngine):
            raise ValueError(
                f"engine.kind: {self.engine.kind!r} is reserved and not there yet; use vllm or command"
            )
        if isinstance(self.engine, VllmEngine) and not self.model:
            raise ValueError("model: the engine vllm needs one: a directory, s3://BUCKET/PREFIX or oci:REF")
        if self.model is not None:
            try:
                place.parse(self.model)
            except ValueError as exc:
                raise ValueError(f"model: {exc}") from exc
        if self.provider == "kubernetes" and not self.kubernetes.supervisor:
            raise ValueError(
                "kubernetes.supervisor: the provider kubernetes needs one: the image that has glowplug, "
                "which is brought into each replica"
            )
        self._check_autoscaling()
        if self.provider != "process" and not self.image:
            raise ValueError(f"image: the provider {self.provider} runs replicas in an image; name one")
        if self.provider == "process" and self.image:
            raise ValueError(
                "image: the provider process runs replicas on this machine as it is; "
                "leave image out, or set provider: containerd"
            )
        return self

    def _check_autoscaling(self) -> None:
        if self.autoscaling.unit == "units":
            if self.units is None or self.replicas.target_units is None:
                raise ValueError(
                    "autoscaling.unit: units needs the section units, which `glowplug engine calibrate` "
                    "measures, and replicas.target_units"
                )
            if self.autoscaling.limit.enabled:
                raise ValueError(
                    "autoscaling.unit: a limit of requests cannot be learned from units; "
                    "switch autoscaling.limit off, or count requests"
                )
        for number, schedule in enumerate(self.autoscaling.schedules):
            if schedule.min > self.replicas.most:
                raise ValueError(
                    f"autoscaling.schedules.{number}.min: {schedule.min} is above replicas.max "
                    f"({self.replicas.most}); raise replicas.max or lower it"
                )
        least, most = self.limit_range
        if not least <= self.replicas.limit <= most:
            raise ValueError(
                f"autoscaling.limit: {least} to {most} leaves out the limit that replicas begin with "
                f"({self.replicas.limit}); change replicas.concurrency_limit, or the range"
            )

    @property
    def reference_units(self) -> float | None:
        """What a request costs in whose number load in model units is said; None where load is requests."""
        if self.autoscaling.unit == "requests" or self.replicas.target_units is None:
            return None
        return self.replicas.target_units / self.replicas.target_concurrency

    @property
    def limit_range(self) -> tuple[int, int]:
        """The in-flight limits of a replica between which one is learned."""
        given, limit = self.autoscaling.limit, self.replicas.limit
        return given.min or max(1, limit // 4), given.max or 4 * limit


def load(text: str, where: str) -> Endpoint:
    """The endpoint that `text` (YAML or JSON) describes. `where` names the text in errors. DocumentError."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_DOCUMENT_BYTES:
        raise errors.DocumentError(
            f"{where}: over {MAX_DOCUMENT_BYTES >> 20} MiB, which is no endpoint document"
        )
    try:
        return reading.load(
            text, where, Endpoint, called="an endpoint document", example="name: chat", words=_words
        )
    except reading.InvalidError as exc:
        raise errors.DocumentError(str(exc)) from exc


def _words(path: lines.Path, found: wording.Found) -> str | None:
    match found["type"]:
        case "string_pattern_mismatch" if path == ("name",):
            return f"{found['input']!r} is no name; use up to 40 lower-case letters, digits and inner dashes"
        case "union_tag_invalid":
            return f"{found['ctx']['tag']!r} is no engine; use vllm or command"
        case "union_tag_not_found":
            return "is required: vllm or command"
    return None


def from_json(text: str) -> Endpoint:
    """What `to_json` wrote: state of ours, with nobody's lines to name. DocumentError."""
    return load(text, "stored endpoint")


def to_json(endpoint: Endpoint) -> str:
    """The whole document, defaults included: `load` gives the same endpoint."""
    return endpoint.model_dump_json()


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the document."""
    schema = Endpoint.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Glowplug endpoint"}
