"""The wheel beside every Python, torch, PEFT and transformers that it promises: `make matrix`.

    python tests/matrix.py --wheel dist                                                  # every cell
    python tests/matrix.py --wheel dist --python 3.12 --torch 2.13 --libraries newest    # one of them, or any other
    python tests/matrix.py --wheel dist --list                                           # the cells, as JSON

A cell is a new virtual environment with one Python, one torch, the other libraries (numpy, safetensors, PEFT and
transformers) at the oldest version that the wheel promises or at the newest that pip finds, and the wheel, the same file
in all of them. `python -m mos_ext` and the core of the suite run in it. Every Python meets the oldest torch with the
oldest libraries and the newest with the newest; one Python meets each torch between, too.

Each cell is a row of RESULTS in place of the one of its name, and docs/install.md shows the rows. A Python is looked
for on PATH as `python3.12` (with pyenv, PYENV_VERSION=3.11:3.12 puts several there); a cell whose Python is not there
is a row that says so. torch comes without NVIDIA's libraries: tests/torch_versions.py says how.
"""

import argparse
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from torch_versions import CORE, newest, run, stand_ins

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "matrix.csv", ROOT / "docs" / "install.md"
BUILD = ROOT / "build" / "matrix"
SOURCES = ("csrc", "mos_ext", "tests", "setup.py", "pyproject.toml")  # what a row is of

EVERY_TORCH = "3.11"  # the Python that meets each
CORE = (
    *(name for name in CORE if name != "layers"),
    "grouped",
    "adapt",
    "merging",
    "checkpoint",
    "peft",
    "serving",
)  # of the wheel
EXPERTS = ("experts", "experts_peft", "serving_experts", "lora")
NO_EXPERTS = "experts: transformers 4 has no stacks of them"
TOOLS = ("pytest", "pytest-xdist", "hypothesis")
# The oldest that has a wheel for a Python, where the oldest promised has none.
OLDEST_WHEEL = {("3.13", "numpy"): "2.1"}
NVIDIA = re.compile(r"^Requires-Dist: (cuda|nvidia|triton).*\n", re.MULTILINE)  # stood in for, or not imported

LIBRARIES = ("numpy", "safetensors", "peft", "transformers")
COLUMNS = ("Python", "torch", *LIBRARIES, "passed", "failed", "skipped", "seconds", "date", "commit", "not run")
FIELDS = ("cell", *COLUMNS, "machine")


class Cell(NamedTuple):
    python: str
    torch: str  # 2.12, newest, or nightly
    libraries: str  # oldest or newest

    def __str__(self):
        return f"python{self.python}-torch-{self.torch}-{self.libraries}"


def promises(wheel):
    """The Pythons that a wheel's metadata name, and the oldest version of each library that it needs."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    pythons = re.findall(r"^Classifier: Programming Language :: Python :: (3\.\d+)$", text, re.MULTILINE)
    return pythons, dict(re.findall(r"^Requires-Dist: ([\w-]+)>=([\d.]+)", text, re.MULTILINE))


def cells(pythons, oldest, newest):
    minors = range(*(int(version.split(".")[1]) for version in (oldest, newest)))
    return [
        *(Cell(python, oldest, "oldest") for python in pythons),
        *(Cell(EVERY_TORCH, f"2.{minor}", "newest") for minor in minors[1:]),
        *(Cell(python, "newest", "newest") for python in pythons),
    ]


def clean(**more):
    """The environment, without what would put the working tree's package or another's settings into a cell."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MOS_EXT_DISABLE_NATIVE")} | more


def interpreter(version):
    """The Python of a version, or None; what is on PATH may be a script that finds nothing."""
    name = shutil.which(f"python{version}")
    code = "import sys; print(sys.executable, '%d.%d' % sys.version_info[:2])"
    found = subprocess.run([name, "-c", code], capture_output=True, text=True) if name else None
    executable, _, is_version = found.stdout.strip().rpartition(" ") if found else ("", "", "")
    return executable if is_version == version else None


def install(cell, executable, folder, wheel, oldest, index):
    """A new environment with all that the cell is made of; its Python, and the variables it is run with."""
    run(executable, "-m", "venv", "--clear", folder)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = {"newest": ["torch"], "nightly": ["--pre", "torch"]}.get(cell.torch, [f"torch=={cell.torch}.*"])
    run(*pip, "--no-deps", *(["--index-url", index] if index else []), *torch, env=clean())
    (site,) = (folder / "lib").glob("python*/site-packages")
    (metadata,) = site.glob("torch-*.dist-info/METADATA")
    metadata.write_text(NVIDIA.sub("", metadata.read_text()))
    stand_ins(site / "torch" / "lib", folder / "stand_ins")
    pins = []
    if cell.libraries == "oldest":
        wanted = {name: OLDEST_WHEEL.get((cell.python, name), oldest[name]) for name in LIBRARIES}
        pins = [f"{name}=={version}" for name, version in wanted.items()]
    run(*pip, *pins, *TOOLS, f"{wheel}[peft]", env=clean())
    return python, clean(LD_LIBRARY_PATH=f"{folder / 'stand_ins'}:{os.environ.get('LD_LIBRARY_PATH', '')}")


