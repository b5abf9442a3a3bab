"""Serves many adapters over one model, in the words of OpenAI's API: ``model`` names the adapter of a request.

    python examples/serve.py                                     # a tiny random model, on http://127.0.0.1:8000
    python examples/serve.py --model meta-llama/Llama-3.2-1B --adapters adapters --watch

Requests for different adapters, and for the base alone, are computed together. The guide is docs/guides/server.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import threading
from pathlib import Path

import torch
import uvicorn
from server.app import LOOPBACK, Server, Service, create
from server.engine import Engine, Limits
from server.folder import Folder
from server.metrics import Metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from mos_ext.serving import AdapterBank

DEFAULT = Limits()


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a name of the Hub or a folder; a tiny random model when left out")
    add("--name", help="what the model without an adapter is called in requests (default: the last part of --model)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", help="of the model: auto, float32, bfloat16, float16")
    add("--output", type=Path, default=Path("serve-output"), help="where the tiny model goes")
    add("--adapters", type=Path, help="the directory with a folder for each adapter, called as it is")
    add("--watch", action="store_true", help="follow what is added, replaced and removed there")
    add("--capacity", type=size, help="memory for adapters, as 2G; the least recently used make room (default: grow)")
    add("--target-parameters", nargs="*", default=(), help="names of expert weights that adapters may adapt")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--api-key-file", type=Path, help="the key that /v1 asks for (or the variable MOS_API_KEY; default: none)")
    add("--admin-token-file", type=Path, help="the token that changes adapters (or MOS_ADMIN_TOKEN; default: nobody)")
    add("--max-length", type=int, default=DEFAULT.length, help="tokens of a prompt and its answer")
    add("--max-new-tokens", type=int, default=DEFAULT.new_tokens, help="tokens of an answer")
    add("--max-sequences", type=int, default=DEFAULT.sequences, help="requests that are computed together")
    add("--max-queue", type=int, default=DEFAULT.queue, help="requests that wait; more get 429")
    add("--max-body", type=size, default=4 << 20, help="bytes of a request")
    add("--timeout", type=float, default=DEFAULT.seconds, help="seconds of a request")
    add("--room-timeout", type=float, default=DEFAULT.room, help="seconds to wait for memory for an adapter")
    add("--grace", type=float, default=30.0, help="seconds that requests have when the server is told to stop")
    return parser.parse_args(argv)


def size(text: str) -> int:
    """Bytes: 1500, 64K, 512M, 2G."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return int(text) if unit is None else int(float(text[:-1]) * unit)


def secret(file: Path | None, variable: str) -> str | None:
    """From a file, or else from the environment: a command line is there for all to see."""
    text = (file.read_text() if file is not None else os.environ.get(variable, "")).strip()
    if file is not None and not text:
        raise SystemExit(f"{file} must hold a secret, and is empty")
    return text or None


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    log = logging.getLogger("server")
    key, token = secret(options.api_key_file, "MOS_API_KEY"), secret(options.admin_token_file, "MOS_ADMIN_TOKEN")
    local = options.host in ("127.0.0.1", "localhost", "::1")
    if not local and key is None:
        log.warning("anybody who reaches %s may use the server: give it --api-key-file", options.host)
    path = options.model
    if path is None:
        from tiny import language_model

        path = language_model(options.output / "base")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=options.dtype).to(options.device)
    bank, metrics = (
        AdapterBank(model, capacity=options.capacity, target_parameters=options.target_parameters),
        Metrics(),
    )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or options.max_length
    limits = Limits(
        length=min(options.max_length, positions),
        new_tokens=options.max_new_tokens,
        sequences=options.max_sequences,
        queue=options.max_queue,
        seconds=options.timeout,
        room=options.room_timeout,
    )
    engine = Engine(model, AutoTokenizer.from_pretrained(path), bank, limits, metrics.observe)
    folder = None if options.adapters is None else Folder(options.adapters, bank, engine.changed)
    more = {"body_bytes": options.max_body, "hosts": LOOPBACK if local else None}
    service = Service(engine, metrics, options.name or Path(path).name, folder, key, token, **more)
    end = threading.Event()
    if folder is not None:
        folder.look(first=True)
        if options.watch:
            threading.Thread(target=folder.watch, args=(1.0, end), daemon=True).start()
    patience = int(options.grace) + 5
    config = uvicorn.Config(create(service), options.host, options.port, timeout_graceful_shutdown=patience)
    try:
        Server(config, engine, options.grace).run()
    finally:
        end.set()
        engine.close()
        bank.close()


if __name__ == "__main__":
    main()
