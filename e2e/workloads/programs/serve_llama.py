"""Inside the `server` image: loads a checkpoint, generates one token, then listens.

    python3 serve_llama.py FOLDER PORT

GET /health answers 200, POST /generate continues the text that it is given. Ends with its standard input
where that is a pipe, as whoever started it holds.
"""

import asyncio
import os
import stat
import sys
import threading

print("python runs", flush=True)

import torch  # noqa: E402 - the line above is what a measurement sees first
import transformers  # noqa: E402
import uvicorn  # noqa: E402


class Application:
    """The ASGI application. `_generating` keeps the model to one request at a time."""

    def __init__(self, folder: str) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._generating = asyncio.Lock()

    def generate(self, text: str, tokens: int) -> str:
        """Text with `tokens` more tokens, the likeliest each."""
        inputs = self._tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            output = self._model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=1)
        return str(self._tokenizer.decode(output[0]))

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        """One request."""
        if scope["type"] != "http":
            return
        status, body = 404, b""
        if scope["path"] == "/health":
            status = 200
        elif scope["path"] == "/generate" and scope["method"] == "POST":
            text = (await receive())["body"].decode(errors="replace")
            async with self._generating:
                status, body = 200, (await asyncio.to_thread(self.generate, text, 16)).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Server(uvicorn.Server):
    """Says so when it listens."""

    async def startup(self, sockets=None) -> None:  # type: ignore[no-untyped-def]
        """As uvicorn does, and the ready line."""
        await super().startup(sockets)
        print("ready", self.config.port, flush=True)


def end_with_input() -> None:
    """Exit when nobody holds the other end of standard input any more."""
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Load, try, listen."""
    transformers.utils.logging.disable_progress_bar()
    application = Application(sys.argv[1])
    application.generate("def", 1)
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=end_with_input, daemon=True).start()
    config = uvicorn.Config(application, host="0.0.0.0", port=int(sys.argv[2]), log_level="warning")
    Server(config).run()


if __name__ == "__main__":
    main()
