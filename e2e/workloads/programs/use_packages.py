"""Inside the `layers70` image: imports one module of each layer, as a web service would.

    python3 use_packages.py MODULE...

Ends with its standard input.
"""

import importlib
import sys


def main() -> None:
    """Import, say so."""
    print("python runs", flush=True)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    print("ready", len(sys.argv) - 1, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
