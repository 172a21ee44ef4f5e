"""Functions compiled by numba, with the types that they were written with.

The cache of machine code is in `__pycache__` beside each module, so that only the first run after a change
compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(function: _F) -> _F:
    """Compile it at its first call. What a compiled function calls must be compiled, too."""
    return cast(_F, numba.njit(cache=True, error_model="numpy")(function))


def inlined(function: _F) -> _F:
    """The same for what is called in every event, where passing the arrays would take as long as the work."""
    return cast(_F, numba.njit(cache=True, error_model="numpy", forceinline=True)(function))
