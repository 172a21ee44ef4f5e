"""Where a node keeps models that are not its own: the part of the document. Pure."""

from __future__ import annotations

import pydantic
from pydantic import Field


class ModelCache(pydantic.BaseModel):
    """Models from s3:// and oci: on the machines that serve them, shared by all endpoints there."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    directory: str = Field(default="/var/lib/glowplug/models", pattern="^/")
    quota_bytes: int | None = Field(default=None, ge=1 << 20)
    """For downloads: those not used for longest go first, none that is in use. None: what the disk has."""
