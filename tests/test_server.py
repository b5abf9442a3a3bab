"""The server of examples/: every request gets what it gets alone, whoever comes, goes, or misbehaves beside it."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from concurrent.futures import Future
from pathlib import Path

import httpx
import openai
import peft
import pytest
import torch
import uvicorn
from models import gpt2, llama, moe, transformers

import mos_ext
from mos_ext.serving import AdapterBank

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import tiny  # noqa: E402
from server import start  # noqa: E402
from server.app import Server, Service, create, page_policy  # noqa: E402
from server.cache import Slots, Unservable, check, rehearse  # noqa: E402
from server.engine import Ask, Engine, Limits, Refused  # noqa: E402
from server.folder import Folder  # noqa: E402
from server.metrics import Metrics  # noqa: E402
from server.text import Text  # noqa: E402

DEADLINE = 60  # seconds that nothing here takes
TOKEN, KEY = "a token", "a key"
NAMES = ("red", "green", "lora")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_adapter(base, folder, seed, r=5, lora=False, scale=0.3):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = mos_ext.adapt(model, mos_ext.MoSConfig(r=r, equivalent_rank=2, shards_per_vector=2, seed=seed))
    with torch.no_grad():
        for name, shards in model.named_parameters():
            if name.endswith("shards_b"):
                shards.normal_(0, scale)
    (mos_ext.export_lora if lora else mos_ext.save_adapter)(model, folder)


class World:
    """A model, its adapters in a folder, and what each gets alone."""

    def __init__(self, root):
        torch.manual_seed(0)
        self.base = tiny.language_model(root / "base")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.base)
        self.adapters = root / "adapters"
        self.adapters.mkdir()
        write_adapter(self.base, self.adapters / "red", 1)
        write_adapter(self.base, self.adapters / "green", 2, r=4)
        write_adapter(self.base, self.adapters / "lora", 3, lora=True)
        write_adapter(self.base, self.adapters / "infinite", 4, scale=1e30)
        self._models = {}

    def model(self):
        return transformers.AutoModelForCausalLM.from_pretrained(self.base).eval()

    def ids(self, text):
        return self.tokenizer(text)["input_ids"]

    def alone(self, adapter, ids, count):
        """Tokens of ``generate`` on a model with this adapter and no other."""
        if adapter not in self._models:
            model, folder = self.model(), self.adapters / str(adapter)
            if adapter == "lora":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of transformers, about PEFT
                    model = peft.PeftModel.from_pretrained(model, folder)
            elif adapter is not None:
                model = mos_ext.load_adapter(model, folder)
            self._models[adapter] = model
        with torch.no_grad():
            out = self._models[adapter].generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        return out[0, len(ids) :].tolist()

    def text(self, adapter, ids, count):
        return self.tokenizer.decode(self.alone(adapter, ids, count), skip_special_tokens=True).rstrip("�")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


class Watched(Metrics):
    """Metrics that can be waited for."""

    def __init__(self):
        super().__init__("base")
        self.changed, self.seen = threading.Condition(), []

    def count(self, adapter, status):
        super().count(adapter, status)
        with self.changed:
            self.seen.append((adapter, status))
            self.changed.notify_all()

    def wait_for(self, entry):
        with self.changed:
            assert self.changed.wait_for(lambda: entry in self.seen, DEADLINE), (entry, self.seen)

    def answers_of(self, adapter):
        return self.registry.get_sample_value("mos_tokens_total", {"adapter": adapter, "kind": "answer"})

    def wait_for_count(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.seen) == count, DEADLINE), self.seen


class Client:
    """A request to an engine. ``hold`` stops the engine in the delivery of the first piece, until ``go``."""

    def __init__(self, engine, hold=False, **ask):
        self.pieces, self.began, self.go, self.ended = [], threading.Event(), threading.Event(), Future()
        self.hold = hold
        self.job = engine.submit(Ask(**{"temperature": 0.0, **ask}), self.take)

    def take(self, piece):
        self.pieces.append(piece)
        if piece.last:
            self.ended.set_result(piece)
        self.began.set()
        if self.hold:
            self.hold = False
            assert self.go.wait(DEADLINE)

    def tokens(self):
        last = self.ended.result(DEADLINE)
        if last.error is not None:
            raise last.error
        return self.job.out

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)


@contextlib.contextmanager
def running(world, capacity=None, adapters=NAMES, metrics=None, **limits):
    model = world.model()
    bank = AdapterBank(model, capacity=capacity)
    limits = Limits(**{"length": 128, "new_tokens": 100, "sequences": 4, **limits})
    engine = Engine(model, world.tokenizer, bank, limits, (metrics or Metrics("base")).observe)
    try:
        for name in adapters:
            bank.add(name, world.adapters / name)
        yield engine
    finally:
        engine.close()
        assert engine.active == engine.waiting == 0
        assert all(adapter.leases == 0 for adapter in bank.report().adapters)
        bank.close()


@pytest.fixture
def engine(world):
    with running(world) as engine:
        yield engine


# ------------------------------------------------------------------------------------------------ the engine


def test_all_at_once_get_the_tokens_they_get_alone(world, engine):
    prompts = [world.ids(f"I have {n} apples and buy" + " more" * n) for n in range(12)]
    kinds = [(None, *NAMES)[n % 4] for n in range(12)]
    clients = [
        Client(engine, tokens=ids, adapter=kind, new_tokens=5 + 3 * n)
        for n, (ids, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]
    for n, (client, ids, kind) in enumerate(zip(clients, prompts, kinds, strict=True)):
        expected = world.alone(kind, ids, 5 + 3 * n)
        assert client.tokens() == expected
        assert client.text == world.text(kind, ids, 5 + 3 * n)
        ended = client.pieces[-1]
        assert ended.finish == ("stop" if expected[-1] == 0 else "length")
    assert len({tuple(world.alone(kind, prompts[5], 8)) for kind in (None, *NAMES)}) == 4


def test_a_long_one_goes_on_while_short_ones_come_and_go(world, engine):
    long = Client(engine, hold=True, tokens=world.ids("I have"), adapter="red", new_tokens=100)
    assert long.began.wait(DEADLINE)
    shorts = []
    for n in range(20):
        ids, kind = world.ids(f"buy {n} plums, and" + " 7" * (n % 5)), (None, *NAMES)[n % 4]
        shorts.append((Client(engine, tokens=ids, adapter=kind, new_tokens=1 + n % 6), ids, kind, 1 + n % 6))
    assert engine.waiting == 20
    long.go.set()
    for client, ids, kind, count in shorts:
        assert client.tokens() == world.alone(kind, ids, count)
    assert long.tokens() == world.alone("red", world.ids("I have"), 100)


def test_prompts_in_parts_are_the_same_prompts(world):
    ids = world.ids("I have 3 apples and buy 4 more. How many apples do I have?")
    with running(world, prefill=3, sequences=2) as engine:
        clients = [Client(engine, tokens=ids[n:], adapter="green", new_tokens=6) for n in range(5)]
        for n, client in enumerate(clients):
            assert client.tokens() == world.alone("green", ids[n:], 6)


def test_who_leaves_while_a_prompt_is_computed_in_parts(world):
    """The hole is filled from both: the last row that is decoded, then the one in its prompt."""
    ids = world.ids("I have 3 apples and buy 4 more. How many apples do I have? You have")
    with running(world, prefill=2) as engine:
        first = [Client(engine, tokens=world.ids("a"), adapter=name, new_tokens=9 + n) for n, name in enumerate(NAMES)]
        late = Client(engine, tokens=ids, adapter="red", new_tokens=8)
        for n, (client, name) in enumerate(zip(first, NAMES, strict=True)):
            assert client.tokens() == world.alone(name, world.ids("a"), 9 + n)
        assert late.tokens() == world.alone("red", ids, 8)


def test_an_adapter_that_overflows_spoils_nobody_else(world):
    with running(world, adapters=(*NAMES, "infinite")) as engine:
        ids = world.ids("I have 3 apples and buy 4 more")
        long = Client(engine, hold=True, tokens=world.ids("I"), adapter="red", new_tokens=60)
        assert long.began.wait(DEADLINE)
        bad = Client(engine, tokens=ids, adapter="infinite", new_tokens=5)
        after = [Client(engine, tokens=world.ids("a"), adapter=name, new_tokens=20) for name in NAMES]
        long.go.set()
        with pytest.raises(Refused, match="not finite"):
            bad.tokens()
        for name, client in zip(NAMES, after, strict=True):
            assert client.tokens() == world.alone(name, world.ids("a"), 20)
        assert long.tokens() == world.alone("red", world.ids("I"), 60)


def test_rows_keep_nothing_of_their_last_guest(world):
    model = world.model()
    slots = Slots(model, 2, 32)
    with torch.no_grad():
        slots.forward(0, [world.ids("I have 3 apples and buy 4 more")])
        slots.forward(1, [world.ids("a b")])
        for store in slots._stores():
            store[0, :, : slots._used[0]] = float("nan")
        slots.move(1, 0)
        assert all(store.isfinite().all() and not store[1].any() for store in slots._stores())


def test_the_other_way_of_sampling(world, engine):
    def ask(**more):
        return Client(engine, tokens=world.ids("I have"), adapter="red", new_tokens=24, **more)

    alone = ask(temperature=1.0, seed=7).tokens()
    crowd = [ask(temperature=1.0, seed=seed) for seed in (1, 7, -2, 7)]
    drawn = [client.tokens() for client in crowd]
    assert drawn[1] == drawn[3] == alone
    assert len({tuple(tokens) for tokens in drawn}) == 3
    assert ask(temperature=1.0, top_p=1e-9).tokens() == world.alone("red", world.ids("I have"), 24)
    assert ask(temperature=1e-6).tokens() == world.alone("red", world.ids("I have"), 24)


def test_a_cancelled_request_frees_its_row(world):
    with running(world, sequences=1) as engine:
        first = Client(engine, hold=True, tokens=world.ids("I have"), adapter="red", new_tokens=100)
        assert first.began.wait(DEADLINE)
        waiting, next_one = (Client(engine, tokens=world.ids("I have"), new_tokens=4) for _ in range(2))
        engine.cancel(first.job)
        engine.cancel(waiting.job)
        first.go.set()
        assert next_one.tokens() == world.alone(None, world.ids("I have"), 4)
        for gone in (first, waiting):
            assert gone.ended.result(DEADLINE).error.status == 499
        assert len(first.job.out) < 100


def test_more_than_the_queue_takes_is_refused(world):
    with running(world, sequences=1, queue=2) as engine:
        first = Client(engine, hold=True, tokens=[5], adapter="red")
        assert first.began.wait(DEADLINE)
        waiting = [Client(engine, tokens=[5], adapter="red") for _ in range(2)]
        with pytest.raises(Refused, match="queue") as refused:
            Client(engine, tokens=[5], adapter="red")
        assert (refused.value.status, refused.value.retry) == (429, 1)
        first.go.set()
        assert all(client.tokens() for client in waiting)


def test_a_request_that_takes_too_long_is_given_up(world):
    with running(world, seconds=0.0) as engine, pytest.raises(Refused, match="longer than 0 s") as refused:
        Client(engine, tokens=[5]).tokens()
    assert refused.value.status == 504


@pytest.mark.parametrize(
    ("ask", "status", "code"),
    [
        ({"tokens": []}, 400, "invalid_value"),
        ({"tokens": [400]}, 400, "invalid_value"),
        ({"tokens": [-1]}, 400, "invalid_value"),
        ({"tokens": [5] * 128}, 400, "context_length_exceeded"),
        ({"tokens": [5] * 100, "new_tokens": 29}, 400, "context_length_exceeded"),
        ({"tokens": [5], "new_tokens": 101}, 400, "invalid_value"),
        ({"tokens": [5], "adapter": "blue"}, 404, "model_not_found"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(engine, ask, status, code):
    with pytest.raises(Refused) as refused:
        Client(engine, **ask)
    assert (refused.value.status, refused.value.code) == (status, code)


def test_a_fault_of_a_step_ends_its_requests_and_no_others(world, engine, monkeypatch):
    ids = world.ids("I have")
    with monkeypatch.context() as patch:
        patch.setattr(engine.cache, "forward", lambda *_: 1 / 0)
        with pytest.raises(Refused, match="the log says how"):
            Client(engine, tokens=ids, adapter="red").tokens()
    assert Client(engine, tokens=ids, adapter="red", new_tokens=5).tokens() == world.alone("red", ids, 5)
    broken = Client(engine, tokens=ids, adapter="red", new_tokens=50, hold=True)
    assert broken.began.wait(DEADLINE)
    broken.job.deliver = lambda piece: 1 / 0  # nobody else's matter
    other = Client(engine, tokens=ids, adapter="green", new_tokens=50)
    broken.go.set()
    assert other.tokens() == world.alone("green", ids, 50)


# ------------------------------------------------------------------------------------------------ adapters


def test_replaced_and_removed_while_in_use(world, engine):
    ids = world.ids("I have")
    old = Client(engine, hold=True, tokens=ids, adapter="red", new_tokens=60)
    assert old.began.wait(DEADLINE)
    queued = Client(engine, tokens=ids, adapter="red", new_tokens=8)
    engine.bank.replace("red", world.adapters / "green")
    new = Client(engine, tokens=ids, adapter="red", new_tokens=60)
    engine.bank.remove("red")
    with pytest.raises(Refused, match="red"):
        Client(engine, tokens=ids, adapter="red")
    old.go.set()
    assert old.tokens() == world.alone("red", ids, 60)
    assert queued.tokens() == world.alone("red", ids, 8)
    assert new.tokens() == world.alone("green", ids, 60)


def of_one(world):
    """Bytes for one adapter, not for two."""
    bank = AdapterBank(world.model())
    bank.add("red", world.adapters / "red")
    used = bank.report().used
    bank.close()
    return used * 3 // 2


def test_an_evicted_adapter_comes_back_for_its_request(world):
    ids = world.ids("I have")
    with running(world, of_one(world), ("red", "green")) as engine:
        assert [engine.bank.resident(name) for name in ("red", "green")] == [False, True]
        for name in ("red", "green", "red"):
            assert Client(engine, tokens=ids, adapter=name, new_tokens=8).tokens() == world.alone(name, ids, 8)


def test_it_waits_for_room_in_the_bank(world):
    ids = world.ids("I have")
    with running(world, of_one(world), ("red", "green"), room=DEADLINE) as engine:
        first = Client(engine, hold=True, tokens=ids, adapter="green", new_tokens=8)
        assert first.began.wait(DEADLINE)
        second = Client(engine, tokens=ids, adapter="red", new_tokens=8)
        passing = Client(engine, tokens=ids, new_tokens=3)
        first.go.set()
        assert passing.tokens() == world.alone(None, ids, 3)
        assert first.tokens() == world.alone("green", ids, 8)
        assert second.tokens() == world.alone("red", ids, 8)


def test_without_room_in_time_it_is_refused(world):
    ids = world.ids("I have")
    with running(world, of_one(world), ("red", "green"), room=0.0) as engine, engine.bank.lease("green"):
        with pytest.raises(Refused, match="no room") as refused:
            Client(engine, tokens=ids, adapter="red").tokens()
        assert (refused.value.status, refused.value.retry) == (503, 2)
        assert Client(engine, tokens=ids, adapter="green", new_tokens=8).tokens() == world.alone("green", ids, 8)


def test_removed_while_it_is_on_its_way_back(world, monkeypatch):
    with running(world, of_one(world), ("red", "green")) as engine:
        restore = engine.bank.restore

        def removed(name):
            engine.bank.remove(name)
            restore(name)

        monkeypatch.setattr(engine.bank, "restore", removed)
        with pytest.raises(Refused) as refused:
            Client(engine, tokens=[5], adapter="red").tokens()
        assert refused.value.status == 404


def test_cancelled_while_its_adapter_is_on_its_way_back(world, monkeypatch):
    with running(world, of_one(world), ("red", "green")) as engine:
        restore, entered, go = engine.bank.restore, threading.Event(), threading.Event()

        def slow(name):
            entered.set()
            assert go.wait(DEADLINE)
            restore(name)

        monkeypatch.setattr(engine.bank, "restore", slow)
        client = Client(engine, tokens=[5], adapter="red")
        assert entered.wait(DEADLINE)
        engine.cancel(client.job)
        assert client.ended.result(DEADLINE).error.status == 499
        go.set()  # `running` sees that no lease is left


# ------------------------------------------------------------------------------------------------ text


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens, **_):
        return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize(
    ("written", "stops", "expected"),
    [
        ("über 3 Äpfel, 🍎🍏", (), "über 3 Äpfel, 🍎🍏"),
        ("one END two", ("END",), "one "),
        ("one EN", ("END",), "one EN"),
        ("one ENEND", ("END",), "one EN"),
        ("one 🍎🍏 two", ("🍏",), "one 🍎"),
        ("aab", ("ab", "b"), "a"),
        ("aab", ("b", "ab"), "a"),
        ("abcd", ("bcd", "abcde"), "a"),
        ("a\n\nb", ("\n\n",), "a"),
        ("STOP", ("STOP",), ""),
    ],
)
def test_text_comes_in_whole_characters_up_to_a_stop(written, stops, expected):
    text, pieces = Text(Bytes(), stops), []
    for token in written.encode():
        pieces.append(text.add(token))
        if text.stopped:
            break
    pieces.append(text.end())
    assert "".join(pieces) == expected
    assert not any("�" in piece for piece in pieces)
    assert text.stopped == (expected != written)


def test_half_a_character_at_the_end_is_dropped():
    text = Text(Bytes())
    assert [text.add(token) for token in "aé🍎".encode()[:5]] == ["a", "", "é", "", ""]
    assert text.end() == ""


def test_bytes_that_are_no_character_do_not_stop_the_text():
    text = Text(Bytes())
    assert "".join(text.add(token) for token in b"a\xffb\xe2c") == "a�b�c"


# ------------------------------------------------------------------------------------------------ models


def unservable(kind):
    small = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    t = transformers
    if kind == "encoder-decoder":
        return t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        )
    if kind == "encoder":
        return t.BertForMaskedLM(t.BertConfig(**small, intermediate_size=48))
    if kind == "sliding":
        return t.MistralForCausalLM(
            t.MistralConfig(**small, intermediate_size=48, sliding_window=16, num_key_value_heads=2)
        )
    if kind == "state":
        return t.MambaForCausalLM(t.MambaConfig(vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=2))
    if kind == "linear":
        return t.BloomForCausalLM(t.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2))
    if kind == "rotation":
        return llama(
            2,
            rope_parameters={
                "rope_type": "dynamic",
                "factor": 2.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            },
        )
    return llama(2, max_position_embeddings=16)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("encoder-decoder", "a decoder that generates, got T5"),
        ("encoder", "a decoder that generates, got Bert"),
        ("sliding", "sequences of at most 16 tokens can be served"),
        ("state", "keeps a state"),
        ("linear", "position_ids"),
        ("rotation", "a dynamic rotation"),
        ("positions", "max_position_embeddings, 16, got 64"),
    ],
)
def test_models_that_would_be_served_wrong_are_refused(kind, why):
    with pytest.raises(Unservable, match=why):
        check(unservable(kind), 64)


def test_a_window_that_no_sequence_leaves_is_no_window():
    check(unservable("sliding"), 16)


def test_the_rehearsal_finds_what_no_list_has():
    model = llama(2)
    rehearse(model, 32)
    rotate = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotate(x, position_ids - position_ids.min())
    with pytest.raises(Unservable, match="side by side"):
        rehearse(model, 32)


@pytest.mark.parametrize("kind", ["GPT2", "Qwen3Moe", "eager", "bfloat16"])
def test_models_of_other_kinds_are_rehearsed(kind):
    if kind == "GPT2":
        model = gpt2(2)
    elif kind == "Qwen3Moe":
        model = moe("qwen3_moe")
    else:
        model = llama(2)
    if kind == "eager":
        model.set_attn_implementation("eager")
    if kind == "bfloat16":
        model = model.bfloat16()
    check(model, 32)
    rehearse(model, 32)


# ------------------------------------------------------------------------------------------------ HTTP


@contextlib.contextmanager
def serving(world, root=None, limits=None, **service):
    """A server on a port of this machine, in a thread: its service, its address, and what stops it."""
    metrics = Watched()
    with running(world, metrics=metrics, **(limits or {})) as engine:
        folder = None if root is None else Folder(root, engine.bank, engine.changed)
        service = Service(engine, metrics, "base", folder, **service)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            config = uvicorn.Config(create(service), log_config=None, timeout_graceful_shutdown=DEADLINE)
            server = Server(config, engine, DEADLINE)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            try:
                yield service, f"http://127.0.0.1:{listener.getsockname()[1]}", server
            finally:
                if not server.should_exit:
                    server.handle_exit(signal.SIGTERM, None)
                thread.join(DEADLINE)
                assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(world):
    with serving(world) as (service, address, _):
        yield service, address


@pytest.fixture
def http(served):
    with httpx.Client(base_url=served[1], timeout=DEADLINE) as client:
        yield client


@contextlib.contextmanager
def official(address, key="none"):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=DEADLINE) as client:
        yield client


QUESTION = [{"role": "user", "content": "I have 3 apples and buy 4 more. How many apples do I have?"}]


def test_openai_lists_models(served):
    with official(served[1]) as client:
        assert [model.id for model in client.models.list()] == ["base", *NAMES]
        assert client.models.retrieve("red").parent == "base"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("blue")


@pytest.mark.parametrize("name", ["base", *NAMES])
def test_openai_completes(world, served, name):
    ids = world.ids("I have 3 apples")
    adapter = None if name == "base" else name
    expected = world.text(adapter, ids, 24)
    with official(served[1]) as client:
        ask = {"model": name, "max_tokens": 24, "temperature": 0}
        whole = client.completions.create(prompt="I have 3 apples", **ask)
        assert whole.choices[0].text == expected
        assert whole.model == name
        tokens = len(world.alone(adapter, ids, 24))
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), tokens)
        assert client.completions.create(prompt=ids, **ask).choices[0].text == expected
        assert client.completions.create(prompt=["I have 3 apples"], **ask).choices[0].text == expected
        pieces = list(client.completions.create(prompt="I have 3 apples", stream=True, **ask))
        assert "".join(piece.choices[0].text for piece in pieces) == expected
        assert [piece.choices[0].finish_reason for piece in pieces][-1] == whole.choices[0].finish_reason
        assert len({piece.id for piece in pieces}) == 1


def test_openai_chats(world, served):
    prompt = world.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = world.text("green", prompt, 30)
    with official(served[1]) as client:
        ask = {"model": "green", "messages": QUESTION, "max_tokens": 30, "temperature": 0}
        whole = client.chat.completions.create(**ask)
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].message.role == "assistant"
        stream = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask)
        *pieces, usage = stream
        assert pieces[0].choices[0].delta.role == "assistant"
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
        assert usage.choices == []
        assert usage.usage == whole.usage
        parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
        again = client.chat.completions.create(**{**ask, "messages": parts}, max_completion_tokens=30)
        assert again.choices[0].message.content == expected
        del ask["max_tokens"]  # as long as it goes
        assert client.chat.completions.create(**ask).choices[0].message.content.startswith(expected)


def test_openai_stops(world, served):
    text = world.text("red", world.ids("I have"), 40)
    stop = text[20:23]
    with official(served[1]) as client:
        ask = {"model": "red", "prompt": "I have", "max_tokens": 40, "temperature": 0, "stop": [stop, "never said"]}
        whole = client.completions.create(**ask).choices[0]
        assert (whole.text, whole.finish_reason) == (text[: text.index(stop)], "stop")
        assert "".join(piece.choices[0].text for piece in client.completions.create(stream=True, **ask)) == whole.text


def test_openai_draws_again_with_a_seed(served):
    with official(served[1]) as client:
        ask = {"model": "red", "prompt": "I have", "max_tokens": 12}
        texts = [client.completions.create(seed=seed, **ask).choices[0].text for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "blue"}, 404, "model"),
        ({"model": "../red"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": ["a", "b"]}, 400, "prompt"),
        ({"prompt": [1, 400]}, 400, "prompt"),
        ({"prompt": [1, -1]}, 400, "prompt"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, None),
        ({"prompt": "a " * 200}, 400, None),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 101}, 400, "max_tokens"),
        ({"max_tokens": 10**30}, 400, None),
        ({"max_tokens": 1.5}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"top_p": float("nan")}, 400, "top_p"),
        ({"seed": 2**63}, 400, "seed"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stop": [""]}, 400, "stop"),
        ({"n": 2}, 400, "n"),
        ({"logprobs": 1}, 400, "logprobs"),
        ({"echo": True}, 400, "echo"),
        ({"best_of": 2}, 400, "best_of"),
        ({"suffix": "b"}, 400, "suffix"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"top_k": 5}, 400, "top_k"),
        ({"messages": []}, 400, "messages"),
    ],
)
def test_a_wrong_completion_is_refused_by_name(http, change, status, param):
    body = {"model": "red", "prompt": "I have", **change}
    response = http.post("/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"functions": []}, "functions"),
    ],
)
def test_a_wrong_chat_is_refused_by_name(served, change, param):
    with official(served[1]) as client, pytest.raises(openai.BadRequestError) as error:
        client.post("/chat/completions", body={"model": "red", "messages": QUESTION, **change}, cast_to=object)
    assert error.value.param == param


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_request_is_refused(http, content):
    response = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_chat_without_a_template(world, served, monkeypatch):
    monkeypatch.setattr(served[0].engine.tokenizer, "chat_template", None)
    with official(served[1]) as client, pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="red", messages=QUESTION)


def test_other_addresses(http):
    assert http.get("/v1/nothing").json()["error"]["code"] == "http_error"
    assert http.get("/v1/completions").status_code == 405
    assert (http.get("/health").text, http.get("/ready").text) == ("ok", "ok")
    wrong = http.get("/health", headers={"host": "elsewhere.example"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (421, "wrong_host")
    assert http.get("/docs").status_code == http.get("/openapi.json").status_code == 404
    assert "access-control-allow-origin" not in http.get("/health", headers={"origin": "http://a.example"}).headers


def test_the_page_needs_nothing_from_elsewhere(http):
    page = http.get("/")
    policy = page.headers["content-security-policy"]
    assert policy == page_policy(page.text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"https?://|src=|@import|url\(", page.text)
    assert not re.search(r"\s(on\w+|style)=", page.text)  # the policy would stop them
    ids = re.findall(r'\bat\("(\w+)"\)|show\("(\w+)"', page.text)
    assert {a or b for a, b in ids} <= set(re.findall(r'id="(\w+)"', page.text))


def test_what_the_page_shows(world, served, http):
    before = http.get("/v1/adapters").json()["answered"]
    with official(served[1]) as client:
        client.completions.create(model="red", prompt="I have", max_tokens=3, temperature=0)
    data = http.get("/v1/adapters").json()
    assert data["base"] == "base"
    assert [adapter["name"] for adapter in data["data"]] == list(NAMES)
    assert [adapter["kind"] for adapter in data["data"]] == ["MoS", "MoS", "LoRA"]
    assert data["memory"]["used"] == sum(adapter["bytes"] for adapter in data["data"])
    assert data["answered"] == before + 3
    assert data["requests"]["rows"] == 4


def test_metrics(world, served, http):
    def value(line):
        found = re.search(rf"^{re.escape(line)} (\S+)$", http.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    lines = (
        'mos_requests_total{adapter="lora",status="200"}',
        'mos_tokens_total{adapter="lora",kind="answer"}',
        'mos_tokens_total{adapter="lora",kind="prompt"}',
        'mos_requests_total{adapter="",status="404"}',
        'mos_step_seconds_count{kind="prefill"}',
        'mos_step_seconds_count{kind="decode"}',
    )
    before = [value(line) for line in lines]
    with official(served[1]) as client:
        client.completions.create(model="lora", prompt="I have", max_tokens=3, temperature=0)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="blue", prompt="I have")
    assert [value(line) - old for line, old in zip(lines, before, strict=True)] == [
        1,
        3,
        len(world.ids("I have")),
        1,
        1,
        2,
    ]
    assert value("mos_adapters") == 3
    assert value("mos_bank_bytes") == served[0].bank.report().used
    assert value("mos_active") == value("mos_waiting") == 0


def test_the_base_is_counted_by_its_name(world, served, http):
    complete(http, "base", world.ids("I have"))
    text = http.get("/metrics").text
    assert 'mos_requests_total{adapter="base",status="200"}' in text
    assert 'mos_tokens_total{adapter="base",kind="answer"}' in text
    assert 'mos_tokens_total{adapter=""' not in text


@pytest.mark.parametrize("options", [{"content": b'{"model": "red"}'}, {"json": []}, {}])
def test_a_body_that_is_no_object_is_told_what_it_must_be(http, options):
    error = http.post("/v1/completions", **options).json()["error"]
    assert error["message"] == "the body must be a JSON object, sent with `Content-Type: application/json`"


def test_an_address_that_is_not_served_is_named(http):
    assert http.post("/v1/responses").json()["error"]["message"] == "POST /v1/responses is not served: Not Found"


def test_many_clients_at_once(world, served):
    """Through HTTP, more of them than rows, whole and streamed."""

    async def one(client, n):
        name, prompt = ("base", *NAMES)[n % 4], f"buy {n} plums"
        ask = {"model": name, "prompt": prompt, "max_tokens": 3 + n, "temperature": 0}
        if n % 2:
            text = (await client.completions.create(**ask)).choices[0].text
        else:
            text = ""
            async for piece in await client.completions.create(stream=True, **ask):
                text += piece.choices[0].text
        assert text == world.text(None if name == "base" else name, world.ids(prompt), 3 + n)

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{served[1]}/v1", api_key="none", max_retries=0) as client:
            await asyncio.wait_for(asyncio.gather(*(one(client, n) for n in range(24))), DEADLINE)

    asyncio.run(all_of_them())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(world, stream):
    with serving(world, limits={"sequences": 1}) as (service, address, _):
        held = Client(service.engine, hold=True, tokens=[5], adapter="green", new_tokens=2)
        assert held.began.wait(DEADLINE)
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"model": "red", "prompt": "I have", "max_tokens": 100, "stream": stream}).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            with service.engine._wake:
                assert service.engine._wake.wait_for(lambda: service.engine.waiting == 1, DEADLINE)
        service.metrics.wait_for(("red", 499))
        held.go.set()
        with official(address) as client:
            client.completions.create(model="red", prompt="I have", max_tokens=2)
        assert held.tokens()
        assert service.metrics.answers_of("red") == 2


def test_a_client_that_goes_in_the_middle_of_a_stream(world, monkeypatch):
    with serving(world, limits={"sequences": 1}) as (service, address, _), official(address) as client:
        inner = service.engine._take

        def take(jobs, chosen):
            if len(jobs[0].out) == 20:
                service.metrics.wait_for(("red", 499))
            inner(jobs, chosen)

        monkeypatch.setattr(service.engine, "_take", take)
        stream = client.completions.create(model="red", prompt="a", max_tokens=100, temperature=0, stream=True)
        assert next(iter(stream)).choices
        stream.close()
        client.completions.create(model="green", prompt="I have", max_tokens=2)
        assert service.metrics.answers_of("red") <= 21


def test_too_large_a_body(world):
    with serving(world, body_bytes=1000) as (_, address, _):
        small = {"model": "red", "prompt": "I have", "max_tokens": 1}
        with httpx.Client(base_url=address, timeout=DEADLINE) as client:
            assert client.post("/v1/completions", json=small).status_code == 200
            for content in (b"x" * 1001, iter([b"x" * 500] * 3)):  # with a length, and in chunks without one
                response = client.post("/v1/completions", content=content)
                assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_queue_that_is_full_says_when_to_come_again(world):
    with serving(world, limits={"sequences": 1, "queue": 0}) as (service, address, _):
        held = Client(service.engine, hold=True, tokens=[5])
        assert held.began.wait(DEADLINE)
        with official(address) as client, pytest.raises(openai.RateLimitError) as error:
            client.completions.create(model="red", prompt="I have", stream=True)
        assert error.value.response.headers["retry-after"] == "1"
        held.go.set()


def test_a_fault_after_the_headers_is_an_event(world, monkeypatch):
    with serving(world) as (service, address, _), official(address) as client:
        held = Client(service.engine, hold=True, tokens=[5], new_tokens=2)
        assert held.began.wait(DEADLINE)
        inner = service.engine._take

        def take(jobs, chosen):
            if any(len(job.out) > 20 for job in jobs):
                raise RuntimeError("planted")
            inner(jobs, chosen)

        monkeypatch.setattr(service.engine, "_take", take)
        held.go.set()
        stream = client.completions.create(model="red", prompt="I have", max_tokens=60, temperature=0, stream=True)
        with pytest.raises(openai.APIError, match="the log says how"):
            list(stream)
        service.metrics.wait_for(("red", 500))


# ------------------------------------------------------------------------------------------------ keys and adapters


def test_an_api_key(world):
    with serving(world, api_key=KEY) as (_, address, _):
        with httpx.Client(base_url=address, timeout=DEADLINE) as client:
            for value in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": KEY},
                {"authorization": "Bearer ä".encode()},
            ):
                for path in ("/v1/models", "/v1/models/red", "/v1/adapters"):
                    response = client.get(path, headers=value)
                    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
                assert client.post("/v1/completions", json={}, headers=value).status_code == 401
            assert (
                client.get("/health").status_code
                == client.get("/metrics").status_code
                == client.get("/").status_code
                == 200
            )
        with official(address, KEY) as client:
            assert client.completions.create(model="red", prompt="I have", max_tokens=1).usage.completion_tokens == 1
        with official(address, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.fixture
def folders(world, tmp_path):
    """A directory of adapters, and what lies around it."""
    root = tmp_path / "adapters"
    shutil.copytree(world.adapters / "red", root / "blue")
    shutil.copytree(world.adapters / "green", tmp_path / "secret")
    (root / "linked").symlink_to(tmp_path / "secret")
    (root / "inside").symlink_to(root / "blue")
    (root / "files").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "files" / name).symlink_to(tmp_path / "secret" / name)
    (root / "pickled").mkdir()
    shutil.copy(root / "blue" / "adapter_config.json", root / "pickled")
    torch.save({"a": torch.ones(1)}, root / "pickled" / "adapter_model.bin")
    shutil.copytree(root / "blue", root / "cut")
    weights = root / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (root / "empty").mkdir()
    return root


@pytest.fixture
def admin(world, folders):
    with (
        serving(world, folders, admin_token=TOKEN) as (service, address, _),
        httpx.Client(base_url=address, timeout=DEADLINE, headers={"authorization": f"Bearer {TOKEN}"}) as client,
    ):
        client.service = service
        yield client


def complete(client, name, ids):
    body = {"model": name, "prompt": ids, "max_tokens": 12, "temperature": 0}
    return client.post("/v1/completions", json=body).json()["choices"][0]["text"]


def test_adapters_come_and_go(world, admin, folders):
    ids = world.ids("I have")
    assert admin.post("/v1/adapters", json={"name": "blue"}).status_code == 201
    assert complete(admin, "blue", ids) == world.text("red", ids, 12)
    again = admin.post("/v1/adapters", json={"name": "blue"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "name_taken")
    shutil.copytree(world.adapters / "green", folders / "v2")
    body = {"name": "blue", "directory": "v2", "replace": True, "pin": True}
    assert admin.post("/v1/adapters", json=body).status_code == 201
    assert complete(admin, "blue", ids) == world.text("green", ids, 12)
    assert {a["name"]: a["pinned"] for a in admin.get("/v1/adapters").json()["data"]}["blue"]
    assert admin.delete("/v1/adapters/blue").json()["deleted"]
    assert admin.delete("/v1/adapters/blue").status_code == 404
    assert admin.post("/v1/completions", json={"model": "blue", "prompt": "a"}).status_code == 404
    assert admin.post("/v1/adapters", json={"name": "alias", "directory": "inside"}).status_code == 201


def test_nothing_outside_of_the_directory_is_opened(admin):
    cases = [
        ({"name": "x", "directory": "../secret"}, 400),
        ({"name": "x", "directory": ".."}, 400),
        ({"name": "x", "directory": "."}, 400),
        ({"name": "x", "directory": "blue/../../secret"}, 400),
        ({"name": "x", "directory": "/etc"}, 400),
        ({"name": "x", "directory": "blue\0"}, 400),
        ({"name": "x", "directory": "blue\n"}, 400),
        ({"name": "x", "directory": "linked"}, 400),
        ({"name": "x", "directory": "files"}, 400),
        ({"name": "x", "directory": "pickled"}, 404),
        ({"name": "x", "directory": "empty"}, 404),
        ({"name": "x", "directory": "nothing"}, 404),
        ({"name": "x", "directory": "cut"}, 400),
        ({"name": "../x", "directory": "blue"}, 400),
        ({"name": "x" * 65, "directory": "blue"}, 400),
        ({"name": "", "directory": "blue"}, 400),
        ({"name": "base", "directory": "blue"}, 409),
        ({"name": "x", "path": "/etc"}, 400),
        ({"directory": "blue"}, 400),
    ]
    answers = [admin.post("/v1/adapters", json=body) for body, _ in cases]
    assert [(body, answer.status_code) for (body, _), answer in zip(cases, answers, strict=True)] == cases
    assert all(answer.json()["error"]["message"] for answer in answers)
    assert admin.service.bank.names == NAMES


def test_adapters_are_changed_with_the_token_alone(world, folders):
    with serving(world, folders, admin_token=TOKEN, api_key=KEY) as (service, address, _):
        for token in (None, "wrong", KEY):
            headers = {} if token is None else {"authorization": f"Bearer {token}"}
            with httpx.Client(base_url=address, headers=headers, timeout=DEADLINE) as client:
                assert client.post("/v1/adapters", json={"name": "blue"}).status_code == 401
                assert client.delete("/v1/adapters/red").status_code == 401
        assert service.bank.names == NAMES


def test_without_a_token_adapters_cannot_be_changed(world, folders):
    with serving(world, folders) as (service, address, _), httpx.Client(base_url=address, timeout=DEADLINE) as client:
        for headers in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer None"}):
            assert client.post("/v1/adapters", json={"name": "blue"}, headers=headers).status_code == 404
            assert client.delete("/v1/adapters/red", headers=headers).status_code == 404
        assert service.bank.names == NAMES


def test_a_directory_is_followed(world, engine, folders, caplog):
    ids = world.ids("I have")
    folder = Folder(folders, engine.bank, engine.changed)

    def names():
        return set(engine.bank.names) - set(NAMES)

    def gets(adapter):
        assert Client(engine, tokens=ids, adapter="blue", new_tokens=8).tokens() == world.alone(adapter, ids, 8)

    folder.look()
    assert names() == set()  # it may still be written
    folder.look()
    assert names() == {"blue", "inside"}
    gets("red")
    assert sum("cut is not loaded" in record.message for record in caplog.records) == 1
    folder.look()
    assert sum("cut is not loaded" in record.message for record in caplog.records) == 1
    shutil.copy(folders / "blue" / "adapter_model.safetensors", folders / "cut")  # the rest of it has come
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(world.adapters / "green" / name, folders / "blue" / name)
    folder.look()
    gets("red")
    folder.look()
    gets("green")
    assert "cut" in names()
    weights = folders / "blue" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    folder.look()
    folder.look()
    gets("green")  # a damaged one replaces nothing
    shutil.rmtree(folders / "blue")
    folder.look()
    assert "blue" not in names()
    (folders / "red").mkdir()
    for file in (world.adapters / "green").iterdir():
        shutil.copy(file, folders / "red")
    folder.look()
    folder.look()
    assert "red is an adapter of another folder" in caplog.text
    assert Client(engine, tokens=ids, adapter="red", new_tokens=8).tokens() == world.alone("red", ids, 8)
    folder.remove("cut")
    folder.look()
    assert "cut" not in names()  # until it is written again


def test_under_load(world, folders):
    """Adapters replaced, added and removed, a damaged file, clients that go, memory for two of five: and every answer
    is that of its adapter, or says that there is none."""
    versions = {"blue": "red", "lora": "lora", "green": "green", "red": "red"}
    prompts = [f"buy {n} plums" for n in range(4)]
    right = {a: {p: world.text(a, world.ids(p), 10) for p in prompts} for a in ("red", "green", "lora", None)}
    limits = {"capacity": of_one(world) * 2, "room": DEADLINE, "queue": 200, "sequences": 6}
    answers = []

    async def ask(client, n):
        name, prompt = ("base", *versions, "swapped")[n % 6], prompts[n % 4]
        request = {"model": name, "prompt": prompt, "max_tokens": 10, "temperature": 0}
        if n % 7 == 0:  # goes in the middle of it
            stream = await client.completions.create(stream=True, **request)
            await stream.close()
            return
        text = (await client.completions.create(**request)).choices[0].text
        right_ones = ("red", "green") if name == "swapped" else (versions.get(name),)
        assert text in {right[adapter][prompt] for adapter in right_ones}
        answers.append(text)

    async def change(http):
        for turn in range(12):
            one = {"name": "swapped", "directory": "v2" if turn % 2 else "blue", "replace": True}
            assert (await http.post("/v1/adapters", json=one)).status_code in (201, 507)  # requests may need all memory
            assert (await http.post("/v1/adapters", json={**one, "directory": "cut"})).status_code == 400
            added = (await http.post("/v1/adapters", json={"name": "passing", "directory": "blue"})).status_code
            removed = (await http.delete("/v1/adapters/passing")).status_code
            assert (added, removed) in ((201, 200), (507, 404))

    async def everything(address):
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with (
            openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
            httpx.AsyncClient(base_url=address, headers=headers, timeout=DEADLINE) as http,
        ):
            for name in ("blue", "swapped"):
                assert (await http.post("/v1/adapters", json={"name": name, "directory": "blue"})).status_code == 201
            work = asyncio.gather(change(http), *(ask(client, n) for n in range(120)))
            await asyncio.wait_for(work, DEADLINE)
            last = {"name": "swapped", "directory": "v2", "replace": True}
            assert (await http.post("/v1/adapters", json=last)).status_code == 201

    shutil.copytree(world.adapters / "green", folders / "v2")
    with serving(world, folders, limits, admin_token=TOKEN) as (service, address, _):
        asyncio.run(everything(address))
        service.metrics.wait_for_count(120)
        assert service.bank.report().evictions > 0
    assert len(answers) == 102


# ------------------------------------------------------------------------------------------------ the end


def test_what_runs_is_finished_before_the_server_stops(world):
    with serving(world) as (service, address, server), official(address) as client:
        stream = client.completions.create(model="red", prompt="I have", max_tokens=90, temperature=0, stream=True)
        pieces = [next(stream)]
        server.handle_exit(signal.SIGTERM, None)
        assert not service.engine.ready
        with pytest.raises(Refused, match="shutting down"):
            Client(service.engine, tokens=[5])
        pieces += stream
        assert "".join(piece.choices[0].text for piece in pieces) == world.text("red", world.ids("I have"), 90)


def test_what_takes_longer_than_the_grace_is_told_so(world, engine):
    held = Client(engine, hold=True, tokens=[5], adapter="red", new_tokens=100)
    waiting = Client(engine, tokens=[5], adapter="red", new_tokens=100)
    assert held.began.wait(DEADLINE)
    engine.drain(0.0)
    held.go.set()
    for client in (held, waiting):
        assert client.ended.result(DEADLINE).error.status == 503
    engine.close()
    assert not engine.alive


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--watch"], "--watch must have --adapters"),
        (["--adapters", "nowhere"], "--adapters must be a directory, got 'nowhere'"),
    ],
)
def test_the_program_says_what_it_was_told_wrong(arguments, why, capsys):
    with pytest.raises(SystemExit) as error:
        start.arguments(arguments, None)
    assert error.value.code == 2
    assert why in capsys.readouterr().err


def test_the_program_ends_well(tmp_path, world):
    """``examples/serve.py`` with a directory, as a user starts it; a signal ends it with 0."""
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--port", "0", "--adapters", str(world.adapters)]
    command += ["--model", world.base, "--max-length", "64", "--capacity", "100K"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MOS_ADMIN_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    with (
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process,
        contextlib.ExitStack() as at_the_end,
    ):
        at_the_end.callback(process.kill)
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"Uvicorn running on (\S+)", line):
                break
        else:
            pytest.fail("".join(lines))
        with official(found[1]) as client:
            assert {model.id for model in client.models.list()} == {"base", *NAMES, "infinite"}, lines
            text = client.completions.create(model="red", prompt="I have", max_tokens=9, temperature=0).choices[0].text
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(DEADLINE) == 0, rest
    assert text == world.text("red", world.ids("I have"), 9)
