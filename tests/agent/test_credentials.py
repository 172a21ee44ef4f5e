"""The chain of credential sources: its order, its faults, and that nothing of it is ever shown."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterable, Set
from pathlib import Path

import pytest
import yaml

from agent import api, config, kubernetes
from agent import credentials as chain_of
from imagefs import errors
from imagefs.origin import agentcredentials
from imagefs.origin.credentials import Credential
from tests.fixtures.kubernetes_api import KubernetesApi

ONE, TWO, THREE = (Credential("u", f"s3cret-{n}") for n in (1, 2, 3))


class Fixed:
    """A part with these credentials."""

    def __init__(self, *have: Credential | errors.ImagefsError) -> None:
        self.have = have

    def candidates(self, host: str, repository: str, refused: Set[str]) -> Iterable[Credential]:
        for each in self.have:
            if isinstance(each, errors.ImagefsError):
                raise each
            yield each

    def describe(self) -> str:
        return f"part of {len(self.have)}"


def refusing(*each: Credential) -> frozenset[str]:
    return frozenset(credential.fingerprint for credential in each)


class TestOrder:
    def test_the_first_that_was_not_refused(self) -> None:
        chain = chain_of.Chain([Fixed(), Fixed(ONE, TWO), Fixed(THREE)])
        look_up = chain.look_up
        assert look_up("h", "r")[0] == ONE
        assert look_up("h", "r", refusing(ONE))[0] == TWO
        assert look_up("h", "r", refusing(ONE, TWO))[0] == THREE
        assert look_up("h", "r", refusing(ONE, TWO, THREE)) == (None, "part of 0, part of 2, part of 1")

    def test_nothing(self) -> None:
        assert chain_of.Chain([]).look_up("h", "r") == (None, "nowhere")

    def test_a_broken_part_is_said_once_and_passed_over(self, caplog: pytest.LogCaptureFixture) -> None:
        chain = chain_of.Chain([Fixed(errors.ConfigurationError("helper x is broken")), Fixed(ONE)])
        for _ in range(3):
            assert chain.look_up("h", "r")[0] == ONE
        assert caplog.text.count("helper x is broken") == 1
        assert "s3cret" not in caplog.text


def docker_config(directory: Path, host: str, password: str) -> Path:
    auth = base64.b64encode(f"u:{password}".encode()).decode()
    file = directory / "config.json"
    file.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return file


class TestBuild:
    def test_all_three_in_order(
        self, tmp_path: Path, kubernetes_api: KubernetesApi, caplog: pytest.LogCaptureFixture
    ) -> None:
        answer = {
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "kind": "CredentialProviderResponse",
            "cacheKeyType": "Image",
            "auth": {"r.example": {"username": "u", "password": TWO.password}},
        }
        provider = {
            "name": "plugin",
            "matchImages": ["r.example"],
            "defaultCacheDuration": "1h",
            "apiVersion": answer["apiVersion"],
        }
        kind = {"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig"}
        (tmp_path / "providers.yaml").write_text(yaml.safe_dump({**kind, "providers": [provider]}))
        (tmp_path / "plugin").write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
        (tmp_path / "plugin").chmod(0o755)
        auths = json.dumps({"auths": {"r.example": {"username": "u", "password": THREE.password}}})
        kubernetes_api.put(
            "v1/secrets",
            {
                "metadata": {"name": "pull"},
                "type": "kubernetes.io/dockerconfigjson",
                "data": {".dockerconfigjson": base64.b64encode(auths.encode()).decode()},
            },
        )
        settings = config.Settings(
            credentials=config.Credentials(
                docker_config(tmp_path, "r.example", ONE.password), tmp_path / "providers.yaml", tmp_path
            ),
            kubernetes=config.Kubernetes(api_url=kubernetes_api.url, pull_secrets=True),
        )
        with caplog.at_level(logging.DEBUG):
            chain, stop = chain_of.build(settings, kubernetes.connect(settings.kubernetes))
            try:
                seen: list[Credential] = []
                while (found := chain.look_up("r.example", "a/b", refusing(*seen))[0]) is not None:
                    seen.append(found)
                docker_config(tmp_path, "r.example", "r0tated")
                assert chain.look_up("r.example", "a/b")[0] == Credential("u", "r0tated")
            finally:
                stop()
        assert seen == [ONE, TWO, THREE]
        assert "s3cret" not in caplog.text + chain.describe() + repr(chain) + repr(seen)

    def test_settings_that_do_not_go_together(self, tmp_path: Path) -> None:
        half = config.Settings(credentials=config.Credentials(kubelet_provider_config=tmp_path))
        with pytest.raises(errors.ConfigurationError, match="together"):
            chain_of.build(half, None)
        no_server = config.Settings(kubernetes=config.Kubernetes(pull_secrets=True))
        with pytest.raises(errors.ConfigurationError, match="api_url"):
            chain_of.build(no_server, None)


class TestHandler:
    def ask(self, chain: chain_of.Chain, body: object) -> object:
        request = api.Request("POST", agentcredentials.PATH, {}, {}, json.dumps(body).encode())
        return chain_of.handler(chain)(request)

    def test_answers(self) -> None:
        chain = chain_of.Chain([Fixed(ONE)])
        question = {"host": "h", "repository": "r"}
        expected = {"username": "u", "password": ONE.password, "identity_token": "", "registry_token": ""}
        assert self.ask(chain, question) == {"credential": expected, "sources": "part of 1"}
        refused = {**question, "refused": [ONE.fingerprint]}
        assert self.ask(chain, refused) == {"credential": None, "sources": "part of 1"}

    @pytest.mark.parametrize(
        "body",
        [
            {},
            [],
            {"host": 5, "repository": "r"},
            {"host": "h"},
            {"host": "h", "repository": "r", "refused": "x"},
        ],
    )
    def test_refuses(self, body: object) -> None:
        with pytest.raises(errors.InvalidInputError):
            self.ask(chain_of.Chain([]), body)
