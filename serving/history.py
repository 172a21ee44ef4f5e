"""What an endpoint has been: the documents it was given, and where its update stands. Pure values, and as
JSON.

Made and changed by the server, kept by `journal`, shown by `statusdocument`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from serving import endpoint
from serving.controller import Rollout
from serving.endpoint import Endpoint

_KEPT_REVISIONS = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Revision:
    """A document that was applied. `note` says what became of it."""

    number: int
    applied_at: float
    document: Endpoint
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """`revisions` oldest first, the last one wanted; `scaled`: replicas as `endpoint scale` said, instead of
    the document's least; `port`: where Envoy listens."""

    revisions: tuple[Revision, ...] = ()
    rollout: Rollout = dataclasses.field(default_factory=Rollout)
    scaled: int | None = None
    port: int | None = None

    @property
    def wanted(self) -> Revision:
        """The document in force."""
        return self.revisions[-1]

    def with_document(self, document: Endpoint, now: float, note: str = "") -> History:
        """Another document in force."""
        number = self.revisions[-1].number + 1 if self.revisions else 1
        kept = (*self.revisions, Revision(number, now, document, note))[-_KEPT_REVISIONS:]
        return dataclasses.replace(self, revisions=kept, scaled=None)


def to_json(state: History) -> dict[str, Any]:
    return {
        "revisions": [
            {
                "number": each.number,
                "applied_at": each.applied_at,
                "document": each.document.model_dump(mode="json"),
                "note": each.note,
            }
            for each in state.revisions
        ],
        "rollout": state.rollout.to_json(),
        "scaled": state.scaled,
        "port": state.port,
    }


def from_json(value: dict[str, Any]) -> History:
    """What `to_json` gave. KeyError, TypeError, ValueError, DocumentError for what it did not."""
    return History(
        revisions=tuple(
            Revision(
                each["number"],
                each["applied_at"],
                endpoint.from_json(json.dumps(each["document"])),
                each["note"],
            )
            for each in value["revisions"]
        ),
        rollout=Rollout.from_json(value["rollout"]),
        scaled=value["scaled"],
        port=value["port"],
    )
