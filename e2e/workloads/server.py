"""A model server as vLLM is one: transformers and torch, a Llama from safetensors, HTTP; ready when /health
answers, which it does once the model has generated a token."""

from __future__ import annotations

from e2e.workloads import debian, files, torch, wheels
from e2e.workloads.recipe import Recipe

_PORT = 8000
_MODEL = "/opt/model"
_SERVING = (
    "tokenizers==0.22.1",
    "safetensors==0.7.0",
    "huggingface_hub==1.3.0",
    "regex==2025.11.3",
    "pyyaml==6.0.3",
    "tqdm==4.67.1",
    "packaging==25.0",
    "requests==2.32.5",
    "httpx==0.28.1",
    "httpcore==1.0.9",
    "anyio==4.11.0",
    "sniffio==1.3.1",
    "idna==3.11",
    "certifi==2025.10.5",
    "urllib3==2.5.0",
    "charset_normalizer==3.4.4",
    "typer-slim==0.20.0",
    "shellingham==1.5.4",
    "hf-xet==1.2.0",
    "uvicorn==0.38.0",
    "click==8.3.0",
    "h11==0.16.0",
)


RECIPE = Recipe(
    name="server",
    steps=(
        debian.Base(("python3",)),
        wheels.Wheels(torch.LIBRARIES),
        wheels.Wheels(torch.TORCH),
        wheels.Wheels(_SERVING),
        files.run("make_llama.py", _MODEL, title="a small Llama with random weights"),
        files.program("serve_llama.py", "srv/serve_llama.py"),
    ),
    command=("python3", "/srv/serve_llama.py", _MODEL, str(_PORT)),
    note="downloads about 320 MB, then builds for some minutes",
    url=f"http://127.0.0.1:{_PORT}/health",
)
