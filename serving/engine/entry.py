"""Starts vLLM's server in its own interpreter, on the supervisor's listening socket.

`python -m serving.engine.entry ARGUMENTS...`, by the plan of `kinds`. The socket is fetched from the
supervisor (`listener`). vLLM has no option for a socket that is open already, so the one function with which
it makes its socket is replaced. With that socket, the port belongs to the supervisor for as long as it lives:
nothing is refused while the engine starts, and connections that wait while it is respawned are served by
whoever comes next.

The `vllm` command is not used because it asks for the metadata of a distribution called vllm, which builds
for other devices do not have.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from typing import Any

from serving.engine import gate, listener

_LAUNCHER = "vllm.entrypoints.launchers.launcher"


def main(arguments: list[str]) -> None:
    """Serve until a signal; never returns before."""
    try:
        launcher = importlib.import_module(_LAUNCHER)
        serve = importlib.import_module("vllm.entrypoints.cli.serve")
        arguments_module = importlib.import_module("vllm.utils.argparse_utils")
        utilities = importlib.import_module("vllm.entrypoints.serve.utils.api_utils")
        log = importlib.import_module("vllm.logger")
        platforms = importlib.import_module("vllm.platforms")
    except ModuleNotFoundError as exc:
        what = "no vLLM" if exc.name == "vllm" else f"a vLLM without {exc.name}"
        sys.exit(f"{sys.executable} has {what}; name an interpreter with vLLM 0.32 (engine.python, --python)")

    try:
        given_socket = listener.fetch(os.environ[gate.RUN_DIRECTORY])
    except OSError as exc:
        sys.exit(f"{os.environ[gate.RUN_DIRECTORY]}: the supervisor's socket cannot be had: {exc}")

    def given(*_: Any, **__: Any) -> socket.socket:
        return given_socket.dup()

    if not hasattr(launcher, "create_server_socket"):
        sys.exit(f"{sys.executable}: this vLLM's {_LAUNCHER} makes its socket in another way; use vLLM 0.32")
    launcher.create_server_socket = given  # type: ignore[attr-defined]
    if platforms.current_platform.is_cpu():
        # What vLLM 0.32 saves of a CPU model ahead of time it cannot load ('function' object has no attribute
        # 'finalize_loading') and compiles again. Without it Inductor's own cache is used, which works.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    utilities.cli_env_setup()
    parser = arguments_module.FlexibleArgumentParser(description="vLLM")
    commands = parser.add_subparsers()
    command = serve.cmd_init()[0]
    command.subparser_init(commands).set_defaults(dispatch_function=command.cmd)
    parsed = parser.parse_args(["serve", *arguments])
    log.configure_logging_from_args(parsed)
    command.validate(parsed)
    command.cmd(parsed)


if __name__ == "__main__":
    main(sys.argv[1:])
