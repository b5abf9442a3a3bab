"""What every benchmark shares: shapes, the timer, the record of machine and commit. Imports torch, not mos_ext.

python -m benchmarks.harness         prints the record
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import platform
import shutil
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or the profiler talks

import torch

ROOT = Path(__file__).resolve().parent.parent
COMMIT_VARIABLE = "MOS_EXT_COMMIT"  # for a copy of the sources without git
PACKAGES = ("numpy", "triton", "peft", "transformers", "pytest", "pytest-xdist", "hypothesis")

Step = Callable[[], object]


# ------------------------------------------------------------------------------------------------ shapes


@dataclass(frozen=True)
class Sizes:
    """What is measured. The order of ``shapes`` and the roles of the rows are those of the table of goals."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 14336), (14336, 4096))  # in -> out
    long: int = 8192
    medium: int = 2048
    decode: tuple[int, ...] = (16, 1)
    r: int = 16
    ranks: tuple[int, int] = (8, 64)
    l: int = 4
    dropout: float = 0.1
    modules: int = 32  # that share a pool, for scatter_add
    adapters: tuple[int, ...] = (1, 8, 64)  # in a decode step of as many rows as the last
    copy_bytes: int = 1 << 30
    gemm: int = 8192
    rounds: int = 40
    seconds: float = 2.0  # the most that one measurement's rounds take
    sample_us: float = 500.0  # a sample is at least this long
    peers: tuple[str, ...] = ("vblora", "unilora", "mos_compiled", "peft_compiled")


REAL = Sizes()
# The timer of a CPU. A sample of a few milliseconds outlasts an interrupt; five rounds where one step takes longer.
CPU = Sizes(rounds=100, seconds=2.0, sample_us=3000.0, copy_bytes=1 << 27, gemm=2048)
# Runs every line of the benchmarks on a CPU in seconds; what it measures means nothing.
SMOKE = Sizes(
    shapes=((32, 32), (32, 64), (64, 32)),
    long=24,
    medium=16,
    decode=(2, 1),
    r=4,
    ranks=(2, 8),
    l=2,
    modules=3,
    adapters=(1, 2, 4),
    copy_bytes=1 << 12,
    gemm=32,
    rounds=2,
    seconds=0.2,
    sample_us=0.0,
    peers=("vblora", "unilora"),
)


def sizes_for(device: str) -> Sizes:
    return REAL if device == "cuda" else SMOKE


# ------------------------------------------------------------------------------------------------ the record


