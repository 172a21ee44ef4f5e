"""Run while an image is built: a tree of Python packages, with compiled files, as a monorepo's image has it.

    python3 make_monorepo.py FOLDER FILES

FOLDER/teamNN/serviceNN/moduleNN.py, half of FILES; the other half are their .pyc. Sizes are those of ordinary
modules: most are a few kilobytes, some ten times that. Each module imports up to three of its own service.
"""

import compileall
import pathlib
import random
import sys

MODULES = 50
SERVICES = 20


def words(rng: random.Random) -> str:
    """An identifier."""
    return "_".join("".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(3, 8))) for _ in range(2))


def function(rng: random.Random) -> str:
    """A function, four to ten lines."""
    names = [words(rng) for _ in range(rng.randint(2, 6))]
    lines = [
        f"def {words(rng)}({', '.join(dict.fromkeys(names))}):",
        f'    """{" ".join(names)}: {words(rng)}."""',
    ]
    lines += [f"    {name} = ({name}, {rng.randint(0, 10**6)}, {words(rng)!r})" for name in names]
    return "\n".join([*lines, f"    return {names[0]}"])


def module(rng: random.Random, number: int) -> str:
    """The text of a module."""
    earlier = sorted(rng.sample(range(number), min(number, 3)))
    imports = [f"from . import module{each:02}" for each in earlier]
    size = rng.choices([1, 4, 12, 60], weights=[20, 50, 25, 5])[0]
    return (
        "\n\n".join(["\n".join([f'"""{words(rng)}."""', *imports]), *(function(rng) for _ in range(size))])
        + "\n"
    )


def main() -> None:
    """Write FOLDER."""
    root, count = pathlib.Path(sys.argv[1]), int(sys.argv[2]) // 2
    rng = random.Random(0)
    written = team = 0
    while written < count:
        for service in range(SERVICES):
            folder = root / f"team{team:02}" / f"service{service:02}"
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text(f'"""{words(rng)}."""\n')
            for number in range(MODULES):
                (folder / f"module{number:02}.py").write_text(module(rng, number))
            written += MODULES + 1
            if written >= count:
                break
        team += 1
    if not compileall.compile_dir(root, quiet=1, workers=0):
        sys.exit("a module does not compile")


if __name__ == "__main__":
    main()
