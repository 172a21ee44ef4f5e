"""What `glowplug pull` says to a real containerd, where things are not as they should be. That the image runs
afterwards is shown end to end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import containerd
from imagefs import artifact, errors
from tests.fixtures import containerd as daemons
from tests.fixtures import images

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def daemon() -> Iterator[daemons.Containerd]:
    """containerd 1.6 without our plugin."""
    with tempfile.TemporaryDirectory(prefix="gp-") as folder:
        with daemons.serve(
            daemons.binaries("1.6"), Path(folder), sandbox_image="none.invalid/pause:1", registries=[]
        ) as running:
            yield running


def image(name: str, chain_ids: tuple[str, ...] = ()) -> containerd.Image:
    made = images.make([])
    media_type, data = made.manifests[made.top]
    config = made.blobs[made.document["config"]["digest"]]
    return containerd.Image(name, (artifact.Manifest(media_type, made.top, data),), config, chain_ids)


def test_a_containerd_without_the_plugin_is_said_to_need_it(daemon: daemons.Containerd) -> None:
    with containerd.Containerd(daemon.socket, "default") as client:
        with pytest.raises(errors.ConfigurationError, match="agent install"):
            client.record(image("h/app:v1", ("sha256:" + "1" * 64,)))
    assert "h/app:v1" not in daemon.ctr("images", "ls", "-q")
    assert daemon.ctr("leases", "ls", "-q") == "", "the lease is given back"


def test_it_may_be_recorded_again_and_in_another_namespace(daemon: daemons.Containerd) -> None:
    for namespace in ("default", "default", "other"):
        with containerd.Containerd(daemon.socket, namespace) as client:
            client.record(image("h/again:v1"))
        assert "h/again:v1" in daemon.ctr("images", "ls", "-q", namespace=namespace)
        digest = image("").manifests[0].digest
        labels = daemon.ctr("content", "ls", namespace=namespace)
        assert digest in labels
        assert "containerd.io/gc.ref.content.config" in labels
    # containerd's own garbage collector finds the image whole.
    daemon.ctr("images", "rm", "--sync", "h/again:v1", namespace="other")
    assert digest in daemon.ctr("content", "ls")
    assert digest not in daemon.ctr("content", "ls", namespace="other")


def test_without_containerd_it_says_where_it_looked(tmp_path: Path) -> None:
    with containerd.Containerd(tmp_path / "none.sock", "default") as client:
        with pytest.raises(errors.UnavailableError, match=r"none\.sock.*--containerd-address"):
            client.record(image("h/app:v1"))