def find_program(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or where toolkits are usually put."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(h) / "bin" / name for h in homes if h]
    if found := shutil.which(name):
        return found
    return next((str(p) for p in places if p.exists()), None)


def _output(*command: str | None) -> str | None:
    """What a command prints, or None: a record must not fail."""
    if command[0] is None:
        return None
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() if out.returncode == 0 else None


def commit() -> dict[str, object]:
    """The commit and whether tracked files differ from it; from the environment variable where git cannot say."""
    revision = _output("git", "rev-parse", "HEAD")
    if revision:
        changed = _output("git", "status", "--porcelain", "--untracked-files=no")
        return {"commit": revision, "modified": None if changed is None else bool(changed)}
    return {"commit": os.environ.get(COMMIT_VARIABLE) or "unknown", "modified": None}


SMI = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks and power as nvidia-smi reads them now."""
    program = find_program("nvidia-smi")
    line = _output(program, f"--query-gpu={','.join(SMI)}", "--format=csv,noheader")
    if not line:
        return None
    return dict(zip(SMI, (v.strip() for v in line.splitlines()[0].split(",")), strict=False))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def environment() -> dict[str, object]:
    """Commit, date, hardware and versions; goes into every result."""
    record: dict[str, object] = {
        **commit(),
        "date": now(),
        "python": platform.python_version(),
        # Not platform.platform(): kernel names say where a machine stands, not how fast it is.
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "gpu": None,
    }
    nvcc = _output(find_program("nvcc"), "--version")
    record["nvcc"] = nvcc.splitlines()[-1] if nvcc else None
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        record["gpu"] = {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "l2_mib": round(p.L2_cache_size / 2**20, 1),
            "count": torch.cuda.device_count(),
            **(gpu_state() or {}),
        }
    return record


def scrub(value):
    """``value`` without the folders and the kernel name of this machine, at any depth: results are published."""
    if isinstance(value, str):
        for name, replacement in _private():
            value = value.replace(name, replacement)
        return value
    if isinstance(value, Mapping):
        return {k: scrub(v) for k, v in value.items()}
    return [scrub(v) for v in value] if isinstance(value, (list, tuple)) else value


def _private() -> list[tuple[str, str]]:
    folders = [(str(ROOT), "."), *((p, "<site-packages>") for p in site.getsitepackages())]
    folders += [(sys.prefix, "<python>"), (sys.base_prefix, "<python>"), (tempfile.gettempdir(), "<tmp>")]
    folders += [(str(Path.home()), "~")]
    names = [(f, r) for f, r in folders if len(f) > 4 and f not in ("/usr", "/usr/local")]
    return [*names, (platform.platform(), f"{platform.system()} {platform.machine()}")]


def write_json(path: Path, value: object) -> None:
    """All or nothing: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def importable(name: str) -> str | None:
    """Why a package cannot be imported; None when it can."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken optional package is as good as none
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


# ------------------------------------------------------------------------------------------------ the timer


_stream = None


@contextlib.contextmanager
def on_stream(device: str) -> Iterator[None]:
    """The one stream on which everything is built, warmed up, captured and timed.

    Autograd runs each node of a backward pass on the stream that its forward pass ran on. A graph can only be captured
    when that is the captured stream, for nodes made long before (the handles of a pool) too.
    """
    global _stream
    if device != "cuda":
        yield
        return
    _stream = _stream or torch.cuda.Stream()
    _stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_stream):
        yield


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def input_sets(bytes_of_a_set: float, device: str, most: int = 32) -> int:
    """How many sets of inputs to go round, so that none is in the L2 cache when its turn comes again."""
    if device != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(most, math.ceil(3 * cache / max(bytes_of_a_set, 1))))


@dataclass
class Timing:
    """Microseconds of one step: the median, and the 20 % and 80 % quantiles of the samples.

    ``ratio`` likewise, of the quotients with the frozen linear's sample of the same round: what disturbs a whole round
    is not in it.
    """

    us: float
    us_q20: float
    us_q80: float
    samples: int
    timer: str  # graph: replays of a CUDA graph; events: eager, launch gaps included; wall: a CPU's clock
    steps_per_sample: int
    note: str = ""
    ratio: float | None = None
    ratio_q20: float | None = None
    ratio_q80: float | None = None

    def row(self) -> dict[str, object]:
        row = {k: v for k, v in asdict(self).items() if v is not None and v != ""}
        for names, digits in ((("us", "us_q20", "us_q80"), 3), (("ratio", "ratio_q20", "ratio_q80"), 4)):
            row.update({k: round(row[k], digits) for k in names if k in row})
        return row


def _quantile(ordered: Sequence[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the 20 % and 80 % quantiles."""
    ordered = sorted(samples)
    return _quantile(ordered, 0.5), _quantile(ordered, 0.2), _quantile(ordered, 0.8)


def _capture(steps: Sequence[Step], repeats: int):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream):
        for _ in range(repeats):
            for step in steps:
                step()
    return graph


