"""Requests to one registry: its address, authorization, redirects.

Between RegistryOrigin (which knows the distribution spec) and Transport (which knows HTTP). Thread-safe.
Authorization goes to the registry's own scheme, host and port, and nowhere else: a redirect to blob storage
is followed without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from imagefs import errors
from imagefs.origin import auth, transport

_MAX_REDIRECTS = 5
_MAX_AUTHORIZATIONS = 5
"""Requests until a 401 stays one: without authorization, with an expired one, and with a few credentials."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Session:
    """One registry host as seen by one repository."""

    def __init__(
        self,
        base_url: str,
        http: transport.Transport,
        authenticator: auth.Authenticator,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        """`base_url` is scheme, host and port; `fields` go with every request to it, and nowhere else."""
        self.base_url = base_url
        self.http = http
        self._auth = authenticator
        self._fields = fields or {}

    def open(
        self,
        method: str,
        url: str,
        what: str,
        scopes: frozenset[str],
        *,
        fields: Mapping[str, str] | None = None,
        body: transport.Body | None = None,
        deadline: float | None = None,
    ) -> transport.Answer:
        """One request to `url` (relative to the registry, or what it told us), authorized if it stays on
        the registry; a 401 renews the authorization, with each credential there is. Returns
        whatever status comes, but DeniedError for a 401 that stays."""
        url = transport.join(self.base_url, url, what)
        if not self._is_own(url):
            self.http.check_url(url, what)
            return self.http.open(method, url, what, fields=fields, body=body, deadline=deadline)
        authorization = self._auth.authorization(scopes, what, deadline)
        refused: set[str] = set()
        for attempt in range(_MAX_AUTHORIZATIONS):
            own = {**self._fields, **(fields or {})}
            if authorization:
                own["Authorization"] = authorization
            answer = self.http.open(method, url, what, fields=own, body=body, deadline=deadline)
            if answer.status != 401:
                return answer
            authorization = self._auth.renew(
                answer, scopes, authorization, refused, renewed=attempt > 0, deadline=deadline
            )
            answer.discard()
            if authorization is None:
                break
        raise errors.DeniedError(
            f"{what}: {transport.shown(url)}: HTTP 401: access denied with the credentials found in "
            f"{self._auth.describe()}; log in to the registry (docker login, podman login)"
        )

    def follow(
        self,
        method: str,
        url: str,
        what: str,
        scopes: frozenset[str],
        *,
        fields: Mapping[str, str] | None = None,
        deadline: float | None = None,
    ) -> transport.Answer:
        """As `open`, for requests without a body; redirects are followed, `Answer.url` says where to."""
        url = transport.join(self.base_url, url, what)
        for _ in range(_MAX_REDIRECTS + 1):
            answer = self.open(method, url, what, scopes, fields=fields, deadline=deadline)
            target = answer.fields.get("Location")
            if answer.status not in _REDIRECTS or not target:
                return answer
            answer.discard()
            url = transport.join(url, target, what)
        raise errors.UnavailableError(f"{what}: more than {_MAX_REDIRECTS} redirects")

    def _is_own(self, url: str) -> bool:
        own, other = urlsplit(self.base_url), urlsplit(url)
        return (own.scheme, own.netloc.lower()) == (other.scheme, other.netloc.lower())