def check(python, environment, folder):
    """Runs the wheel's own test and the core of the suite; what to say of them, by column."""
    inside = {"cwd": folder, "env": environment}
    about = json.loads(run(python, "-m", "mos_ext", "--json", **inside, stdout=subprocess.PIPE).stdout)
    library = about["libraries"]["_C"]
    if not library["loaded"] or folder not in Path(library["path"]).parents:
        raise RuntimeError(f"the wheel's _C must be loaded, got {library}")
    listed = run(python, "-m", "pip", "list", "--format", "json", **inside, stdout=subprocess.PIPE).stdout
    versions = {package["name"]: package["version"] for package in json.loads(listed)}

    experts = int(versions["transformers"].split(".")[0]) >= 5
    tests = [ROOT / "tests" / f"test_{name}.py" for name in (*CORE, *(EXPERTS if experts else ()))]
    options = ["-q", "-n", "auto", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    command = [python, "-m", "pytest", *options, "--junitxml", folder / "results.xml", *tests]
    subprocess.run([str(word) for word in command], **inside)
    (suite,) = ElementTree.parse(folder / "results.xml").getroot().iter("testsuite")
    count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    reasons = {element.get("message") for element in suite.iter("skipped")} | set([] if experts else [NO_EXPERTS])
    return {
        "Python": about["environment"]["python"],
        "torch": about["environment"]["torch"],
        **{name: versions[name] for name in LIBRARIES},
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
        "not run": "; ".join(sorted(reasons)),
        "machine": f"{platform.system()} {platform.machine()}, {about['environment']['cpu']}",
    }


def run_cell(cell, wheel, oldest, index):
    started, folder = time.perf_counter(), BUILD / str(cell)
    log, diff = ("log", "-1", "--format=%h"), ("diff", "--quiet", "HEAD")
    commit = run("git", *log, "--", *SOURCES, cwd=ROOT, stdout=subprocess.PIPE).stdout.strip()
    commit += " (modified)" if subprocess.run(["git", *diff, "--", *SOURCES], cwd=ROOT).returncode else ""
    row = dict.fromkeys(FIELDS, "") | {"cell": str(cell), "Python": cell.python, "torch": cell.torch, "commit": commit}
    row["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    executable = interpreter(cell.python)
    if executable is None:
        return row | {"not run": f"anything: no python{cell.python} on this machine"}
    try:
        python, environment = install(cell, executable, folder, wheel, oldest, index)
    except subprocess.CalledProcessError:  # pip has said why
        return row | {
            "not run": f"anything: pip did not install torch {cell.torch} with the {cell.libraries} libraries"
        }
    row |= check(python, environment, folder)
    if not row["failed"]:
        shutil.rmtree(folder)  # torch has 2 GB
    return row | {"seconds": round(time.perf_counter() - started)}


def read():
    with RESULTS.open(newline="") as stream:
        return list(csv.DictReader(stream))


def minor(version):
    return re.findall(r"\d+", version)[:2]


def table(rows):
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([row[name] for name in COLUMNS] for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def write(row):
    """Puts a row among the results, and these on the page."""
    rows = {r["cell"]: r for r in (read() if RESULTS.exists() else [])} | {row["cell"]: row}
    ordered = sorted(rows.values(), key=lambda r: [int(n) for name in COLUMNS[:2] for n in minor(r[name])])
    with RESULTS.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    before, start, rest = PAGE.read_text().partition("<!-- matrix -->\n")
    PAGE.write_text(f"{before}{start}{table(ordered)}{rest[rest.index('<!-- /matrix -->') :]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="a wheel, or a folder, of which the newest is taken")
    parser.add_argument("--python", help="major.minor")
    parser.add_argument("--torch", default="newest", help="major.minor, newest or nightly")
    parser.add_argument("--libraries", default="newest", choices=("oldest", "newest"))
    parser.add_argument("--index", help="where pip looks for torch, and for nothing else")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    found = list(options.wheel.glob("*.whl")) if options.wheel.is_dir() else [options.wheel]
    wheel = max(found, key=lambda file: file.stat().st_mtime).resolve()
    pythons, oldest = promises(wheel)
    if options.python:
        chosen = [Cell(options.python, options.torch, options.libraries)]
    else:
        chosen = cells(pythons, oldest["torch"], newest())
    if options.list:
        print(json.dumps([cell._asdict() for cell in chosen]))
        return
    rows = []
    for cell in chosen:
        print(f"matrix: {cell}", flush=True)
        rows.append(run_cell(cell, wheel, oldest, options.index))
        write(rows[-1])
    print(table(rows))
    if any(row["failed"] != 0 for row in rows):
        sys.exit(f"matrix: not every cell passed; those that did not are left in {BUILD.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