def _once_us(replay: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


class _Run:
    """The steps of one provider, ready to be replayed: one call per sample."""

    def __init__(self, steps: Sequence[Step], device: str, sample_us: float) -> None:
        self.repeats, self.timer, self.note = 1, "wall", ""
        took = math.inf
        for k in range(5):  # the first call makes what is made once
            began = time.perf_counter()
            for step in steps:
                step()
            took = min(took, time.perf_counter() - began)
            if k > 0 and (device == "cuda" or took * 1e6 > sample_us):
                break
        synchronize(device)
        if device == "cpu":
            self.repeats = max(1, min(1000, math.ceil(sample_us / max(took * 1e6, 1.0))))
        if device == "cuda":
            try:
                self.replay = self._captured(steps, sample_us)
            except Exception as error:  # whatever a provider does that a graph cannot hold
                with contextlib.suppress(Exception):
                    torch.cuda.synchronize()
                self.repeats, self.timer = 1, "events"
                self.note = f"no graph: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                for step in steps:  # raises when the device itself is gone
                    step()
                torch.cuda.synchronize()
        if self.timer != "graph":
            self.replay = lambda: [step() for _ in range(self.repeats) for step in steps] and None
        self.inputs = len(steps)
        self.samples: list[float] = []

    @property
    def steps(self) -> int:
        """In a sample."""
        return self.inputs * self.repeats

    def _captured(self, steps: Sequence[Step], sample_us: float) -> Step:
        graph = _capture(steps, 1)
        graph.replay()
        took = min(_once_us(graph.replay) for _ in range(3))
        self.repeats = max(1, min(200, math.ceil(sample_us / max(took, 1.0))))
        if self.repeats > 1:
            graph = _capture(steps, self.repeats)
            graph.replay()
        torch.cuda.synchronize()
        self.timer = "graph"
        return graph.replay


def measure(
    providers: Mapping[str, Sequence[Step]],
    device: str,
    sizes: Sizes,
    base: Callable[[str], str] = lambda name: "frozen",
) -> dict[str, Timing]:
    """Times every provider's steps. Call inside ``on_stream``, with steps made there.

    A provider is a list of steps, equal but for their inputs, one per set of inputs; a sample runs all of them. The
    providers take turns within every round, so that clocks and temperature treat them alike. ``base`` names the
    provider whose sample of the same round a provider's is divided by.
    """
    runs = {name: _Run(steps, device, sizes.sample_us) for name, steps in providers.items()}
    order = list(runs.values())
    if device == "cpu":  # the same for all: what a step costs depends on how often it has just run
        most = max(run.repeats for run in order)
        for run in order:
            run.repeats = most
    began = time.perf_counter()
    for k in range(sizes.rounds):
        turn = order[k % len(order) :] + order[: k % len(order)]
        if device == "cuda":
            _gpu_round(turn)
        else:
            for run in turn:
                start = time.perf_counter()
                run.replay()
                run.samples.append((time.perf_counter() - start) * 1e6 / run.steps)
        if time.perf_counter() - began > sizes.seconds and k >= 4:
            break
    timings = {}
    for name, run in runs.items():
        timing = Timing(*_quantiles(run.samples), len(run.samples), run.timer, run.steps, run.note)
        if (floor := runs.get(base(name))) is not None:
            pairs = zip(run.samples, floor.samples, strict=True)
            timing.ratio, timing.ratio_q20, timing.ratio_q80 = _quantiles([a / max(b, 1e-9) for a, b in pairs])
        timings[name] = timing
    return timings


def _gpu_round(turn: Sequence[_Run]) -> None:
    # The GPU starts behind the host and stays there: no sample contains the time in which its graph was launched.
    torch.cuda._sleep(1_000_000)
    marks = []
    for run in turn:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run.replay()
        end.record()
        marks.append((run, start, end))
    torch.cuda.synchronize()
    for run, start, end in marks:
        run.samples.append(start.elapsed_time(end) * 1e3 / run.steps)


# ------------------------------------------------------------------------------------------------ ceilings


def normal(*shape: int, dtype: torch.dtype, device: str, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).mul_(std).to(dtype)


def copy_ceiling(sizes: Sizes, device: str, size: int) -> dict[str, object]:
    """A copy of ``size`` bytes, as fast as the fastest fifth: a ceiling."""
    count = input_sets(2 * size, device)
    source = [normal(size // 2, dtype=torch.bfloat16, device=device) for _ in range(count)]
    target = [torch.empty_like(s) for s in source]
    steps = [functools.partial(t.copy_, s) for t, s in zip(target, source, strict=True)]
    timing = measure({"copy": steps}, device, sizes)["copy"]
    return {"what": "copy", "bytes": 2 * size, "gb_s": round(2 * size / timing.us_q20 / 1e3, 1), **timing.row()}


def gemm_ceiling(sizes: Sizes, device: str, dtype: torch.dtype) -> dict[str, object]:
    """A large square product, as fast as the fastest fifth."""
    n = sizes.gemm
    a, b = (normal(n, n, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    timing = measure({"gemm": [lambda: torch.mm(a, b.t(), out=out)]}, device, sizes)["gemm"]
    return {"what": "gemm", "n": n, "tflop_s": round(2 * n**3 / timing.us_q20 / 1e6, 4), **timing.row()}


# ------------------------------------------------------------------------------------------------ memory, launches


def peak_extra_bytes(step: Step, device: str) -> int | None:
    """The most memory that a step held beyond what was there before, outputs included."""
    step()
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Step, known: Sequence[torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward: each storage once, those of ``known`` (parameters) not."""
    apart = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in apart)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The profiler announces itself on standard error, from C++ and at any log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def launches(step: Step, device: str) -> list[str]:
    """Names of what a step runs on the GPU (kernels, copies, fills), in order. On a CPU: of its operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    kind = torch.autograd.DeviceType.CPU
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        kind = torch.autograd.DeviceType.CUDA
    synchronize(device)
    with _silent(), torch.profiler.profile(activities=activities) as profile:
        step()
        synchronize(device)
    events = [e for e in profile.events() if e.device_type == kind and not getattr(e, "is_user_annotation", False)]
    return [e.name for e in sorted(events, key=lambda e: e.time_range.start)]


def release(device: str) -> None:
    """Between cases: what graphs and autograd held goes back."""
    importlib.import_module("gc").collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    print(json.dumps(environment(), indent=1))
