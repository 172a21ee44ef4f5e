"""What containerd's configuration must say so that it uses our snapshotter, for each line from 1.6 on.

Pure: texts and parsed documents in, texts out. install.py writes them, doctor.py compares. The lines differ:

* 1.6 and 1.7 take files of version 2. A file that `imports` names replaces a plugin's whole section, so the
  keys of CRI are set in config.toml itself; everything of ours is there, marked (tomledit.py).
* 2.x takes version 3, and version 2 still. Imported files are merged key by key (arrays are replaced), if
  they are of the same version as config.toml: there, everything of ours is in a drop-in, and config.toml only
  gets the `imports` that it lacks. A drop-in of another version would make it lose config.toml's sections.
* 1.6 knows neither `exports` nor `capabilities` of a proxy plugin.

Mode "default": CRI uses our snapshotter for all pods. Mode "runtime-class": only pods whose RuntimeClass
names the handler `glowplug` do; needs a snapshotter per runtime, 1.7 or newer.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from agent import tomledit
from imagefs import errors

SNAPSHOTTER = "glowplug"
"""The name of our proxy plugin."""
HANDLER = "glowplug"
"""The runtime handler of mode "runtime-class"."""
DROP_IN = Path("conf.d/glowplug.toml")
"""Below the folder of config.toml."""

_CRI = "io.containerd.grpc.v1.cri"
_IMAGES = "io.containerd.cri.v1.images"
_RUNTIME = "io.containerd.cri.v1.runtime"
_TRANSFER = "io.containerd.transfer.v1.local"
_VERSION = re.compile(r"\bv?(\d+)\.(\d+)\.\d+")

Mode = Literal["default", "runtime-class"]


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """The agent as containerd should know it. `platform` is this machine's, "linux/amd64"."""

    socket: Path
    root: Path
    platform: str
    mode: Mode = "default"


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """config.toml and the drop-in as they should be; None where there should be no such file."""

    main: str
    drop_in: str | None


def line_of(version: str) -> tuple[int, int]:
    """The line that `containerd --version` names. ConfigurationError for one that we do not know."""
    match = _VERSION.search(version)
    if match is None:
        raise errors.ConfigurationError(f"containerd's version is not to be found in {version!r}")
    line = (int(match[1]), int(match[2]))
    if line < (1, 6):
        raise errors.ConfigurationError(
            f"containerd {line[0]}.{line[1]} cannot be used: 1.6 is the oldest line that can"
        )
    return line


def plan(line: tuple[int, int], main: str, where: Path, effective: Mapping[str, Any], wanted: Wanted) -> Plan:
    """How config.toml at `where`, now `main` ("" if there is none), and the drop-in beside it should read.
    `effective` is the parsed `containerd config dump` of the configuration without us: defaults, and what
    other files import. Repeating it changes nothing. ConfigurationError says what cannot be done."""
    main = tomledit.revert(main)
    document = tomledit.parse(main, str(where))
    dialect = _dialect(line, document, where)
    settings = _settings(line, dialect, document, effective, wanted)
    version: dict[str, Any] = (
        {} if document.get("version") == dialect or dialect == 1 else {"version": dialect}
    )
    if line < (2, 0):
        return Plan(tomledit.apply(main, {**version, **settings}, str(where)), None)
    drop_in = where.parent / DROP_IN
    imports = list(document.get("imports") or ())
    if not any(fnmatch.fnmatch(str(drop_in), str(_absolute(pattern, where))) for pattern in imports):
        version["imports"] = [*imports, str(drop_in)]
    text = tomledit.apply("", {"version": dialect, **settings}, str(drop_in))
    return Plan(tomledit.apply(main, version, str(where)), text)


def without(main: str) -> Plan:
    """The configuration without us."""
    return Plan(tomledit.revert(main), None)


def mode_of(effective: Mapping[str, Any]) -> Mode:
    """Which mode a configuration was made for."""
    plugins = (_table(effective, "plugins", name, "containerd", "runtimes") for name in (_CRI, _RUNTIME))
    return "runtime-class" if any(HANDLER in runtimes for runtimes in plugins) else "default"


def differences(line: tuple[int, int], effective: Mapping[str, Any], wanted: Wanted) -> list[str]:
    """What the dump of a running configuration lacks, as lines of text. Empty: containerd will use us."""
    dialect = 2 if line < (2, 0) else 3
    settings = _settings(line, dialect, effective, effective, wanted)
    if line < (1, 7):
        settings["proxy_plugins"][SNAPSHOTTER] = {
            key: settings["proxy_plugins"][SNAPSHOTTER][key] for key in ("type", "address")
        }
    return list(_lacking(settings, effective, ()))


# -- what is to be set -----------------------------------------------------------------------------------


def _dialect(line: tuple[int, int], document: Mapping[str, Any], where: Path) -> int:
    """The version that the files are written in: that of config.toml, as far as it can carry us."""
    version = document.get("version")
    if version is None and not document:
        return 2 if line < (2, 0) else 3
    version = 1 if version is None else version
    if version in (2, 3) and not (version == 3 and line < (2, 0)):
        return int(version)
    if version == 1 and line < (2, 0):
        if _cri_disabled(document):
            return 1
        if not {"plugins", "disabled_plugins", "required_plugins"} & set(document):
            return 2
    raise errors.ConfigurationError(
        f"{where} is of version {version}; containerd {line[0]}.{line[1]} and we need "
        f"version {2 if line < (2, 0) else 3}: `containerd --config {where} config migrate` writes it anew"
    )


