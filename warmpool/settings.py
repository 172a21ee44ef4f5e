"""The settings of `glowplug warmpool` but for the pool's size (`policy`): values, checked. Pure.

Made by `document` from a YAML text, read by the controller and what it is built from. What contradicts itself
is an error at the key that is to be changed. The provider's classes and the policy's are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from warmpool.policy import Part, Policy, Seconds

_DNS_NAME = r"^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$"

Name = Annotated[str, Field(pattern=_DNS_NAME)]
Port = Annotated[int, Field(ge=0, le=65_535)]


class KubernetesAccess(Part):
    """How the API server is reached. Nothing said: as a pod reaches it or, outside of pods, as kubectl
    does."""

    url: str | None = None
    ca_file: str | None = None
    token_file: str | None = None
    kubeconfig: str | None = None
    context: str | None = None


class Toleration(Part):
    """As in a pod."""

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""


class KubernetesClass(Part):
    """Nodes of one class, as pods ask for them."""

    node_selector: Mapping[str, str] = Field(min_length=1)
    """Labels that the nodes of this class have, and no other nodes."""
    resources: Mapping[str, str] = Field(min_length=1)
    """What a placeholder asks for: all of a node that matters ("nvidia.com/gpu": "8")."""
    tolerations: tuple[Toleration, ...] = Field(default=(), strict=False)
    """Of taints that nodes of this class always have; the startup taint needs none."""


class KubernetesProvider(Part):
    """Placeholder pods, which the cluster's own autoscaler makes nodes for."""

    kind: Literal["kubernetes"]
    access: KubernetesAccess = KubernetesAccess()
    namespace: str = "glowplug-warmpool"
    """Of the placeholders, and of the controller's lease and state."""
    priority_class: str = "glowplug-warmpool"
    """Negative, and above -10: below that the cluster autoscaler makes no nodes for it."""
    image: str = "registry.k8s.io/pause:3.10"
    """What placeholders run."""
    startup_taint: str = "glowplug.dev/warming"
    """The taint that new nodes have until they are warm; the node pool sets it, this controller takes it
    away."""
    refused_after_seconds: Seconds = 900.0
    """A placeholder without a node for this long is told as refused for want of capacity."""
    broken_after_seconds: Seconds = 120.0
    """A node that is not ready for this long is broken."""
    classes: Mapping[Name, KubernetesClass] = Field(min_length=1)


class Ec2Class(Part):
    """An Auto Scaling group, and its warm pool."""

    auto_scaling_group: str = Field(min_length=1, max_length=255)
    pool_state: Literal["Stopped", "Hibernated", "Running"] = "Stopped"
    """What instances wait in. Stopped costs the disk only and takes a boot; hibernated must fit the root
    volume."""
    reuse: bool = True
    """Instances go back to the warm pool when the group scales in."""
    lifecycle_hook: str | None = None
    """The launching hook that holds an instance until it is warm. Without one, instances count as admitted
    when EC2 says that they are there."""
    refused_within_seconds: Seconds = 600.0
    """A launch that failed as recently as this, while instances are missing, is told as refused."""


class Ec2Provider(Part):
    """Warm pools of EC2 Auto Scaling groups. Credentials are boto3's to find."""

    kind: Literal["ec2"]
    region: str | None = None
    endpoint_url: str | None = None
    classes: Mapping[Name, Ec2Class] = Field(min_length=1)


class SimulatedClass(Part):
    """Machines that are drawn."""

    provision_seconds: tuple[Seconds, Seconds] = Field(default=(15.0, 50.0), strict=False)
    boot_seconds: tuple[Seconds, Seconds] = Field(default=(60.0, 180.0), strict=False)
    failure_share: float = Field(default=0.0, ge=0, le=1, strict=False)
    capacity: int | None = Field(default=None, ge=0)


class SimulatedProvider(Part):
    """No machines: for trying a policy on live demand."""

    kind: Literal["simulated"]
    seed: int = 1
    classes: Mapping[Name, SimulatedClass] = Field(min_length=1)


class KubernetesDemand(Part):
    """Pods that run or wait on nodes of each class: `provider.kind` must be kubernetes, whose classes say
    which pods those are."""

    kind: Literal["kubernetes"]


class ServedEndpoint(Part):
    """Replicas of one endpoint, and what they are placed on."""

    url: str | None = None
    """The status address of its `glowplug serve` (http://HOST:PORT)."""
    socket: str | None = None
    """Or its socket, on the same machine."""
    node_class: Name
    replicas_per_node: int = Field(default=1, ge=1, le=1_024)
    image: str | None = None
    """What its replicas run in. Asked over the socket if it is not said here."""

    @pydantic.model_validator(mode="after")
    def _one_place(self) -> ServedEndpoint:
        if (self.url is None) == (self.socket is None):
            raise ValueError("url: give either url or socket")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: {self.url!r} is no http: or https: URL")
        return self


class ServeDemand(Part):
    """What the autoscalers of `glowplug serve` want."""

    kind: Literal["serve"]
    endpoints: tuple[ServedEndpoint, ...] = Field(min_length=1, strict=False)


class FileDemand(Part):
    """A CSV file that somebody appends to: `time,node_class,wanted`, the last line of each class counts."""

    kind: Literal["file"]
    path: str
    stale_after_seconds: Seconds = 300.0
    """A last line that is older says nothing: a gap."""


