"""The trust policy: pins, and cosign's signatures by tag and by referrer, on a real registry."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from hypothesis import given
from hypothesis import strategies as st

from agent import config, trust
from imagefs import artifact, errors
from imagefs.artifact import Manifest
from imagefs.origin import BytesSource, registry, retry, transport
from tests.fixtures import servers
from tests.fixtures.servers import Fault, FaultProxy, RegistryServer

SOURCE = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64
QUICK = retry.Policy(attempts=2, first_delay_seconds=0.001, max_delay_seconds=0.002)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def sign(key: PrivateKey, payload: bytes, digest: hashes.HashAlgorithm | None = None) -> bytes:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(payload, ec.ECDSA(digest or hashes.SHA256()))
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(payload, padding.PKCS1v15(), digest or hashes.SHA256())
    return key.sign(payload)


def pem(directory: Path, key: PrivateKey, name: str = "cosign.pub") -> Path:
    path = directory / name
    path.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return path


def payload_of(digest: str, **changes: Any) -> bytes:
    critical = {
        "identity": {"docker-reference": "r.example/app"},
        "image": {"docker-manifest-digest": digest},
        "type": "cosign container image signature",
    }
    return json.dumps({"critical": {**critical, **changes}, "optional": None}).encode()


KEY = ec.generate_private_key(ec.SECP256R1())


class Repository:
    """A repository with one block image, as far as trust looks at it, to be signed."""

    def __init__(self, host: str) -> None:
        self.origin = registry.RegistryOrigin(
            host, servers.unique_name("trust"), transport.Settings(), Path("/absent"), QUICK
        )
        self.block_image = self.manifest(artifact.ARTIFACT_TYPE, [])

    def blob(self, data: bytes) -> str:
        digest = artifact.digest_of(data)
        self.origin.put_blob(digest, len(data), BytesSource(data))
        return digest

    def manifest(
        self, kind: str, layers: list[dict[str, Any]], tag: str | None = None, subject: str | None = None
    ) -> Manifest:
        document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": artifact.OCI_MANIFEST,
            "artifactType": kind,
            "config": {"mediaType": "application/x", "digest": self.blob(b"{}"), "size": 2},
            "layers": layers,
        }
        if subject:
            document["subject"] = {"mediaType": artifact.OCI_MANIFEST, "digest": subject, "size": 1}
        data = artifact.canonical_json(document)
        self.origin.put_manifest(data, artifact.OCI_MANIFEST, tag)
        return Manifest(artifact.OCI_MANIFEST, artifact.digest_of(data), data)

    def layer(self, payload: bytes, signature: bytes | str) -> dict[str, Any]:
        encoded = signature if isinstance(signature, str) else base64.b64encode(signature).decode()
        return {
            "mediaType": trust.PAYLOAD_TYPE,
            "digest": self.blob(payload),
            "size": len(payload),
            "annotations": {trust.SIGNATURE_ANNOTATION: encoded},
        }

    def tag(self, *layers: dict[str, Any]) -> None:
        name = self.block_image.digest.replace(":", "-") + ".sig"
        self.manifest("", list(layers), tag=name)

    def refer(self, *layers: dict[str, Any]) -> None:
        self.manifest(trust.SIGNATURE_ARTIFACT_TYPE, list(layers), subject=self.block_image.digest)

    def check(self, images: config.Images) -> None:
        trust.check(images, self.origin, SOURCE, self.block_image)


@pytest.fixture
def repository(registry: RegistryServer) -> Repository:
    return Repository(registry.host)


@pytest.fixture
def signed(tmp_path: Path) -> config.Images:
    return config.Images(trust="signed", signature_keys=(pem(tmp_path, KEY),))


@pytest.mark.parametrize(
    ("places", "believed"),
    [
        ((), True),
        (("docker://r.example/team/app",), True),
        (("docker://r.example/team/",), True),
        (("docker://r.example/team",), False),
        (("docker://r.example/team/ap",), False),
        (("docker://r.example/other/", "s3://bucket/team/app"), False),
    ],
)
def test_the_repositories_that_are_believed(places: tuple[str, ...], believed: bool) -> None:
    class Place:
        name = "docker://r.example/team/app"

    images = config.Images(repositories=places)
    manifest = Manifest(artifact.OCI_MANIFEST, OTHER, b"")
    if believed:
        trust.check(images, Place(), SOURCE, manifest)  # type: ignore[arg-type]
    else:
        with pytest.raises(errors.DeniedError, match=r"images\.repositories"):
            trust.check(images, Place(), SOURCE, manifest)  # type: ignore[arg-type]


class TestPins:
    def test_repository_takes_what_is_there(self, repository: Repository) -> None:
        repository.check(config.Images())

    @pytest.mark.parametrize("policy", ["repository", "pinned", "signed"])
    def test_a_pin_is_the_last_word(self, repository: Repository, policy: Any) -> None:
        def images(digest: str) -> config.Images:
            return config.Images(trust=policy, pins=(config.Pin(SOURCE, digest),))

        repository.check(images(repository.block_image.digest))
        with pytest.raises(errors.DeniedError, match=f"{OTHER} is pinned"):
            repository.check(images(OTHER))

    def test_no_pin(self, repository: Repository) -> None:
        images = config.Images(trust="pinned", pins=(config.Pin(OTHER, OTHER),))
        with pytest.raises(errors.DeniedError, match="no entry"):
            repository.check(images)


class TestSigned:
    @pytest.mark.parametrize("place", [Repository.tag, Repository.refer])
    def test_good(self, repository: Repository, signed: config.Images, place: Callable[..., None]) -> None:
        payload = payload_of(repository.block_image.digest)
        place(repository, repository.layer(payload, sign(KEY, payload)))
        repository.check(signed)

    def test_one_good_among_bad(self, repository: Repository, signed: config.Images, tmp_path: Path) -> None:
        stranger = ec.generate_private_key(ec.SECP256R1())
        payload = payload_of(repository.block_image.digest)
        repository.tag(
            repository.layer(payload, sign(stranger, payload)),
            repository.layer(payload, "not base64!"),
            repository.layer(b"nonsense", sign(KEY, b"nonsense")),
            repository.layer(payload, sign(KEY, payload)),
        )
        repository.check(signed)
        second = pem(tmp_path, stranger, "second.pub")
        repository.check(config.Images(trust="signed", signature_keys=(second,)))

    @pytest.mark.parametrize("kind", ["none", "stranger", "other", "type", "text", "bare", "huge"])
    def test_refused(self, repository: Repository, signed: config.Images, kind: str) -> None:
        digest = repository.block_image.digest
        payload = payload_of(digest)
        layers = {
            "none": [],
            "stranger": [(payload, sign(ec.generate_private_key(ec.SECP256R1()), payload))],
            "other": [(payload_of(OTHER), sign(KEY, payload_of(OTHER)))],
            "type": [(payload_of(digest, type="x"), sign(KEY, payload_of(digest, type="x")))],
            "text": [(b"[]", sign(KEY, b"[]"))],
            "bare": [(payload, "")],
            "huge": [(payload + b" " * 100_000, sign(KEY, payload + b" " * 100_000))],
        }[kind]
        if layers:
            repository.tag(*(repository.layer(*layer) for layer in layers))
        with pytest.raises(errors.DeniedError, match=digest) as caught:
            repository.check(signed)
        assert "cosign sign" in str(caught.value)

    def test_a_signature_for_the_source_is_none_for_the_block_image(
        self, repository: Repository, signed: config.Images
    ) -> None:
        payload = payload_of(SOURCE)
        repository.tag(repository.layer(payload, sign(KEY, payload)))
        with pytest.raises(errors.DeniedError, match="another manifest"):
            repository.check(signed)

    def test_nobody_knows(
        self, registry: RegistryServer, fault_server: FaultProxy, signed: config.Images
    ) -> None:
        fault_server.upstream = registry.host
        repository = Repository(fault_server.host)
        payload = payload_of(repository.block_image.digest)
        repository.tag(repository.layer(payload, sign(KEY, payload)))
        fault_server.add(Fault(status=503, times=None))
        with pytest.raises(errors.UnavailableError):
            repository.check(signed)

    def test_a_payload_that_was_changed_on_the_way(
        self, registry: RegistryServer, fault_server: FaultProxy, signed: config.Images
    ) -> None:
        fault_server.upstream = registry.host
        repository = Repository(fault_server.host)
        payload = payload_of(repository.block_image.digest)
        repository.tag(repository.layer(payload, sign(KEY, payload)))
        fault_server.add(Fault(path="/blobs/", flip=True, times=None))
        with pytest.raises(errors.DeniedError):
            repository.check(signed)

    def test_more_signatures_than_are_read(self, repository: Repository, signed: config.Images) -> None:
        payload = payload_of(repository.block_image.digest)
        good, bad = repository.layer(payload, sign(KEY, payload)), repository.layer(b"x", b"x")
        repository.tag(*[bad] * 32, good)
        with pytest.raises(errors.DeniedError):
            repository.check(signed)


class TestKeys:
    @pytest.mark.parametrize(
        ("key", "digest"),
        [
            (KEY, None),
            (ec.generate_private_key(ec.SECP384R1()), hashes.SHA384()),
            (ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()),
            (rsa.generate_private_key(65537, 2048), None),
            (ed25519.Ed25519PrivateKey.generate(), None),
        ],
    )
    def test_kinds(self, tmp_path: Path, key: PrivateKey, digest: hashes.HashAlgorithm | None) -> None:
        [public] = trust.load_keys([pem(tmp_path, key)])
        signature = sign(key, b"payload", digest)
        assert trust.verify_signature(public, signature, b"payload")
        assert not trust.verify_signature(public, signature, b"Payload")
        assert not trust.verify_signature(public, signature[:-1] + b"\0\0", b"payload")

    def test_as_openssl_signs(self, tmp_path: Path) -> None:
        private, payload = tmp_path / "key.pem", tmp_path / "payload"
        payload.write_bytes(payload_of(SOURCE))
        for make in (
            ["ecparam", "-name", "prime256v1", "-genkey", "-noout"],
            ["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
        ):
            openssl = ["openssl", *make, "-out", str(private)]
            subprocess.run(openssl, check=True, capture_output=True)
            public = tmp_path / "public.pem"
            openssl = ["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)]
            subprocess.run(openssl, check=True, capture_output=True)
            openssl = ["openssl", "dgst", "-sha256", "-sign", str(private), str(payload)]
            signature = subprocess.run(openssl, check=True, capture_output=True).stdout
            [key] = trust.load_keys([public])
            assert trust.verify_signature(key, signature, payload.read_bytes())

    @given(st.binary(max_size=100))
    def test_any_signature(self, signature: bytes) -> None:
        assert not trust.verify_signature(KEY.public_key(), signature, b"payload")

    @pytest.mark.parametrize(
        "key", [rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP521R1())]
    )
    def test_kinds_that_are_not_taken(self, tmp_path: Path, key: Any) -> None:
        with pytest.raises(errors.ConfigurationError, match=r"cosign\.pub"):
            trust.load_keys([pem(tmp_path, key)])

    def test_no_key(self, tmp_path: Path) -> None:
        with pytest.raises(errors.ConfigurationError, match="names no key"):
            trust.load_keys([])
        with pytest.raises(errors.ConfigurationError, match="absent"):
            trust.load_keys([tmp_path / "absent"])
        (tmp_path / "junk").write_text("junk")
        with pytest.raises(errors.ConfigurationError, match="junk"):
            trust.load_keys([tmp_path / "junk"])


class TestPayload:
    def test_exactly_this_manifest(self) -> None:
        trust.verify_payload(payload_of(SOURCE), SOURCE)
        with pytest.raises(errors.InvalidInputError, match="another manifest"):
            trust.verify_payload(payload_of(OTHER), SOURCE)

    @given(st.dictionaries(st.sampled_from(["identity", "image", "type"]), JSON) | JSON)
    def test_any_statement(self, change: Any) -> None:
        document: Any = json.loads(payload_of(SOURCE))
        document["critical"] = {**document["critical"], **change} if isinstance(change, dict) else change
        try:
            trust.verify_payload(json.dumps(document).encode(), SOURCE)
        except errors.InvalidInputError:
            return
        assert document["critical"]["image"]["docker-manifest-digest"] == SOURCE

    @given(st.binary(max_size=60))
    def test_any_bytes(self, payload: bytes) -> None:
        with pytest.raises(errors.InvalidInputError):
            trust.verify_payload(payload, SOURCE)
