"""The matrix of versions, short of running it: which cells there are, what the page says of them, and the workflow that runs them."""

import re
import sys
import zipfile
from pathlib import Path

import matrix
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
METADATA = """Name: mos_ext
Classifier: Programming Language :: Python :: 3
Classifier: Programming Language :: Python :: 3.11
Classifier: Programming Language :: Python :: 3.12
Requires-Dist: torch>=2.11
Requires-Dist: numpy>=1.26
Requires-Dist: peft>=0.21; extra == "peft"
"""


@pytest.fixture
def wheel(tmp_path):
    file = tmp_path / "mos_ext-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("mos_ext-0.1.0.dist-info/METADATA", METADATA)
    return file


def test_what_a_wheel_promises(wheel):
    assert matrix.promises(wheel) == (["3.11", "3.12"], {"torch": "2.11", "numpy": "1.26", "peft": "0.21"})


def test_cells():
    """Each Python at both ends, one with each torch between."""
    assert [tuple(cell) for cell in matrix.cells(["3.10", "3.11"], "2.11", "2.14.1+cpu")] == [
        ("3.10", "2.11", "oldest"),
        ("3.11", "2.11", "oldest"),
        ("3.11", "2.12", "newest"),
        ("3.11", "2.13", "newest"),
        ("3.10", "newest", "newest"),
        ("3.11", "newest", "newest"),
    ]


def test_a_python_that_is_not_there(tmp_path, monkeypatch):
    """No such name on PATH, or a script of that name that finds no Python, or another Python."""
    this = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert matrix.interpreter("3.9") is None
    for version, script in (("3.9", "#!/bin/sh\nexit 127\n"), ("3.8", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        file = tmp_path / f"python{version}"
        file.write_text(script)
        file.chmod(0o755)
        assert matrix.interpreter(version) is None
    (tmp_path / "python3.8").rename(tmp_path / f"python{this}")
    assert Path(matrix.interpreter(this)).samefile(sys.executable)


def test_the_page_shows_the_committed_rows():
    page = matrix.PAGE.read_text()
    assert matrix.table(matrix.read()) in page
    assert matrix.NO_EXPERTS in page


def test_every_promised_python_was_run_at_both_ends_and_nothing_failed():
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    oldest = re.search(r'"torch>=([\d.]+)"', PROJECT).group(1)
    rows = {row["cell"]: row for row in matrix.read()}
    for python in pythons:
        for torch, libraries in ((oldest, "oldest"), ("newest", "newest")):
            row = rows[str(matrix.Cell(python, torch, libraries))]
            assert row["passed"] or row["not run"].startswith("anything: ")
    assert {row["failed"] for row in rows.values()} <= {"0", ""}
    assert any(row["passed"] for row in rows.values())
    assert f'requires-python = ">={pythons[0]}"' in PROJECT
    assert matrix.EVERY_TORCH in pythons


# ------------------------------------------------------------------------------------------------ the workflow


def steps(key):
    return [step for job in WORKFLOW["jobs"].values() for step in job["steps"] if key in step]


def test_the_workflow_calls_targets_of_the_makefile():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    called = [word for step in steps("run") for word in re.findall(r"make (?:--\S+ )*(\S+)", step["run"])]
    targets = WORKFLOW["jobs"]["check"]["strategy"]["matrix"]["target"]
    assert called == ['"$TARGET"', "wheel", "matrix", "matrix", "matrix"]
    assert {"wheel", "matrix", *targets} <= set(phony)


def test_the_workflow_names_what_there_is():
    """Expressions with a name that nobody defined are empty there, not errors."""
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    jobs = WORKFLOW["jobs"]
    for job, output in re.findall(r"needs\.(\w+)\.outputs\.(\w+)", text):
        assert output in jobs[job]["outputs"]
    ids = {step["id"] for step in steps("id")}
    assert set(re.findall(r"steps\.(\w+)\.outputs", text)) == ids
    assert set(re.findall(r"matrix\.cell\.(\w+)", text)) <= set(matrix.Cell._fields)
    assert all(job["timeout-minutes"] and job["permissions"] == {"contents": "read"} for job in jobs.values())
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"]) for step in steps("uses"))