class BaseImage(Part):
    """An image that nodes are to have before work comes."""

    image: str = Field(min_length=1, max_length=4_096)
    node_classes: tuple[Name, ...] = Field(default=(), strict=False)
    """None named: all."""
    chance: float = Field(default=1.0, gt=0, le=1, strict=False)
    """How likely it is that a node's next work needs it."""
    required: bool = True
    """A node without it is not warm; others are fetched as there is room."""


class Agents(Part):
    """How the nodes' agents are asked: the port on which they share blocks (`peers` in their settings)."""

    port: Port = 7311
    token_file: str | None = None
    """The cluster's secret: the first line is said."""
    tls_ca: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    timeout_seconds: Seconds = 10.0

    @pydantic.model_validator(mode="after")
    def _whole(self) -> Agents:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_key: tls_certificate and tls_key belong together")
        if self.tls_certificate is not None and self.tls_ca is None:
            raise ValueError("tls_ca: needed with tls_certificate: the authority of the agents' certificates")
        if self.token_file is None and self.tls_certificate is None:
            raise ValueError(
                "token_file: agents answer nobody without a secret: name token_file, or tls_ca, "
                "tls_certificate and tls_key"
            )
        return self


class Warmth(Part):
    """What makes a node warm."""

    agents: Agents | None = None
    """None: nodes are warm when the provider says that they are up. Only where nothing is to be cached."""
    images: tuple[BaseImage, ...] = Field(default=(), strict=False)
    """Always wanted."""
    from_endpoints: bool = True
    """Want the images of the endpoints that the sources of demand know, too, each with the chance that its
    share of the replicas gives."""
    disk_bytes: int = Field(default=18 << 30, ge=1 << 20)
    """What may be pinned on a node; an agent gives pins nine tenths of its cache.quota_bytes at most."""
    stale_after_seconds: Seconds = 120.0
    """A node whose agent was not heard for this long is broken."""
    warm_within_seconds: Seconds = 1_800.0
    """A node that runs and is not warm after this long is broken."""
    recycle_after_seconds: Seconds = 7 * 86_400.0
    """A held node that is older is exchanged, when another is warm in its place."""

    @pydantic.model_validator(mode="after")
    def _reachable(self) -> Warmth:
        if self.images and self.agents is None:
            raise ValueError("agents: needed with images: nobody else can say what a node has cached")
        return self


class Status(Part):
    """Where metrics, status and health are shown: read-only, no secrets."""

    listen: str | None = "127.0.0.1:7320"


class Election(Part):
    """Who acts, when several controllers run."""

    kind: Literal["lease", "lock"] = "lock"
    """`lease`: a Lease in the provider's namespace. `lock`: a file in the state directory, for one
    machine."""
    lease_seconds: Seconds = 15.0


class Backoff(Part):
    """How long a class is left alone after an error; doubled at each further one, with jitter."""

    first_seconds: Seconds = 15.0
    most_seconds: Seconds = 900.0

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Backoff:
        if self.most_seconds < self.first_seconds:
            raise ValueError(f"most_seconds: {self.most_seconds:g} is below first_seconds; raise it")
        return self


Provider = Annotated[KubernetesProvider | Ec2Provider | SimulatedProvider, Field(discriminator="kind")]
Demand = Annotated[KubernetesDemand | ServeDemand | FileDemand, Field(discriminator="kind")]


class Settings(Part):
    """The document."""

    name: Name = "default"
    """Of this pool: part of its lease's, its state's and its placeholders' names."""
    interval_seconds: Seconds = 15.0
    """From one look to the next."""
    provider: Provider
    demand: Demand
    policy: Policy
    warmth: Warmth = Warmth()
    hand_over: Literal["taken", "served"] = "taken"
    """`taken`: work takes nodes by itself. `served`: this controller has the provider put as many in use as
    are wanted (an Auto Scaling group that nobody else scales)."""
    election: Election = Election()
    backoff: Backoff = Backoff()
    adopt_seconds: Seconds = 1_800.0
    """After a start that found no saved state, nothing is released for so long: what is there was held for a
    reason that is not known any more."""
    state_directory: str = "/var/lib/glowplug-warmpool"
    """Where `election.kind: lock` keeps its lock and the state; with a lease the state is a ConfigMap."""
    status: Status = Status()

    @pydantic.model_validator(mode="after")
    def _same_classes(self) -> Settings:
        mine, theirs = set(self.policy.classes), set(self.provider.classes)
        for name in sorted(mine ^ theirs):
            missing, there = ("provider", "policy") if name in mine else ("policy", "provider")
            raise ValueError(
                f"{missing}.classes: {name!r} is missing, {there}.classes has it; add it, or take "
                "it out there"
            )
        if isinstance(self.demand, KubernetesDemand) and self.provider.kind != "kubernetes":
            raise ValueError(
                "demand.kind: kubernetes counts the classes of provider.kind: kubernetes; use another"
            )
        if self.election.kind == "lease" and self.provider.kind != "kubernetes":
            raise ValueError("election.kind: a lease needs provider.kind: kubernetes; use lock")
        if isinstance(self.demand, ServeDemand):
            for number, each in enumerate(self.demand.endpoints):
                if each.node_class not in mine:
                    raise ValueError(
                        f"demand.endpoints.{number}.node_class: {each.node_class!r} is no class; "
                        f"known: {', '.join(sorted(mine))}"
                    )
        return self
