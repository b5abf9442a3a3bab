"""examples/ray_replicas.py for real: `make check-ray`.

Ray comes from PyPI into an environment of its own (build/ray), by the extra that the guide names. Two replicas of a tiny
model answer as one server does, one of them is killed, and all of it is stopped.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
from bare import bare_environment
from test_server import DEADLINE, World, official

ROOT = Path(__file__).resolve().parent.parent
PROMPT, NEW = "I have 3", 24
NAMES = ("red", "green", "base")


@pytest.fixture(scope="module")
def python():
    """The interpreter of an environment with the extra, beside the torch that is here. Nothing is compiled."""
    folder = ROOT / "build" / "ray" / "environment"
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.parent.mkdir(parents=True)
    python, _ = bare_environment(folder, "torch", "numpy", "ninja", pip=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--no-build-isolation"]
    subprocess.run([*pip, "setuptools>=77"], check=True)
    settings = folder.parent / "setup.cfg"  # what is built lies there, not where a wheel would pick it up
    settings.write_text(f"[build]\nbuild_base = {folder.parent / 'build'}\n")
    own = {"MOS_EXT_BUILD": "python", "DIST_EXTRA_CONFIG": str(settings)}
    subprocess.run([*pip, ".[ray]"], check=True, cwd=ROOT, env={**os.environ, **own})
    return python


@contextlib.contextmanager
def program(python, name, base, adapters):
    """An example, as a user starts it: where it answers, and its process. It ends well, and leaves none of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    command = [python, ROOT / "examples" / name, "--model", base, "--adapters", adapters, "--device", "cpu"]
    command += ["--port", address.rpartition(":")[2]]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": adapters.parent}
    lines, began = [], threading.Event()

    def read():
        for line in process.stdout:
            lines.append(line)
            if address in line and re.search("Uvicorn running|replicas at", line):
                began.set()
        began.set()  # or it never will

    with subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}, **options) as process:
        reader = threading.Thread(target=read)
        reader.start()
        try:
            assert began.wait(DEADLINE)
            assert process.poll() is None
            own = psutil.Process(process.pid).children(recursive=True)
            yield address, process
            if process.poll() is None:
                process.terminate()
            assert process.wait(DEADLINE) == 0
            assert psutil.wait_procs(own, DEADLINE)[1] == []
        except BaseException:
            process.terminate()
            print("".join(lines))
            raise
        finally:
            reader.join()


def ask(client, name, expected):
    """Which replica gave the answer, which is the one expected."""
    raw = client.completions.with_raw_response.create(model=name, prompt=PROMPT, max_tokens=NEW, temperature=0)
    assert raw.parse().choices[0].text == expected
    return raw.headers.get("x-replica")


def two(answerers):
    """Asks again and again, and gives the first two who answer."""
    seen, until = set(), time.monotonic() + DEADLINE
    while len(seen) < 2:
        assert time.monotonic() < until, seen
        seen |= answerers()
    return seen


def test_two_replicas(python, tmp_path):
    world, adapters = World(tmp_path), tmp_path / "served"
    right = {name: world.text(None if name == "base" else name, world.ids(PROMPT), NEW) for name in (*NAMES, "lora")}
    assert len({*right.values()}) == 4
    for name in ("red", "green"):
        shutil.copytree(world.adapters / name, adapters / name)
    with program(python, "serve.py", world.base, adapters) as (address, _), official(address) as client:
        assert {ask(client, name, right[name]) for name in NAMES} == {None}

    with program(python, "ray_replicas.py", world.base, adapters) as (address, process), official(address) as client:
        first = {frozenset(two(lambda name=name: {ask(client, name, right[name])})) for name in NAMES}
        assert len(first) == 1
        print(f"both replicas, {', '.join(*first)}, answer as one server does")

        def listing():
            raw = client.models.with_raw_response.list()
            return {raw.headers["x-replica"] for model in raw.parse() if model.id == "lora"}

        shutil.copytree(world.adapters / "lora", adapters / "lora")
        assert two(listing) == {*next(iter(first))}
        two(lambda: {ask(client, "lora", right["lora"])})
        print("both follow the directory")

        processes = psutil.Process(process.pid).children(recursive=True)
        victim = next(child for child in processes if any("ray::ServeReplica" in word for word in child.cmdline()))
        victim.kill()
        began, count, after = time.monotonic(), 0, set()
        while not after - next(iter(first)):
            assert time.monotonic() < began + DEADLINE, after
            after |= {ask(client, name, right[name]) for name in NAMES}
            count += len(NAMES)
        print(
            f"one was killed; {count} requests were answered in the {time.monotonic() - began:.0f} s until another was there"
        )

        ask_long = {"model": "green", "prompt": PROMPT, "max_tokens": 200, "temperature": 0}
        stream = client.completions.create(stream=True, **ask_long)
        pieces = [next(stream)]
        process.send_signal(signal.SIGTERM)
        pieces += stream
        text = "".join(piece.choices[0].text for piece in pieces)
        assert text == world.text("green", world.ids(PROMPT), 200)
        assert process.wait(DEADLINE) == 0  # a second signal, while Python ends, would be the end
        print("a stream went to its end after SIGTERM")
