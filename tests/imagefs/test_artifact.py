"""Block image manifests: round trips, what is refused, and the choice among candidates."""

import contextlib
import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import artifact, errors

digests = st.binary(min_size=32, max_size=32).map(lambda raw: "sha256:" + raw.hex())
sizes = st.integers(min_value=0, max_value=1 << 50)


@st.composite
def layers(draw: st.DrawFn) -> artifact.Layer:
    key, diff_id = draw(st.text(max_size=20)), draw(digests)
    annotations = {artifact.REUSE_KEY: key, artifact.DIFF_ID: diff_id}
    return artifact.Layer(
        artifact.Descriptor(artifact.MAP_MEDIA_TYPE, draw(digests), draw(sizes), annotations=annotations),
        artifact.Descriptor(artifact.BLOB_MEDIA_TYPE, draw(digests), draw(sizes)),
        key,
        diff_id,
    )


boot_packs = st.builds(
    artifact.BootPack,
    table=st.builds(artifact.Descriptor, st.just(artifact.PACK_TABLE_MEDIA_TYPE), digests, sizes),
    data=st.builds(artifact.Descriptor, st.just(artifact.PACK_DATA_MEDIA_TYPE), digests, sizes),
    generation=st.integers(1, artifact.MAX_GENERATION),
)
images = st.builds(
    artifact.BlockImage,
    subject=st.builds(artifact.Descriptor, st.just(artifact.OCI_MANIFEST), digests, sizes),
    config=st.builds(artifact.Descriptor, st.just(artifact.OCI_CONFIG), digests, sizes),
    layers=st.lists(layers(), max_size=4).map(tuple),
    boot_pack=st.none() | boot_packs,
)


@given(images)
def test_round_trip(image: artifact.BlockImage) -> None:
    data = artifact.encode(image)
    assert artifact.decode(data) == image
    assert artifact.encode(artifact.decode(data)) == data


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["artifactType", "layers", "subject", "config", "mediaType", "digest", "size", "x"]
                ),
                inner | st.just(artifact.ARTIFACT_TYPE),
                max_size=6,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_anything_is_decoded_or_refused(data: bytes) -> None:
    with contextlib.suppress(errors.InvalidInputError):
        artifact.decode(data)


@given(images, st.sampled_from(["subject", "config", "layers", "artifactType"]))
def test_a_missing_field_is_named(image: artifact.BlockImage, field: str) -> None:
    document = json.loads(artifact.encode(image))
    del document[field]
    with pytest.raises(errors.InvalidInputError, match=field):
        artifact.decode(json.dumps(document).encode())


def test_what_utf8_cannot_hold_is_refused() -> None:
    document = json.loads(b'{"mediaType": "\\ud800"}')
    with pytest.raises(errors.InvalidInputError, match="lone surrogate"):
        artifact.canonical_json(document)


def test_depth_bomb_is_refused() -> None:
    with pytest.raises(errors.InvalidInputError):
        artifact.decode(b"[" * 200_000)


@given(st.lists(digests, min_size=1, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order(names: list[str], rng: random.Random) -> None:
    own = [
        artifact.Descriptor(artifact.OCI_MANIFEST, d, 1, artifact_type=artifact.ARTIFACT_TYPE) for d in names
    ]
    foreign = [artifact.Descriptor(artifact.OCI_MANIFEST, "sha256:" + "0" * 64, 1, artifact_type="other")]
    first = artifact.choose(own + foreign)
    shuffled = own + foreign
    rng.shuffle(shuffled)
    assert first is not None
    assert first.artifact_type == artifact.ARTIFACT_TYPE
    assert artifact.choose(shuffled) == first
    assert artifact.choose(foreign) is None


@given(images, boot_packs)
def test_a_boot_pack_that_its_manifest_tells_wrongly(
    image: artifact.BlockImage, pack: artifact.BootPack
) -> None:
    document = json.loads(artifact.encode(dataclasses.replace(image, boot_pack=pack)))
    for change, message in (
        ({artifact.BOOT_PACK: "sha256:" + "0" * 63 + "x"}, "annotations say boot pack"),
        ({artifact.BOOT_PACK_GENERATION: "-1"}, "annotations say boot pack"),
        ({artifact.BOOT_PACK_GENERATION: "9" * 10}, "annotations say boot pack"),
    ):
        changed = {**document, "annotations": {**document["annotations"], **change}}
        with pytest.raises(errors.InvalidInputError, match=message):
            artifact.decode(json.dumps(changed).encode())
    for layers, message in (
        (document["layers"][:-2], "boot pack"),
        (document["layers"][:-1], "pairs"),
        ([*document["layers"][:-2], *reversed(document["layers"][-2:])], "is not a boot pack's table"),
    ):
        with pytest.raises(errors.InvalidInputError, match=message):
            artifact.decode(json.dumps({**document, "layers": layers}).encode())
    del document["annotations"]
    with pytest.raises(errors.InvalidInputError, match=r"not a \(map, blob\) pair"):
        artifact.decode(json.dumps(document).encode())


def candidate(digest: str, generation: str | None = None) -> artifact.Descriptor:
    annotations = {}
    if generation is not None:
        annotations = {artifact.BOOT_PACK: digest, artifact.BOOT_PACK_GENERATION: generation}
    return artifact.Descriptor(
        artifact.OCI_MANIFEST, digest, 1, artifact_type=artifact.ARTIFACT_TYPE, annotations=annotations
    )


def test_the_latest_boot_pack_counts() -> None:
    plain, other = candidate("sha256:" + "0" * 64), candidate("sha256:" + "1" * 64)
    malformed = candidate("sha256:" + "2" * 64, "³")
    first, second, third = (candidate(f"sha256:{n:064x}", generation) for n, generation in
                            ((3, "9"), (5, "10"), (4, "10")))  # fmt: skip
    ranked = [third, second, first, plain, other, malformed]
    for at in range(len(ranked) - 1):
        assert artifact.choose(reversed(ranked[at:])) == ranked[at]
    assert artifact.next_generation([]) == 1
    assert artifact.next_generation([plain, malformed]) == 1
    assert artifact.next_generation(ranked) == 11
    last = candidate("sha256:" + "6" * 64, str(artifact.MAX_GENERATION))
    assert artifact.next_generation([last]) == artifact.MAX_GENERATION
    foreign = dataclasses.replace(last, artifact_type="other")
    assert artifact.next_generation([foreign, first]) == 10


def test_reuse_key_tells_layers_apart() -> None:
    base = {
        "layout_version": 1,
        "diff_id": "sha256:" + "a" * 64,
        "chain_id": None,
        "block_bytes": 1 << 22,
        "frame_bytes": 1 << 22,
        "compression_level": 1,
        "libzstd_version": 10507,
    }
    keys = {artifact.reuse_key(**base)}
    for field, value in {
        "layout_version": 2,
        "diff_id": "sha256:" + "b" * 64,
        "chain_id": "sha256:" + "a" * 64,
        "block_bytes": 1 << 21,
        "frame_bytes": 1 << 16,
        "compression_level": 2,
        "libzstd_version": 10506,
    }.items():
        keys.add(artifact.reuse_key(**{**base, field: value}))
    assert len(keys) == 8
