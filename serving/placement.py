"""The endpoint document's section `kubernetes`: which cluster, and what its replicas' pods are like. Pure.

Part of `serving.endpoint`; read by `serving.providers.manifests`. The words are those of Kubernetes, in our
spelling, and only what a replica needs: whatever else a cluster wants of its pods is its admission's to add.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
from pydantic import Field

_DNS = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
_Capability = Annotated[str, Field(pattern=r"^[A-Z][A-Z_]{1,40}$")]
_Port = Annotated[int, Field(ge=1, le=65_535)]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class Toleration(_Part):
    """A taint that replicas bear."""

    key: str | None = None
    """None: any."""
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Security(_Part):
    """What a replica's processes may do. Left out, no more than an engine needs: no capability, no way to
    gain one, and the runtime's own filter of system calls; user and file system are the image's."""

    run_as_user: int | None = Field(default=None, ge=0, le=2**31 - 1)
    """The user's number; the image's own user, perhaps root, if left out. Not 0 also says runAsNonRoot."""
    capabilities: tuple[_Capability, ...] = Field(default=(), strict=False)
    """What replicas are given, as in IPC_LOCK for RDMA, or SYS_NICE for vLLM on machines with NUMA."""
    seccomp: Literal["RuntimeDefault", "Unconfined"] = "RuntimeDefault"
    read_only_root: bool = False
    """Nothing of the image can be written; /tmp is there and empty, besides the folders of run and cache."""

    @pydantic.field_validator("capabilities")
    @classmethod
    def _each_by_its_name(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if each == "ALL" or each.startswith("CAP_"):
                raise ValueError(f"{each} is not one capability as Kubernetes writes it, as in SYS_NICE")
        return value


class Kubernetes(_Part):
    """Where the kubernetes provider makes replicas, and their pods."""

    namespace: str | None = Field(default=None, pattern=_DNS)
    """The context's, or the operator's custom resource's, if left out."""
    context: str | None = None
    """Of the kubeconfig; the current one, or the pod's own service account, if left out."""
    kubeconfig: str | None = None
    """A file; what kubectl reads if left out."""
    supervisor: str | None = None
    """The image that has glowplug at /opt/glowplug (the target `serving` of our Dockerfile). It is brought
    into each replica, so that `image` needs nothing of ours. Required by the provider kubernetes."""
    runtime_class: str | None = Field(default=None, pattern=_DNS)
    """The RuntimeClass: `glowplug` where lazy images are one."""
    service_account: str | None = Field(default=None, pattern=_DNS)
    priority_class: str | None = Field(default=None, pattern=_DNS)
    node_selector: Mapping[str, str] = {}
    tolerations: tuple[Toleration, ...] = Field(default=(), strict=False)
    pull_secrets: tuple[str, ...] = Field(default=(), strict=False)
    gpu_resource: str = "nvidia.com/gpu"
    """What `resources.gpus` counts."""
    resources: Mapping[str, str] = {}
    """Further resources, requested and limited alike, as in `ephemeral-storage: 20Gi`."""
    security: Security = Security()
    port: _Port = 8_000
    """Of the engine, in its pod."""
    control_port: _Port = 8_001
    """Of the engine's limit and status, for whoever has the token."""

    @pydantic.model_validator(mode="after")
    def _apart(self) -> Kubernetes:
        if self.port == self.control_port:
            raise ValueError(f"control_port: {self.control_port} is the engine's port, too; name another")
        return self
