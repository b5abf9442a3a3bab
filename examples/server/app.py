"""The server's HTTP: OpenAI's endpoints, the adapters' own, what watches a server, and a page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from mos_ext.serving import AdapterBank, BankFull

from . import protocol
from .engine import Ask, Engine, Job, Piece, Refused, unknown
from .folder import Folder
from .metrics import Metrics

PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Service:
    """What the app serves, and who may ask. ``hosts`` None takes every Host header."""

    engine: Engine
    metrics: Metrics
    base: str  # what the model without an adapter is called
    folder: Folder | None = None
    api_key: str | None = None
    admin_token: str | None = None  # without one, adapters cannot be added or removed
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    hosts: tuple[str, ...] | None = LOOPBACK
    headers: Mapping[str, str] = field(default_factory=dict)  # of every answer, besides HEADERS

    @property
    def bank(self) -> AdapterBank | None:
        return self.engine.bank

    def knows(self, name: str) -> bool:
        return name == self.base or (self.bank is not None and name in self.bank)


class Running:
    """A request in the engine, as the event loop sees it; given up when its client goes, or nobody wants more."""

    def __init__(self, service: Service, request: Request, body: protocol.Completion | protocol.Chat) -> None:
        self._service, self._engine, self._request, self._body = service, service.engine, request, body
        self._answer = protocol.Answer(body)
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._watch: asyncio.Task | None = None
        self._job: Job | None = None
        self._over = False

    async def whole(self) -> dict[str, Any]:
        """All of the answer; Refused."""
        try:
            piece = await self._start()
            text = piece.text
            while not piece.last:
                piece = await self._next()
                text += piece.text
        except Refused as refused:
            self._close(refused.status)
            raise
        else:
            self._close(200)
            return self._answer.whole(text, piece.finish, self._usage)
        finally:
            self._close(499)

    async def streamed(self) -> AsyncIterator[str]:
        """The events of the answer. The first is waited for: Refused is for those who have no headers yet."""
        try:
            piece = await self._start()
        except BaseException as error:
            self._close(error.status if isinstance(error, Refused) else 499)
            raise
        return self._events(piece)

    async def _events(self, piece: Piece) -> AsyncIterator[str]:
        options, first = self._body.stream_options, True
        try:
            while True:
                yield protocol.event(self._answer.piece(piece.text, piece.finish, first))
                if piece.last:
                    break
                first, piece = False, await self._next()
            if options is not None and options.include_usage:
                yield protocol.event(self._answer.usage(self._usage))
            self._close(200)
        except Refused as refused:  # after the headers: an event that clients know
            self._close(refused.status)
            yield protocol.event(protocol.error(refused))
        else:
            yield "data: [DONE]\n\n"
        finally:
            self._close(499)

    async def _start(self) -> Piece:
        """Makes the request in a thread, and waits for its first piece."""
        loop = asyncio.get_running_loop()

        def deliver(piece: Piece) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        submitting = asyncio.ensure_future(asyncio.to_thread(lambda: self._engine.submit(self._ask(), deliver)))
        try:
            self._job = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(lambda done: done.exception() or self._engine.cancel(done.result()))
            raise
        self._watch = asyncio.create_task(self._until_gone())
        return await self._next()

    def _ask(self) -> Ask:
        body, limits, base = self._body, self._engine.limits, self._service.base
        if not self._service.knows(body.model):
            raise unknown(body.model)
        try:
            tokens = body.tokens(self._engine.tokenizer)
        except Refused:
            raise
        except Exception as error:  # of a template that wants other roles, of text that is no Unicode
            raise Refused(400, f"the prompt is not what the tokenizer takes: {error}", "invalid_prompt") from None
        left = max(1, min(limits.new_tokens, limits.length - len(tokens)))
        return body.ask(
            tokens, None if body.model == base else body.model, body.wanted or min(body.usual or left, left)
        )

    async def _next(self) -> Piece:
        piece = await self._pieces.get()
        if piece.error is not None:
            raise piece.error
        return piece

    async def _until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._close(499)

    def _close(self, status: int) -> None:
        """It is over, and counted; the first word on how is the last."""
        if self._over:
            return
        self._over = True
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()
        if self._job is not None:
            self._engine.cancel(self._job)
        self._service.metrics.count(self._body.model if self._service.knows(self._body.model) else "", status)

    @property
    def _usage(self) -> dict[str, int]:
        return protocol.usage(len(self._job.ask.tokens), len(self._job.out))


class Guard:
    """Around the app: whom it talks to, how much it reads, and headers of every answer."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                headers = {**HEADERS, **self.service.headers}
                own = [(n.encode(), v.encode()) for n, v in headers.items() if n.encode() not in given]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        try:
            self._check_host(host)
            body = await asyncio.wait_for(self._body(receive), self.service.body_seconds)
        except Refused as refused:
            await answer(refused)(scope, receive, guarded)
            return
        except asyncio.TimeoutError:
            await answer(Refused(408, "the body took too long", "timeout"))(scope, receive, guarded)
            return
        if body is None:
            return
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def received() -> Any:
            return next(parts, None) or await receive()

        await self.app(scope, received, guarded)

    def _check_host(self, host: str) -> None:
        """A page elsewhere whose name leads to this machine is none of ours."""
        if self.service.hosts is not None and re.sub(r":\d+$", "", host) not in self.service.hosts:
            raise Refused(421, f"the host must be one of {', '.join(self.service.hosts)}", "wrong_host")

    async def _body(self, receive: Any) -> bytes | None:
        """The whole of it, None when the client has gone."""
        limit, body, more = self.service.body_bytes, bytearray(), True
        while more and len(body) <= limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > limit:
            raise Refused(413, f"the body must be at most {limit} bytes", "body_too_large")
        return bytes(body)


