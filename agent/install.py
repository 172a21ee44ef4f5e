"""Making the agent part of a host: settings, units, containerd's configuration.

Called by `glowplug agent install`, on its thread, as root, on the host itself (a DaemonSet enters the host's
namespaces first). Everything may be repeated: what is as it should be is not touched, and containerd is
restarted only when its configuration changed. If any step fails, every file is as it was before, containerd
runs with its old configuration, and the error says which step and why.

    settings -> units -> keeper, agent -> containerd's files, read back by its own `config dump`
    -> for 1.6, a link from where it says that our images lie
    -> containerd restarted -> asked whether it reaches the agent, and whether kubelet still reaches it
"""

from __future__ import annotations

import difflib
import importlib.resources
import os
from pathlib import Path

from agent import config, containerdconfig, containerdprobe, daemon, host, hostfiles
from agent.host import Change, Host
from imagefs import errors

_DEFAULT_SETTINGS = """\
# Settings of the Glowplug agent. What is not here has its default; docs/agent.md has the list.
"""


def install(change: Change, mode: containerdconfig.Mode) -> None:
    """See the module."""
    text, settings = _settings(change.host)
    line, plan, wanted = _plan(change.host, settings, mode)
    with change.undone_on_failure():
        if change.files.write(change.host.settings_file, text, 0o600):
            change.say(f"wrote {change.host.settings_file}")
        new = not (change.host.place(host.UNIT_DIRECTORY) / host.AGENT_UNIT).exists()
        for path, unit in _units(change.host).items():
            if change.files.write(path, unit):
                change.say(f"wrote {path}")
        if change.restart:
            _start_agent(change, settings, new=new)
        changed = _write_containerd(change, line, plan, wanted)
        if line < (1, 7):
            _link_image_filesystem(change, settings)
        if change.restart:
            _have_containerd_reach_us(change, changed)
    change.say("installed" if change.restart else "written; nothing was restarted")


def preview(place: Host, mode: containerdconfig.Mode) -> str:
    """What `install` would change, as a unified diff of each file; nothing is written."""
    text, settings = _settings(place)
    _, plan, _ = _plan(place, settings, mode)
    files = {
        place.settings_file: text,
        **_units(place),
        place.drop_in: plan.drop_in,
        place.containerd_config: plan.main,
    }
    return "".join(_difference(path, wanted) for path, wanted in files.items())


def platform() -> str:
    """This machine's, in OCI's words."""
    machine = os.uname().machine
    return f"linux/{ ({'x86_64': 'amd64', 'aarch64': 'arm64'}.get(machine, machine)) }"


# -- steps -----------------------------------------------------------------------------------------------


def _settings(place: Host) -> tuple[str, config.Settings]:
    """The settings' text, which may be new, and what it says."""
    path = place.settings_source or place.settings_file
    if place.settings_source is None and not path.exists():
        return _DEFAULT_SETTINGS, config.Settings()
    return path.read_text(), config.load(path)


def _plan(
    place: Host, settings: config.Settings, mode: containerdconfig.Mode
) -> tuple[tuple[int, int], containerdconfig.Plan, containerdconfig.Wanted]:
    line = containerdprobe.line(place.containerd)
    effective = containerdprobe.effective(place.containerd, place.containerd_config)
    wanted = containerdconfig.Wanted(settings.socket, settings.root, platform(), mode)
    main = hostfiles.text(place.containerd_config)
    return line, containerdconfig.plan(line, main, place.containerd_config, effective, wanted), wanted


def _units(place: Host) -> dict[Path, str]:
    folder = importlib.resources.files("agent") / "units"
    texts = {}
    for name in (host.KEEPER_UNIT, host.AGENT_UNIT):
        text = (folder / name).read_text().replace(host.UNIT_PROGRAM, str(place.program))
        texts[place.place(host.UNIT_DIRECTORY) / name] = text.replace(
            str(config.DEFAULT_FILE), str(place.settings_file)
        )
    return texts


def _start_agent(change: Change, settings: config.Settings, *, new: bool) -> None:
    if new:
        change.stop_if_undone(host.AGENT_UNIT, host.KEEPER_UNIT)
    change.services("daemon-reload")
    change.services("enable", host.KEEPER_UNIT, host.AGENT_UNIT)
    change.services("start", host.KEEPER_UNIT)
    # Also when nothing changed: behind the same path there may be another version by now.
    if not new and daemon.hand_over(settings):
        change.say("the device server is this version's; containers read on")
    change.services("restart", host.AGENT_UNIT)
    host.wait(f"the agent does not serve {settings.socket}", lambda: _not_there(settings.socket))
    change.say(f"the agent serves {settings.socket}")


def _not_there(socket: Path) -> str | None:
    if containerdprobe.unfinished_snapshots(socket) is None:
        return f"nobody answers there; `journalctl -u {host.AGENT_UNIT}` says why"
    return None


def _write_containerd(
    change: Change, line: tuple[int, int], plan: containerdconfig.Plan, wanted: containerdconfig.Wanted
) -> bool:
    place, changed = change.host, False
    if plan.main != hostfiles.text(place.containerd_config):
        copy = hostfiles.keep_copy(place.containerd_config, host.COPY_SUFFIX)
        changed = change.files.write(place.containerd_config, plan.main)
        change.say(f"changed {place.containerd_config}" + (f"; as it was: {copy}" if copy else ""))
    if plan.drop_in is None:
        changed |= change.files.remove(place.drop_in)
    elif change.files.write(place.drop_in, plan.drop_in):
        changed = True
        change.say(f"wrote {place.drop_in}")
    effective = containerdprobe.effective(place.containerd, place.containerd_config)
    lacking = containerdconfig.differences(line, effective, wanted)
    if lacking:
        raise errors.ConfigurationError(
            "containerd does not take these from its files; another one that it imports may say otherwise: "
            + "; ".join(lacking)
        )
    return changed


def _link_image_filesystem(change: Change, settings: config.Settings) -> None:
    """Else kubelet fails to find the filesystem of the images, and neither reports nor collects any."""
    effective = containerdprobe.effective(change.host.containerd, change.host.containerd_config)
    link = containerdprobe.image_filesystem(effective)
    if not os.path.lexists(link):
        link.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        link.symlink_to(settings.root)
        change.say(f"made {link}, where kubelet looks for the filesystem of the images")


def _have_containerd_reach_us(change: Change, changed: bool) -> None:
    effective = containerdprobe.effective(change.host.containerd, change.host.containerd_config)
    socket = containerdprobe.socket_of(effective)
    if changed or containerdprobe.knows_us(socket) is not None:
        change.restart_containerd(containerdprobe.reaches_us)
        change.say("containerd was restarted, and reaches the agent")
    else:
        # Its connection to the agent that was restarted comes back within seconds; until then calls fail.
        host.wait("containerd does not reach the agent", lambda: containerdprobe.reaches_us(socket))


def _difference(path: Path, text: str | None) -> str:
    before, after = hostfiles.text(path), text or ""
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), str(path), str(path)
    )
    return "".join(lines)
