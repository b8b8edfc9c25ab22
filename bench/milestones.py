"""A worker's program that tells when it got how far, for bench/starts.py.

Each line on stdout is a milestone and the seconds of CLOCK_MONOTONIC, which all processes of a machine share.

serve PORT [small]: a FastAPI app whose health check needs nothing heavy; once it serves, a thread imports torch and has
    a small Llama model, built in memory, answer on the CPU. `small` takes pygments for torch and numpy for the model.
watch PORT [PATH]: tells when an HTTP server first answers on loopback.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback


def tell(milestone: str) -> None:
    """Print a milestone and the time, at once and whole."""
    os.write(1, f"{milestone} {time.monotonic():.4f}\n".encode())


def model(small: bool) -> None:
    """Import and compute what a worker is there for."""
    if small:
        import pygments.lexers.python as heavy

        tell("imported")
        assert heavy.PythonLexer().name == "Python"
    else:
        import torch

        tell("imported")
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        given = torch.tensor([[1, 5, 9]])
        answer = (
            LlamaForCausalLM(config)
            .eval()
            .generate(
                given,
                attention_mask=torch.ones_like(given),
                min_new_tokens=4,
                max_new_tokens=4,
                do_sample=False,
                pad_token_id=0,
            )
        )
        assert answer.shape == (1, 7), answer.shape
    tell("answered")


def _model_or_end(small: bool) -> None:
    """A worker whose model fails is of no use: whoever waits for the milestone sees it end."""
    try:
        model(small)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def serve(port: int, small: bool) -> None:
    """Serve until somebody ends this."""
    import contextlib
    from collections.abc import AsyncIterator

    import fastapi
    import uvicorn

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        # When it serves: the health check is what a platform asks for first.
        threading.Timer(
            0.05, lambda: threading.Thread(target=_model_or_end, args=(small,), daemon=True).start()
        ).start()
        yield

    app = fastapi.FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, bool]:
        return {"ok": True}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def watch(port: int, path: str = "/health") -> None:
    """Ask every 10 ms until there is an answer."""
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(request)
                if connection.recv(5).startswith(b"HTTP/"):
                    tell("healthy")
                    return
        except OSError:
            pass
        time.sleep(0.01)


def main() -> None:
    """Do what the first word says."""
    what, port, *more = sys.argv[1:]
    if what == "watch":
        watch(int(port), *more)
        return
    tell("first")
    if what == "runpod":
        import runpod

        sys.argv = [sys.argv[0], "--rp_serve_api", f"--rp_api_port={port}"]
        runpod.serverless.start({"handler": lambda job: job["input"]})
    else:
        serve(int(port), more == ["small"])


if __name__ == "__main__":
    main()
