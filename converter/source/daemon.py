"""Source images in a Docker daemon: saved by the Docker SDK into a docker-archive in the work directory.

The daemon has no random access and no uncompressed sizes, so the archive is spooled; whoever owns the work
directory removes it. $DOCKER_HOST and the other variables of the docker command name the daemon.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

from converter.limits import Limits
from converter.source import SourceImage, archive
from imagefs import errors, reference

_CHUNK_BYTES = 1 << 20


def open_image(ref: reference.Reference, work_dir: Path, limits: Limits) -> SourceImage:
    """See source.open_images."""
    image = archive.open_image(save(ref, work_dir), None, str(ref), limits)
    return dataclasses.replace(image, name=str(ref))


def save(ref: reference.Reference, work_dir: Path) -> Path:
    """The image as a docker-archive of its own in the work directory. NotFoundError, UnavailableError."""
    name = f"{ref.location}:{ref.tag}" if ref.tag else ref.digest or ref.location
    fd, file = tempfile.mkstemp(prefix="docker-daemon-", suffix=".tar", dir=work_dir)
    with open(fd, "wb") as out:
        _save(name, out.fileno(), str(ref))
    return Path(file)


def _save(name: str, fd: int, ref: str) -> None:
    try:
        import docker
        import docker.errors
        import requests.exceptions
    except ImportError as exc:
        raise errors.ConfigurationError(
            f"{ref}: docker-daemon: needs the Docker SDK: pip install 'glowplug[docker-daemon]'"
        ) from exc
    try:
        client = docker.from_env()
        try:
            for chunk in client.images.get(name).save(chunk_size=_CHUNK_BYTES):
                view = memoryview(chunk)
                while view:
                    view = view[os.write(fd, view) :]
        finally:
            client.close()
    except docker.errors.NotFound as exc:
        raise errors.NotFoundError(f"{ref}: the Docker daemon has no image {name!r}") from exc
    except (docker.errors.DockerException, requests.exceptions.RequestException) as exc:
        raise errors.UnavailableError(
            f"{ref}: the Docker daemon did not answer (DOCKER_HOST says where it is): {exc}"
        ) from exc
