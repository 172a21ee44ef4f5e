"""Authorization against one registry: Basic, and Bearer tokens from the registry's token server.

An Authenticator turns a 401 into an Authorization value, keeps tokens until shortly before they expire, and
asks for new ones, with the credentials as their source has them by then. Where a registry refuses one, the
source is asked for another. Thread-safe; one thread renews, the others wait for it and share what it got.

Credentials go to the registry itself (Basic) and to the token server that it names (its realm), by TLS
unless plain HTTP is allowed there. Docker registry token specification; OAuth2 refresh tokens by POST.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, MutableSet, Set
from urllib.parse import urlencode

from imagefs import artifact, errors
from imagefs.origin import credentials, headers, retry, transport

_MAX_TOKEN_ANSWER_BYTES = 256 * 1024
_DEFAULT_LIFE_SECONDS = 60.0
_CLIENT_ID = "glowplug"

Scopes = frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True)
class _Token:
    """`credential` is the fingerprint of what it was made with, empty for anonymous access."""

    authorization: str = dataclasses.field(repr=False)
    renew_at: float
    credential: str


class Authenticator:
    """The authorizations for one repository of one registry, by set of scopes."""

    def __init__(self, source: credentials.Source, http: transport.Transport, policy: retry.Policy) -> None:
        self._source = source
        self._http = http
        self._policy = policy
        self._lock = threading.Lock()
        self._tokens: dict[Scopes, _Token] = {}
        self._bearer: Mapping[str, str] | None = None

    def authorization(self, scopes: Scopes, what: str, deadline: float | None = None) -> str | None:
        """The Authorization to send, None before the registry asked for any. A token that is about to
        expire is renewed here, without the round trip of a 401."""
        with self._locked(what, deadline):
            token = self._tokens.get(scopes)
            if token is None or time.monotonic() < token.renew_at or self._bearer is None:
                return token.authorization if token else None
            return self._renew_bearer(scopes, self._bearer, what, deadline, set())

    def renew(
        self,
        answer: transport.Answer,
        scopes: Scopes,
        stale: str | None,
        refused: MutableSet[str],
        *,
        renewed: bool,
        deadline: float | None = None,
    ) -> str | None:
        """The Authorization to try after the 401 `answer` to one with `stale`; None if there is nothing
        else to try. `renewed`: `stale` came from here during the same request. `refused` collects the
        fingerprints of the credentials that did not help this request. DeniedError if the token server
        refuses; ConfigurationError for broken settings."""
        challenges = headers.challenges(answer.fields.getlist("WWW-Authenticate"))
        with self._locked(answer.what, deadline):
            token = self._tokens.get(scopes)
            if token is not None and token.authorization != stale:
                return token.authorization  # another thread renewed meanwhile
            for challenge in challenges:
                if challenge.scheme == "bearer" and "realm" in challenge.parameters:
                    # An old token may just have expired: its credential is refused only with a new one.
                    if token is not None and renewed:
                        refused.add(token.credential)
                    self._bearer = challenge.parameters
                    return self._renew_bearer(scopes, challenge.parameters, answer.what, deadline, refused)
            if any(challenge.scheme == "basic" for challenge in challenges):
                if token is not None:
                    refused.add(token.credential)
                return self._renew_basic(scopes, refused)
        return None

    def describe(self) -> str:
        """Where credentials are looked for, for messages."""
        return self._source.describe()

    def _renew_basic(self, scopes: Scopes, refused: Set[str]) -> str | None:
        credential = self._source.look_up(refused)
        if credential is None or not credential.password:
            return None
        authorization = _basic(credential)
        self._tokens[scopes] = _Token(authorization, float("inf"), credential.fingerprint)
        return authorization

    @contextlib.contextmanager
    def _locked(self, what: str, deadline: float | None) -> Iterator[None]:
        """Hold the lock; whoever has a deadline does not wait past it for another thread's renewal."""
        timeout = -1 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._lock.acquire(timeout=timeout):
            raise errors.UnavailableError(f"{what}: no token came from the token server in time")
        try:
            yield
        finally:
            self._lock.release()

    def _renew_bearer(
        self,
        scopes: Scopes,
        challenge: Mapping[str, str],
        what: str,
        deadline: float | None,
        refused: MutableSet[str],
    ) -> str | None:
        realm = challenge["realm"]
        what = f"{what}: token server"
        self._http.check_url(realm, what)
        while True:
            credential = self._source.look_up(refused)
            if credential is None and refused:
                return None
            fingerprint = credential.fingerprint if credential else ""
            if credential is not None and credential.registry_token:
                authorization = f"Bearer {credential.registry_token}"
                self._tokens[scopes] = _Token(authorization, float("inf"), fingerprint)
                return authorization
            try:
                authorization, renew_at = self._token(scopes, challenge, credential, what, deadline)
            except errors.DeniedError:
                refused.add(fingerprint)
                if credential is None or self._source.look_up(refused) is None:
                    raise
                continue
            self._tokens[scopes] = _Token(authorization, renew_at, fingerprint)
            return authorization

    def _token(
        self,
        scopes: Scopes,
        challenge: Mapping[str, str],
        credential: credentials.Credential | None,
        what: str,
        deadline: float | None,
    ) -> tuple[str, float]:
        """A new token from the token server: the Authorization, and when (time.monotonic()) to renew it."""
        realm, service = challenge["realm"], challenge.get("service", "")
        scope = sorted(scopes | frozenset(challenge.get("scope", "").split()))
        started = time.monotonic()
        document = retry.call(
            self._policy,
            lambda: self._ask(realm, service, scope, credential, what, deadline),
            deadline,
        )
        token = document.get("token") or document.get("access_token")
        # A line end in it would let the token server write header fields of our requests.
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise errors.InvalidInputError(f"{what}: {transport.shown(realm)}: the answer holds no token")
        life = document.get("expires_in")
        seconds = float(life) if isinstance(life, int | float) and life > 0 else _DEFAULT_LIFE_SECONDS
        return f"Bearer {token}", started + seconds - min(10.0, seconds / 4)

    def _ask(
        self,
        realm: str,
        service: str,
        scope: list[str],
        credential: credentials.Credential | None,
        what: str,
        deadline: float | None,
    ) -> dict[str, object]:
        if credential is not None and credential.identity_token:
            form = {
                "grant_type": "refresh_token",
                "service": service,
                "client_id": _CLIENT_ID,
                "scope": " ".join(scope),
                "refresh_token": credential.identity_token,
            }
            answer = self._http.open(
                "POST",
                realm,
                what,
                fields={"Content-Type": "application/x-www-form-urlencoded"},
                body=lambda: urlencode(form).encode(),
                deadline=deadline,
            )
        else:
            query: list[tuple[str, str]] = [("service", service)] if service else []
            query += [("scope", one) for one in scope]
            fields = {}
            if credential is not None and credential.password:
                query += [("client_id", _CLIENT_ID), ("account", credential.username)]
                fields["Authorization"] = _basic(credential)
            separator = "&" if "?" in realm else "?"
            url = f"{realm}{separator}{urlencode(query)}"
            answer = self._http.open("GET", url, what, fields=fields, deadline=deadline)
        if answer.status in (400, 401, 403):
            answer.discard()
            used = f"the credentials in {self.describe()}" if credential else "anonymous access"
            raise errors.DeniedError(
                f"{what}: {transport.shown(realm)}: HTTP {answer.status}: refused {used}; "
                "log in to the registry (docker login, podman login)"
            )
        if answer.status != 200:
            raise transport.status_error(answer)
        return artifact.parse_json_object(answer.read(_MAX_TOKEN_ANSWER_BYTES), what)


def _basic(credential: credentials.Credential) -> str:
    pair = f"{credential.username}:{credential.password}".encode()
    return "Basic " + base64.b64encode(pair).decode()
