"""PyTorch: 1.2 GB, of which an import reads a fifth. The workload that the README's figures are about."""

from __future__ import annotations

from e2e.workloads import debian, imports, wheels
from e2e.workloads.recipe import Recipe

LIBRARIES = (
    "numpy==2.3.4",
    "filelock==3.20.0",
    "fsspec==2025.10.0",
    "jinja2==3.1.6",
    "markupsafe==3.0.3",
    "mpmath==1.3.0",
    "networkx==3.5",
    "sympy==1.14.0",
    "typing_extensions==4.15.0",
    "setuptools==80.9.0",
)
TORCH = ("torch==2.13.0", "transformers==5.0.0")

RECIPE = Recipe(
    name="torch",
    steps=(debian.Base(("python3",)), wheels.Wheels(LIBRARIES), wheels.Wheels(TORCH)),
    command=imports.command(
        "import torch; value = float(torch.ones(64, 64).matmul(torch.ones(64, 64)).sum())"
    ),
    note="downloads about 300 MB, then builds for some minutes",
)
