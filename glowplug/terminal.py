"""What verbs that print tables share: harmless texts, and sizes and times in the unit that fits."""

from __future__ import annotations


def printable(text: str) -> str:
    """What an image or a registry put into a line: it must not drive the terminal, nor end the line."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def size(count: int) -> str:
    """Bytes for people: three digits and a binary unit."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} TiB"


def duration(seconds: float) -> str:
    """Rounded, in the unit that fits: 12 s, 3 min, 5 h, 2 d."""
    for unit, length, until in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < until:
            return f"{max(0.0, seconds) / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
