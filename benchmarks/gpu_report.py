"""The report of a machine with a GPU: builds, tests, checks with compute-sanitizer, measures. README.md explains it.

    python -m benchmarks.gpu_report OUT [--part build,test,sanitize,bench] [--device cuda|cpu]

Writes OUT/<part>.json as each part ends, OUT/report.json, OUT/report.md and OUT/log.txt; parts that were not asked for
are taken from OUT when they are there. Needs no virtual environment: the running interpreter does everything, and
nothing is installed. On a CPU everything runs on tiny shapes, which tests this report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .harness import ROOT, environment, find_program, importable, read_json, scrub, write_json
from .tables import goals, problems, report_text

# Seconds of each part; what one leaves over, later ones may use. All of them together stay under nine minutes.
SHARES = {"build": 140, "test": 150, "sanitize": 80, "bench": 150}
# Not a session: whoever ends the session that this report runs in ends everything.
NEW_GROUP = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
GRACE = 10  # a program that is told to stop may take this long

# Tests of building and of the CPU emulator: they need no GPU, and would take most of the time.
# Tests that a GPU adds nothing to: they use the CPU alone, and CI runs them.
NOT_HERE = (
    *("test_benchmarks.py", "test_build.py", "test_cuda_emulator.py", "test_cuda_kernels.py", "test_distributed.py"),
    *("test_gpu_report.py", "test_kernel_model.py", "test_memory.py", "test_peft.py", "test_quantized.py"),
    *("test_docs.py", "test_examples.py", "test_format.py", "test_metamathqa.py"),
)
# What a file imports that a machine with a GPU may not have: it is left out then, and the report says why.
NEEDS = {"test_training.py": ("accelerate", "datasets", "trl", "mos_ext.integrations.peft")}
SMOKE_TESTS = ("test_config.py",)
ON_CUDA = re.compile(r"\[(.*-)?cuda(-.*)?\]$")  # the parameter of the fixture `device`
SANITIZERS = ("memcheck", "racecheck", "synccheck")


class Report:
    """One invocation: where it writes, what it runs on, when it must be over."""

    def __init__(self, out: Path, device: str, parts: list[str], sections: str) -> None:
        self.out, self.device, self.parts, self.sections = out, device, parts, sections
        self.began = time.monotonic()
        self.environment = environment()
        self.log = out / "log.txt"
        path = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        nvcc = find_program("nvcc")
        if nvcc and not shutil.which("nvcc"):
            path.append(str(Path(nvcc).parent))
        self.env = {
            # A report started by a test is no part of that test's run.
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
            # ninja and others lie beside the interpreter
            "PATH": os.pathsep.join(p for p in path if p),
            "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MAX_JOBS": os.environ.get("MAX_JOBS") or str(self.environment["cpu_cores"]),
        }
        if gpu := self.environment["gpu"]:
            self.env["TORCH_CUDA_ARCH_LIST"] = gpu["capability"]  # a sixth of the compiling

    def seconds_for(self, part: str) -> float:
        """Until the deadline, less the shares of the parts behind this one."""
        later = self.parts[self.parts.index(part) + 1 :]
        return self.began + sum(SHARES.values()) - sum(SHARES[p] for p in later) - time.monotonic()

    def run(self, command: list[str], seconds: float, **env: str) -> dict:
        """Runs a command into the log: exit status (None where it was stopped), seconds and text."""
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n".encode())
            log.flush()
            start = log.tell()
            process = Process(command, {**self.env, **env}, log)
            code, took = process.wait(seconds)
        with self.log.open("rb") as log:
            log.seek(start)
            text = log.read().decode(errors="replace")
        return {"code": code, "seconds": took, "text": text}


class Process:
    """A command in a process group of its own, so that all it started ends with it."""

    def __init__(self, command: list[str], env: dict[str, str], log) -> None:
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [str(c) for c in command],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            **NEW_GROUP,
        )

    def wait(self, seconds: float) -> tuple[int | None, float]:
        stopped = False
        try:
            self.process.wait(max(seconds - GRACE, 1))
        except subprocess.TimeoutExpired:
            stopped = True
            self._signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        finally:
            self._signal(signal.SIGKILL)
            self.process.wait()
        return None if stopped else self.process.returncode, round(time.monotonic() - self.began, 1)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def tail(text: str, size: int = 1500) -> str:
    return text[-size:]


# ------------------------------------------------------------------------------------------------ parts


def build(report: Report) -> dict:
    # The smoke build goes the same way and builds nothing; not in place, where it would remove somebody's libraries.
    mode = "cuda" if report.device == "cuda" else "python"
    command = [sys.executable, "setup.py", "build_ext", *(["--inplace"] if mode == "cuda" else [])]
    compiled = report.run(command, report.seconds_for("build") - 25, MOS_EXT_BUILD=mode)
    told = report.run([sys.executable, "-m", "mos_ext"], 60)
    problems = []
    if compiled["code"] != 0:
        problems.append(f"setup.py: {_status(compiled)}: {tail(compiled['text'], 600)}")
    if told["code"] != 0:
        problems.append(f"python -m mos_ext: {_status(told)}: {tail(told['text'], 600)}")
    elif mode == "cuda" and re.search(r"^cuda python", told["text"], re.MULTILINE):
        problems.append("python -m mos_ext: some operators have no CUDA kernel")
    return {
        "problems": problems,
        "mode": mode,
        "architectures": report.env.get("TORCH_CUDA_ARCH_LIST"),
        "compile_seconds": compiled["seconds"],
        "compile_output": tail(compiled["text"]) if compiled["code"] != 0 else None,
        "mos_ext": told["text"],
    }


def _status(result: dict) -> str:
    return "no time left" if result["code"] is None else f"exit status {result['code']}"


def test(report: Report) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        wrappers = _wrappers(report, Path(folder))
        record = Path(folder) / "outcomes"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.pytest_record"]
        lacking = {
            file: why for file, names in NEEDS.items() if (why := next(filter(None, map(importable, names)), None))
        }
        if report.device == "cuda":
            command += ["tests", *(f"--ignore=tests/{name}" for name in (*NOT_HERE, *lacking))]
        else:
            command += [f"tests/{name}" for name in SMOKE_TESTS]
        if report.device == "cuda" and not importable("xdist"):
            # Every worker holds a CUDA context; more than a few gain nothing on one GPU.
            workers = min(int(report.environment["cpu_cores"]), 12)
            command += ["-n", str(workers), "--dist", "worksteal"]
        ran = report.run(command, report.seconds_for("test"), MOS_EXT_TEST_RECORD=str(record))
        rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    outcomes = Counter(r["outcome"] for r in rows)
    failures = [r for r in rows if r["outcome"] in ("failed", "error")]
    problems = [f"{r['test']}: {r['outcome']}: {tail(r['why'], 200)}" for r in failures]
    if ran["code"] != 0:
        problems.append(f"pytest: {_status(ran)}: {tail(ran['text'], 300) if not failures else ''}")
    if wrappers["status"] == "failed":
        problems.append(f"wrappers.cu: {tail(wrappers['output'], 600)}")
    return {
        "problems": problems,
        "pytest": {
            "status": "ok" if ran["code"] == 0 else _status(ran),
            "outcomes": dict(outcomes),
            "on_cuda": sum(r["outcome"] == "passed" and bool(ON_CUDA.search(r["test"])) for r in rows),
            "left_out": list(NOT_HERE) if report.device == "cuda" else "all but " + ", ".join(SMOKE_TESTS),
            "lacking": lacking,
            "seconds": ran["seconds"],
            "failures": failures[:50],
            "slowest": [[r["test"], r["seconds"]] for r in sorted(rows, key=lambda r: -r["seconds"])[:10]],
        },
        "wrappers": wrappers,
    }


def _wrappers(report: Report, folder: Path) -> dict:
    """The wrappers of CUDA instructions against plain C++, on the hardware: what the emulator passes on a CPU."""
    nvcc, gpu = find_program("nvcc"), report.environment["gpu"]
    if report.device != "cuda" or nvcc is None or gpu is None:
        return {"status": "not run", "output": "needs nvcc and a GPU"}
    cc, program = gpu["capability"].replace(".", ""), folder / "wrappers"
    source = ROOT / "tests" / "cuda_emulator" / "wrappers.cu"
    target = f"-gencode=arch=compute_{cc},code=sm_{cc}"
    compiled = report.run([nvcc, "-std=c++17", target, "-o", program, source], 60)
    if compiled["code"] != 0:
        return {"status": "failed", "output": f"nvcc: {_status(compiled)}: {tail(compiled['text'])}"}
    ran = report.run([program], 30)
    ok = ran["code"] == 0 and "wrappers: ok" in ran["text"]
    seconds = round(compiled["seconds"] + ran["seconds"], 1)
    return {"status": "ok" if ok else "failed", "seconds": seconds, "output": tail(f"{_status(ran)}: {ran['text']}")}


def sanitize(report: Report) -> dict:
    """The tools side by side: each is slow, none is large."""
    cases = [sys.executable, "-m", "benchmarks.sanitize_cases", "--device", report.device]
    tool = find_program("compute-sanitizer") if report.device == "cuda" else None
    commands = {"without": cases}
    for name in SANITIZERS if tool else ():
        # Our kernels only. Errors of API calls are torch asking for functions that a driver may lack.
        options = ["--tool", name, "--error-exitcode", "86", "--report-api-errors", "no", "--kernel-regex", "kns=mos"]
        commands[name] = [tool, *options, *cases]
    # torch's allocator would hide a read behind the end of one tensor in the block of another.
    env = {**report.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
    limit = report.seconds_for("sanitize")
    runs, problems = {}, []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as files:
        started = {}
        for name, command in commands.items():
            log = files.enter_context((Path(folder) / name).open("wb"))
            started[name] = Process(command, env, log)
        deadline = time.monotonic() + limit
        try:
            for name, process in started.items():
                code, seconds = process.wait(deadline - time.monotonic())
                text = (Path(folder) / name).read_text(errors="replace")
                with report.log.open("a") as log:
                    log.write(f"\n$ {' '.join(map(str, commands[name]))}\n{text}")
                runs[name] = _sanitized(code, text) | {"seconds": seconds, "output": tail(text)}
        finally:
            for process in started.values():
                process._signal(signal.SIGKILL)
    for name in SANITIZERS:
        runs.setdefault(name, {"status": "not installed"})
    for name, run in runs.items():
        if run["status"] not in ("ok", "not installed", "not supported here"):
            problems.append(f"{name}: {run['status']}: {tail(run['output'], 600)}")
    return {"problems": problems, "tool": bool(tool), "runs": runs}


def _sanitized(code: int | None, text: str) -> dict:
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    status = "ok" if code == 0 and "sanitize cases: ok" in text else "failed"
    if code is None:
        status = "no time left"
    elif "Device not supported" in text:
        status = "not supported here"
    return {"status": status, "summary": summary[-1] if summary else None}


def bench(report: Report) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        end = time.monotonic() + report.seconds_for("bench")
        for attempt in range(5):
            left = end - time.monotonic()
            if left < 25 and attempt:
                break
            # Between the last item that starts and the end: the longest item, and the interpreter's own.
            command = [sys.executable, "-m", "benchmarks.kernels", "--json", path, "--device", report.device]
            command += ["--section", report.sections, "--seconds", str(round(max(left - 30, 10), 1)), "--resume"]
            ran = report.run(command, left)
            result = read_json(path) or {}
            if result.get("complete") or ran["code"] is None or not result:
                break
        # An error that breaks the process's GPU ends the process; the next one goes on behind it.
    found = problems(result)
    if not result:
        found.append(f"benchmarks: {_status(ran)}: {tail(ran['text'], 600)}")
    return {"problems": found, "attempts": attempt + 1, "goals": goals(result), **result}


PARTS = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}


# ------------------------------------------------------------------------------------------------ the whole


def run_part(report: Report, name: str) -> dict:
    began = time.monotonic()
    print(f"{name}: at most {report.seconds_for(name):.0f} s", flush=True)
    try:
        result = PARTS[name](report)
    except Exception as error:  # a part's own mistake must not cost the others
        result = {"problems": [f"{type(error).__name__}: {error}"]}
    seconds = round(time.monotonic() - began, 1)
    status = "failed" if result["problems"] else "ok"
    result = {"part": name, "status": status, "seconds": seconds, "environment": report.environment, **result}
    write_json(report.out / f"{name}.json", scrub(result))
    print(f"{name}: {status} in {seconds} s", flush=True)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--part", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--section", default="ceilings,layers,serving,operators,launches,peers", help="of the benchmarks"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    asked = [p for p in PARTS if p in options.part.split(",")]
    if unknown := set(options.part.split(",")) - set(PARTS):
        parser.error(f"--part must name some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, options.device, asked, options.section)
    if options.device == "cuda" and report.environment["gpu"] is None:
        parser.error("torch sees no GPU here; --device cpu tests the report without one")
    results = {name: run_part(report, name) for name in asked}
    parts = {name: results.get(name) or read_json(out / f"{name}.json") for name in PARTS}
    merged = {
        "environment": report.environment,
        "device": options.device,
        "seconds": round(time.monotonic() - report.began, 1),
        "parts": {name: part for name, part in parts.items() if part},
    }
    write_json(out / "report.json", scrub(merged))
    text = scrub(report_text(merged))
    (out / "report.md").write_text(text + "\n")
    print(f"\n{text}", flush=True)
    return 1 if any(part["status"] != "ok" for part in results.values()) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out every started program is ended
    sys.exit(main())