def _settings(
    line: tuple[int, int],
    dialect: int,
    document: Mapping[str, Any],
    effective: Mapping[str, Any],
    wanted: Wanted,
) -> dict[str, Any]:
    """All that is to be set, as tables of this dialect. `document` is the file that they go into."""
    if wanted.mode == "runtime-class" and (line < (1, 7) or (line >= (2, 0) and dialect < 3)):
        raise errors.ConfigurationError(
            "a snapshotter for a RuntimeClass alone needs containerd 1.7, with a configuration of version 2, "
            "or 2.x, with version 3 (`containerd config migrate`)"
        )
    proxy: dict[str, Any] = {"type": "snapshot", "address": str(wanted.socket)}
    if line >= (1, 7):
        proxy["capabilities"] = ["remap-ids"]
        proxy["exports"] = {"root": str(wanted.root), "enable_remote_snapshot_annotations": "true"}
    settings: dict[str, Any] = {"proxy_plugins": {SNAPSHOTTER: proxy}}
    if not _cri_disabled(document):
        settings["plugins"] = (
            _cri_2(document, effective, wanted) if dialect < 3 else _cri_3(effective, wanted)
        )
    if line >= (2, 0):
        transfer = {"unpack_config": _unpack(effective, wanted.platform)}
        settings.setdefault("plugins", {})[_TRANSFER] = transfer
    return settings


def _cri_2(document: Mapping[str, Any], effective: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    containerd: dict[str, Any] = {"disable_snapshot_annotations": False}
    if wanted.mode == "default":
        containerd["snapshotter"] = SNAPSHOTTER
    else:
        containerd["discard_unpacked_layers"] = False
        found = _table(effective, "plugins", _CRI, "containerd")
        # The first runtime that a file names takes the place of all that are there by default.
        named = _table(document, "plugins", _CRI, "containerd", "runtimes")
        runtimes = _table(found, "runtimes")
        unnamed = {} if named else {name: _without_defaults(_table(runtimes, name)) for name in runtimes}
        containerd["runtimes"] = {**unnamed, HANDLER: _runtime(found)}
    return {_CRI: {"containerd": containerd}}


def _cri_3(effective: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    images: dict[str, Any] = {"disable_snapshot_annotations": False}
    if wanted.mode == "default":
        images["snapshotter"] = SNAPSHOTTER
        return {_IMAGES: images}
    # A layer that was unpacked for one snapshotter may be wanted by the other.
    images["discard_unpacked_layers"] = False
    images["runtime_platforms"] = {HANDLER: {"platform": wanted.platform, "snapshotter": SNAPSHOTTER}}
    runtime = _runtime(_table(effective, "plugins", _RUNTIME, "containerd"))
    return {_IMAGES: images, _RUNTIME: {"containerd": {"runtimes": {HANDLER: runtime}}}}


def _runtime(containerd: Mapping[str, Any]) -> dict[str, Any]:
    """The default runtime's settings, with our snapshotter."""
    name = str(containerd.get("default_runtime_name") or "runc")
    default = _table(containerd, "runtimes", name)
    return {"runtime_type": "io.containerd.runc.v2", **_without_defaults(default), "snapshotter": SNAPSHOTTER}


def _without_defaults(table: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is empty: it need not be written, and other lines do not know every key."""
    kept = {
        key: _without_defaults(value) if isinstance(value, Mapping) else value for key, value in table.items()
    }
    return {key: value for key, value in kept.items() if value}


def _unpack(effective: Mapping[str, Any], platform: str) -> list[dict[str, Any]]:
    """For which snapshotters the transfer service unpacks. Ours is added behind those that are there: the
    first is what a pull takes that names none."""
    found = _table(effective, "plugins", _TRANSFER).get("unpack_config") or []
    entries = [_without_defaults(each) for each in found if isinstance(each, Mapping)]
    others = [each for each in entries if each.get("snapshotter") != SNAPSHOTTER]
    if not others:
        others = [{"platform": platform, "snapshotter": "overlayfs", "differ": "walking"}]
    return [*others, {"platform": platform, "snapshotter": SNAPSHOTTER, "differ": "walking"}]


# -- documents -------------------------------------------------------------------------------------------


def _cri_disabled(document: Mapping[str, Any]) -> bool:
    """Docker's packages ship containerd so: no kubelet on such a host."""
    disabled = document.get("disabled_plugins") or ()
    return bool({"cri", _CRI, _IMAGES, _RUNTIME} & set(disabled))


def _table(document: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    found: Any = document
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _lacking(wanted: Mapping[str, Any], found: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lacking = []
    for key, value in wanted.items():
        place = (*path, key)
        there = found.get(key)
        if isinstance(value, Mapping):
            lacking += _lacking(value, there if isinstance(there, Mapping) else {}, place)
        elif isinstance(value, list) and isinstance(there, list):
            missing = [each for each in value if not any(_covers(other, each) for other in there)]
            lacking += [f"{'.'.join(place)} lacks {each}" for each in missing]
        elif there != value:
            lacking.append(f"{'.'.join(place)} is {there!r} instead of {value!r}")
    return lacking


def _covers(found: object, wanted: object) -> bool:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return all(found.get(key) == value for key, value in wanted.items())
    return found == wanted


def _absolute(pattern: object, where: Path) -> Path:
    return where.parent / str(pattern)
