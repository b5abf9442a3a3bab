"""python -m benchmarks.metamathqa --peft DIR: MoS in PEFT's comparison on MetaMathQA, by PEFT's own script."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXPERIMENTS = Path("experiments", "mos")  # below HERE: PEFT's script takes no longer path
SCRIPT = Path("method_comparison", "MetaMathQA", "run.py")
NEEDED = (".git", "src/peft/__init__.py", str(SCRIPT))  # in a checkout; the script asks git for PEFT's branch
FOLDERS = {  # of results, in PEFT's words: finished on branch main, on another branch, not finished
    "RESULT_PATH": "results",
    "RESULT_PATH_TEST": "temporary_results",
    "RESULT_PATH_CANCELLED": "cancelled_results",
}
PYTHON = (3, 12)  # the script's; on older ones it loses the size of the adapter's file
PACKAGES = ("bitsandbytes", "datasets", "peft", "tqdm", "transformers")


class Refused(Exception):
    """What was asked for cannot be run: argument, rule, value, and what helps."""


def names() -> list[str]:
    return sorted(path.name for path in (HERE / EXPERIMENTS).iterdir())


def check_checkout(checkout: Path) -> None:
    if missing := [part for part in NEEDED if not (checkout / part).exists()]:
        raise Refused(
            f"--peft must be a git checkout of PEFT's repository, got {checkout}, which has no {missing[0]}: "
            "git clone https://github.com/huggingface/peft"
        )


def model_of(checkout: Path, name: str) -> str:
    """The model that an experiment names, or else PEFT's defaults."""
    own = HERE / EXPERIMENTS / name / "training_params.json"
    defaults = json.loads((checkout / SCRIPT.parent / "default_training_params.json").read_text())
    return {**defaults, **(json.loads(own.read_text()) if own.exists() else {})}["model_id"]


def check_machine(model_id: str) -> None:
    """Everything that would otherwise fail late, or in words that do not help."""
    import torch

    if sys.version_info[:2] < PYTHON:
        raise Refused(
            f"python must be at least {PYTHON[0]}.{PYTHON[1]} for PEFT's script, got {sys.version.split()[0]}"
        )
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise Refused(f"packages must include {', '.join(PACKAGES)}, got no {missing[0]}: pip install {missing[0]}")
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise Refused(
            f"torch must see a CUDA or XPU device for PEFT's script, got none with torch {torch.__version__}: it "
            "takes a GPU of 24 GiB, and a build of torch for it, https://pytorch.org/get-started"
        )
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(model_id, "config.json")
    except Exception as error:  # no network, no token, no licence
        raise Refused(
            f"model_id must be a model that can be downloaded, got {model_id}: {type(error).__name__}; accept its "
            f"licence at https://huggingface.co/{model_id} and log in with `hf auth login`"
        ) from error


def use(checkout: Path, out: Path):
    """Makes PEFT the checkout's, which comes to know MoS, and sends results to ``out``; PEFT's module of utilities."""
    sys.path[:0] = [str(checkout / SCRIPT.parent), str(checkout / "src")]
    import mos_ext.integrations.peft  # noqa: F401

    utils = importlib.import_module("utils")
    for variable, folder in FOLDERS.items():
        if not hasattr(utils, variable):
            raise Refused(
                f"--peft must have {variable} in {SCRIPT.with_name('utils.py')}, got {checkout} without: it says where "
                "results go"
            )
        (out / folder).mkdir(parents=True, exist_ok=True)
        setattr(utils, variable, str(out / folder))
    return utils


def run(checkout: Path, name: str, out: Path, arguments: Sequence[str] = ()) -> Path:
    """Runs PEFT's script on an experiment in this process, which :func:`use` has prepared; the file of its result."""

    def there() -> set[tuple[Path, int]]:
        return {
            (file, file.stat().st_mtime_ns) for folder in FOLDERS.values() for file in (out / folder).glob("*.json")
        }

    before = there()
    os.chdir(HERE)
    sys.argv = ["run.py", "-v", str(EXPERIMENTS / name), *arguments]
    runpy.run_path(str(checkout / SCRIPT), run_name="__main__")
    if not (new := there() - before):
        raise Refused(f"{SCRIPT} must write a result to {out}, got none: this checkout's does something else")
    return new.pop()[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.metamathqa",
        description=__doc__,
        epilog="More arguments go to PEFT's run.py: --clean.",
    )
    parser.add_argument("--peft", type=Path, required=True, help="a git checkout of PEFT's repository")
    parser.add_argument("--experiment", choices=names(), help="one only, in this process; default: one after another")
    parser.add_argument(
        "--out", type=Path, default=Path("build", "metamathqa"), help="for results (default: %(default)s)"
    )
    options, arguments = parser.parse_known_args(argv)
    checkout, out = options.peft.resolve(), options.out.resolve()
    try:
        check_checkout(checkout)
        for name in [options.experiment] if options.experiment else names():
            check_machine(model_of(checkout, name))
        if not options.experiment:  # a process each: the script wants a device that nothing has used
            command = [sys.executable, "-m", "benchmarks.metamathqa", "--peft", str(checkout), "--out", str(out)]
            codes = [subprocess.call([*command, "--experiment", name, *arguments], cwd=ROOT) for name in names()]
            return int(any(codes))  # one that was killed has a negative one
        use(checkout, out)
        result = run(checkout, options.experiment, out, arguments)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    info = json.loads(result.read_text())
    status = info["train_info"]["status"]
    print(f"wrote {result}: {status} {info['run_info']['error_msg']}".rstrip())
    return int(status != "success")


if __name__ == "__main__":
    sys.exit(main())