def answer(refused: Refused) -> JSONResponse:
    """An error's."""
    headers = {} if refused.retry is None else {"retry-after": str(refused.retry)}
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(protocol.error(refused), refused.status, headers)


def bearer(token: str | None, request: Request) -> None:
    """401 unless the request brings the token, compared in a time that says nothing of it."""
    given = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise Refused(401, "the Authorization header must bring the right bearer token", "invalid_api_key")


def page_policy(page: str) -> str:
    """The content security policy of a page: its own script and style, by their hashes, and its own server."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in found)

    own = f"script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def create(service: Service) -> FastAPI:
    """The app of a service."""
    engine, bank, folder, metrics = service.engine, service.bank, service.folder, service.metrics
    app = FastAPI(title="mos_ext", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, service=service)

    def key(request: Request) -> None:
        bearer(service.api_key, request)

    def admin(request: Request) -> None:
        if folder is None or service.admin_token is None:
            why = "with a folder of adapters and a token"
            raise Refused(404, f"adapters can be changed here only where the server was started {why}", "not_enabled")
        bearer(service.admin_token, request)

    private, changing = [Depends(key)], [Depends(admin)]

    # ------------------------------------------------------------------------------------------ errors

    @app.exception_handler(Refused)
    async def on_refused(request: Request, refused: Refused) -> Response:
        return answer(refused)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(protocol.invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path} is not served: {error.detail}"
        response = answer(Refused(error.status_code, what, "http_error"))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> Response:
        return answer(Refused(500, "the server failed; its log says how", "internal_error"))

    # ------------------------------------------------------------------------------------------ models

    def model_of(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "mos_ext"} | (
            {} if name == service.base else {"parent": service.base}
        )

    @app.get("/v1/models", dependencies=private)
    def models() -> Any:
        names = (service.base, *(bank.names if bank is not None else ()))
        return {"object": "list", "data": [model_of(name) for name in names]}

    @app.get("/v1/models/{name:path}", dependencies=private)
    def model(name: str) -> Any:
        if not service.knows(name):
            raise unknown(name)
        return model_of(name)

    # ------------------------------------------------------------------------------------------ generation

    async def generate(request: Request, body: protocol.Completion | protocol.Chat) -> Response:
        running = Running(service, request, body)
        if body.stream:
            return StreamingResponse(await running.streamed(), media_type="text/event-stream")
        return JSONResponse(await running.whole())

    @app.post("/v1/completions", dependencies=private)
    async def completions(request: Request, body: protocol.Completion) -> Response:
        return await generate(request, body)

    @app.post("/v1/chat/completions", dependencies=private)
    async def chat(request: Request, body: protocol.Chat) -> Response:
        return await generate(request, body)

    # ------------------------------------------------------------------------------------------ adapters

    @app.get("/v1/adapters", dependencies=private)
    def adapters() -> Any:
        """What the page shows."""
        report, requests = None if bank is None else bank.report(), engine.requests()
        members = () if report is None else report.adapters
        return {
            "object": "list",
            "base": service.base,
            "data": [{**asdict(member), "requests": requests[member.name]} for member in members],
            "memory": {
                "used": 0 if report is None else report.used,
                "capacity": None if report is None else report.capacity,
                "evictions": 0 if report is None else report.evictions,
                "cache": engine.cache.bytes,
            },
            "requests": {"active": engine.active, "rows": engine.limits.sequences, "waiting": engine.waiting},
            "answered": metrics.answered(),
        }

    @app.post("/v1/adapters", dependencies=changing, status_code=201)
    def put_adapter(body: protocol.Adapter) -> Any:
        if body.name == service.base or (body.name in bank and not body.replace):
            raise Refused(409, f"`name` must be new, or `replace` true, got {body.name!r}", "name_taken", param="name")
        try:
            folder.put(body.name, body.directory or body.name, body.replace)
            if body.pin is not None:
                (bank.pin if body.pin else bank.unpin)(body.name)
        except FileNotFoundError as error:
            raise Refused(404, str(error), "no_such_adapter", param="directory") from None
        except BankFull as error:
            raise Refused(507, str(error), "bank_full") from None
        except (ValueError, TypeError, OSError) as error:
            raise Refused(400, str(error), "invalid_adapter") from None
        return model_of(body.name)

    @app.delete("/v1/adapters/{name}", dependencies=changing)
    def remove_adapter(name: str) -> Any:
        try:
            folder.remove(name)
        except ValueError:
            raise unknown(name) from None
        return {"id": name, "object": "model", "deleted": True}

    # ------------------------------------------------------------------------------------------ watching it

    @app.get("/health")
    def health() -> Response:
        return Response("ok" if engine.alive else "the engine has died", 200 if engine.alive else 503)

    @app.get("/ready")
    def ready() -> Response:
        return Response("ok" if engine.ready else "no new requests", 200 if engine.ready else 503)

    @app.get("/metrics")
    def scrape() -> Response:
        return Response(metrics.text(engine, bank), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    def page() -> Response:
        return HTMLResponse(PAGE, headers={"content-security-policy": page_policy(PAGE)})

    return app


class Server(uvicorn.Server):
    """Takes nothing new after a signal, finishes what runs, and returns; a second signal does not wait."""

    def __init__(self, config: uvicorn.Config, engine: Engine, seconds: float) -> None:
        super().__init__(config)
        self._engine, self._seconds = engine, seconds

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit, self.should_exit = self.should_exit, True
        self._engine.drain(self._seconds)
