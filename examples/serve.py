"""Serves many adapters over one model, in the words of OpenAI's API: ``model`` names the adapter of a request.

    python examples/serve.py                                     # a tiny random model, on http://127.0.0.1:8000
    python examples/serve.py --model meta-llama/Llama-3.2-1B --adapters adapters --watch

Requests for different adapters, and for the base alone, are computed together. The guide is docs/guides/server.md.
"""

from __future__ import annotations

import logging

import uvicorn
from server.app import Server, create
from server.start import arguments, secret, serving


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    options = arguments(argv, __doc__)
    with serving(options, secret(options.admin_token_file, "MOS_ADMIN_TOKEN")) as service:
        patience = int(options.grace) + 5
        config = uvicorn.Config(create(service), options.host, options.port, timeout_graceful_shutdown=patience)
        Server(config, service.engine, options.grace).run()


if __name__ == "__main__":
    main()
