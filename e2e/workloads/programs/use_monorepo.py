"""Inside the `files100k` image: starts as a service in a monorepo does.

    python3 use_monorepo.py FOLDER

Looks for plugins (every tenth service is listed and its files looked at), and imports 600 modules of a dozen
services. Ends with its standard input.
"""

import importlib
import os
import sys


def main() -> None:
    """Look, import, say so."""
    root = sys.argv[1]
    print("python runs", flush=True)
    services = sorted(
        os.path.join(team.name, each.name) for team in os.scandir(root) for each in os.scandir(team)
    )
    seen = 0
    for service in services[::10]:
        for entry in os.scandir(os.path.join(root, service)):
            seen += entry.stat().st_size > 0
    sys.path.insert(0, root)
    imported = 0
    for service in services[:: len(services) // 12][:12]:
        package = service.replace("/", ".")
        for number in range(50):
            importlib.import_module(f"{package}.module{number:02}")
            imported += 1
    print("ready", seen, imported, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
