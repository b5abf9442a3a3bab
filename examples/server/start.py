"""From the command line to a service that runs."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mos_ext.serving import AdapterBank

from .app import LOOPBACK, Service
from .engine import Engine, Limits
from .folder import Folder
from .metrics import Metrics

DEFAULT = Limits()
log = logging.getLogger("server")


def arguments(argv: list[str] | None, about: str | None, **more: int) -> argparse.Namespace:
    """What a program that says this about itself is told; ``more`` are its own numbers, and what they usually are."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name, usual in more.items():
        add(f"--{name}", type=int, default=usual)
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
    options = parser.parse_args(argv)
    if options.adapters is not None and not options.adapters.is_dir():
        parser.error(f"--adapters must be a directory, got {str(options.adapters)!r}")
    if options.watch and options.adapters is None:
        parser.error("--watch must have --adapters, the directory to follow")
    if options.model is None:
        from tiny import language_model

        options.model = language_model(options.output / "base")
    options.name = options.name or Path(options.model).name
    return options


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


@contextlib.contextmanager
def serving(options: argparse.Namespace, admin_token: str | None = None) -> Iterator[Service]:
    """A service of these options; at the end its requests are."""
    key, local = secret(options.api_key_file, "MOS_API_KEY"), options.host in ("127.0.0.1", "localhost", "::1")
    if not local and key is None:
        log.warning("anybody who reaches %s may use the server: give it --api-key-file", options.host)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).to(options.device)
    bank = AdapterBank(model, capacity=options.capacity, target_parameters=options.target_parameters)
    metrics = Metrics(options.name)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or options.max_length
    limits = Limits(
        length=min(options.max_length, positions),
        new_tokens=options.max_new_tokens,
        sequences=options.max_sequences,
        queue=options.max_queue,
        seconds=options.timeout,
        room=options.room_timeout,
    )
    engine = Engine(model, AutoTokenizer.from_pretrained(options.model), bank, limits, metrics.observe)
    end = threading.Event()
    try:
        folder = None if options.adapters is None else Folder(options.adapters, bank, engine.changed)
        if folder is not None:
            folder.look(first=True)
        if options.watch:
            threading.Thread(target=folder.watch, args=(1.0, end), daemon=True).start()
        together = f"{limits.sequences} requests of {limits.length} tokens together"
        log.info("%s on %s, %d adapters: at most %s", options.name, model.device, len(bank.names), together)
        more = {"body_bytes": options.max_body, "hosts": LOOPBACK if local else None}
        yield Service(engine, metrics, options.name, folder, key, admin_token, **more)
    finally:
        end.set()
        engine.close()
        bank.close()
