"""OpenAI's requests and answers, as far as they go here: what is not supported is refused by name, never ignored."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from .engine import Ask, Refused


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None


class Generation(Body):
    """What both kinds of request have. The last group is accepted in the values that change nothing."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    user: str | None = None
    metadata: dict | None = None
    store: bool | None = None

    def ask(self, tokens: list[int], adapter: str | None, new_tokens: int) -> Ask:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in stops:
            raise Refused(400, "`stop` must have no empty string", "invalid_value", param="stop")
        return Ask(
            tokens=tokens,
            adapter=adapter,
            new_tokens=new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stops=tuple(stops),
        )


class Completion(Generation):
    """POST /v1/completions."""

    prompt: str | list[Annotated[int, Field(ge=0)]] | Annotated[list[str], Field(min_length=1, max_length=1)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    logprobs: None = None

    usual: ClassVar[int | None] = 16  # tokens where none are asked for; None takes what there is room for

    def tokens(self, tokenizer: Any) -> list[int]:
        text = self.prompt if isinstance(self.prompt, str) else next(iter(self.prompt), None)
        if isinstance(text, str):
            return list(tokenizer(text)["input_ids"])
        return self.prompt

    @property
    def wanted(self) -> int | None:
        return self.max_tokens


class TextPart(Body):
    type: Literal["text"]
    text: str


class ResponseFormat(Body):
    type: Literal["text"]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class Chat(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list, Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    response_format: ResponseFormat | None = None

    usual: ClassVar[int | None] = None

    def tokens(self, tokenizer: Any) -> list[int]:
        if not tokenizer.chat_template:
            raise Refused(400, "the model's tokenizer has no chat template: use /v1/completions", "no_chat_template")
        turns = []
        for message in self.messages:
            content = message.content
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            turns.append({"role": message.role, "content": text} | ({"name": message.name} if message.name else {}))
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])

    @property
    def wanted(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Adapter(Body):
    """POST /v1/adapters."""

    name: str
    directory: str | None = None  # the name, unless it says otherwise
    replace: bool = False
    pin: bool | None = None


class Answer:
    """One answer in OpenAI's words, whole or in pieces."""

    def __init__(self, body: Generation) -> None:
        self.chat, self.model = isinstance(body, Chat), body.model
        self.id, self.created = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex, int(time.time())

    def _with(self, kind: str, choices: list, **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}

    def whole(self, text: str, finish: str, usage: dict) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return self._with("chat.completion" if self.chat else "text_completion", [choice], usage=usage)

    def piece(self, text: str, finish: str | None, first: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self.chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if first or text else {})
        else:
            choice["text"] = text
        return self._with("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def usage(self, usage: dict) -> dict[str, Any]:
        """The last piece of a stream that asked for it."""
        return self._with("chat.completion.chunk" if self.chat else "text_completion", [], usage=usage)


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def error(refused: Refused) -> dict[str, Any]:
    """Its body."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}}


def invalid(errors: Sequence[Any]) -> Refused:
    """What pydantic found, said in one sentence about one field."""
    # Of a union's members the one that fits best is meant: it got furthest, or all but its length is right.
    found = max(errors, key=lambda one: (one["type"] in ("too_long", "too_short"), len(one["loc"])))
    name = ".".join(part for part in map(str, found["loc"][1:]) if part.isidentifier() and part != "str")
    if found["type"] == "json_invalid":
        return Refused(400, f"the body must be JSON: {found['msg']}", "invalid_json")
    if not name:
        rule = "the body must be a JSON object, sent with `Content-Type: application/json`"
        return Refused(400, rule, "invalid_value")
    if found["type"] == "extra_forbidden":
        return Refused(400, f"`{name}` is not supported by this server", "unsupported_parameter", param=name)
    if found["type"] == "missing":
        return Refused(400, f"`{name}` must be given", "missing_required_parameter", param=name)
    given = repr(found.get("input"))
    given = given if len(given) < 80 else given[:80] + "..."
    rule = found["msg"].replace("Input should be", "must be", 1).replace("None", "null", 1)
    rule = rule if rule.startswith("must") else f"is not valid: {rule}"
    return Refused(400, f"`{name}` {rule}, got {given}", "invalid_value", param=name.partition(".")[0])
