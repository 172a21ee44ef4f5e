"""The `glowplug` command: finds the verb, maps errors to exit codes.

Verbs are imported when they are called, so that `glowplug mount` does not pay for the converter.

Exit codes: 0 done; 1 a check found a difference, or the command run by `run` says so; 2 wrong usage;
3 invalid input; 4 not found; 5 denied; 6 integrity; 7 unavailable; 8 configuration; 9 busy; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
from typing import NoReturn

import click

from glowplug import subcommands, terminal
from imagefs import errors

VERBS = {
    "activator": "Hold requests while a service has no replica, until one is up.",
    "agent": "The node agent: containerd starts containers from block images.",
    "autoscale": "How many replicas an endpoint has, and why; policies compared.",
    "bench": "Measure how soon containers are ready on this machine.",
    "cache": "Show, pin, verify and tidy what the block cache holds.",
    "check": "Verify a block image's whole chain of digests, and its files against the source.",
    "convert": "Turn an OCI image into a block image.",
    "copy": "Move a source image with its block image to another registry.",
    "engine": "Run a model server, supervised, behind one port.",
    "endpoint": "Check, change and look at an endpoint that is served here.",
    "inspect": "Show a block image: layers, sizes, blocks, holes, what it shares.",
    "mount": "Mount an image's root filesystem, fetched lazily.",
    "operator": "Serve endpoints that are custom resources of a Kubernetes namespace.",
    "pack": "Give a block image a boot pack: what its start reads, in that order.",
    "prefetch": "Have an image on this node before anybody starts it.",
    "pull": "Make an image runnable in containerd without fetching its layers.",
    "router": "Tell Envoys what to route where, from a file or from Kubernetes.",
    "quantize": "Make an FP8 checkpoint of a model, and compare it with the original.",
    "run": "Run a command in an image, in namespaces of its own.",
    "serve": "Serve a model as one endpoint: replicas, Envoy, updates without downtime.",
    "status": "Show what is mounted, whether it works, what was fetched.",
    "top": "Watch the agent of this node: starts, images, bytes by source, events.",
    "trace": "Record what the start of an image reads, for its boot pack.",
    "umount": "Unmount what `mount` mounted.",
    "warmpool": "Hold nodes ready before they are needed.",
}

EXTRAS = {
    "imagefs": "to mount and run images",
    "agent": "on a node",
    "converter": "where images are converted",
    "serving": "where endpoints are served",
    "request-log": "where requests are sampled",
    "simulate": "where autoscaling policies are compared",
    "operator": "where endpoints are custom resources",
    "warmpool": "where nodes are held ready",
    "cluster": "for API servers that a kubeconfig names",
    "s3": "for buckets",
    "docker-daemon": "for images of a Docker daemon",
    "fuse-files": "for --mode fuse",
    "all": "for all of it",
}
"""What pip installs, and for what: a package that is missing is in one of them."""

_OURS = ["agent", "cluster", "converter", "documents", "glowplug", "imagefs", "pages", "serving", "warmpool"]
"""Packages that no pip can bring: one that is missing is a bug."""

_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (errors.InvalidInputError, 3),
    (errors.NotFoundError, 4),
    (errors.DeniedError, 5),
    (errors.IntegrityError, 6),
    (errors.UnavailableError, 7),
    (errors.ConfigurationError, 8),
    (errors.BusyError, 9),
    (OSError, 8),  # a full disk, a right that is missing: the machine's, and its message names the file
)


@click.group(
    cls=subcommands.Subcommands,
    texts=VERBS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="glowplug", prog_name="glowplug")
def cli() -> None:
    """Glowplug makes cold things start: container images that are fetched block by block, as they are read.

    REF is docker://HOST/REPO[:TAG], docker-daemon:NAME, docker-archive:FILE, oci:DIR[:TAG] or
    s3://BUCKET/PREFIX[:TAG]; @DIGEST instead of :TAG pins the image.
    """


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error of ours, None for a foreign one."""
    for kind, code in _EXIT_CODES:
        if isinstance(error, kind):
            return code
    # The converter's errors, without importing it where it was not used.
    module: types.ModuleType | None = sys.modules.get("converter.errors")
    if module is not None:
        if isinstance(error, module.LayerDigestError):
            return 6
        if isinstance(error, module.ConverterError):
            return 3
    serving: types.ModuleType | None = sys.modules.get("serving.errors")
    if serving is not None and isinstance(error, serving.ServingError):
        codes: tuple[tuple[type[Exception], int], ...] = (
            (serving.DocumentError, 3),
            (serving.NotFoundError, 4),
            (serving.UnavailableError, 7),
            (serving.ConflictError, 9),
        )
        return next((code for kind, code in codes if isinstance(error, kind)), 8)
    warmpool: types.ModuleType | None = sys.modules.get("warmpool.errors")
    if warmpool is not None and isinstance(error, warmpool.WarmPoolError):
        codes = (
            (warmpool.InvalidInputError, 3),
            (warmpool.NotFoundError, 4),
            (warmpool.UnavailableError, 7),
            (warmpool.ConflictError, 9),
        )
        return next((code for kind, code in codes if isinstance(error, kind)), 8)
    return None


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as exc:
        sys.exit(exc.exit_code)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("glowplug: interrupted", err=True)
        _leave(130)
    except ModuleNotFoundError as exc:
        missing = (exc.name or "").partition(".")[0]
        if missing in ("", *_OURS):
            raise
        choice = ", ".join(f"'glowplug[{extra}]' {purpose}" for extra, purpose in EXTRAS.items())
        click.echo(
            f"glowplug: this needs the Python package {missing!r}, which is not installed: "
            f"pip install {choice}",
            err=True,
        )
        sys.exit(8)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as exc:
        code = exit_code(exc)
        if code is None:
            raise  # a bug: whoever reports it needs the traceback
        message = "\n".join(map(terminal.printable, str(exc).split("\n")))
        click.echo(f"glowplug: {message}", err=True)
        _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit, without the threads that hang in an origin: Python would wait for them, and all that there was to
    clean up is cleaned up."""
    if any(not each.daemon for each in threading.enumerate() if each is not threading.main_thread()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _interrupt(signum: int, frame: types.FrameType | None) -> None:
    """SIGTERM cleans up as SIGINT does."""
    raise KeyboardInterrupt
