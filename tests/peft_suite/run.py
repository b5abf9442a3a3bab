"""Runs PEFT's own test suite, the tests that take a method as a parameter, with MoS as the method.

    python tests/peft_suite/run.py [--out build/peft-suite] [-n 2] [pytest arguments]

PEFT's tests come from the source distribution of the installed version and stay in ``--out``; the models they load from
the hub are made here, tiny and random (tiny_hub.py); mos_cases.py gives the tests their MoS cases. Nothing but the
package index is reached for. ``report.json`` and ``report.txt`` in ``--out`` say what passed, failed and was skipped
why. The exit status is 0 if and only if something passed and nothing failed.

Tests are named as they are printed: ``run.py tests/test_config.py``, or ``run.py -k "gpt2 and merge"``.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# Every file that has a case for MoS in mos_cases.py.
FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_low_level_api.py",
    "test_other.py",
    "test_quantization.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_torch_compile.py",
)


def fetch(out: Path, version: str) -> Path:
    """The folder that holds ``tests/`` of that version of PEFT."""
    source = out / f"peft-{version}"
    if (source / "tests" / "__init__.py").exists():
        return source
    archive = out / f"peft-{version}.tar.gz"
    if not archive.exists():
        options = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--dest", str(out)]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, f"peft=={version}"], check=True)
    with tarfile.open(archive) as tar:
        prefix = f"{source.name}/tests/"
        tar.extractall(out, [m for m in tar.getmembers() if m.name.startswith(prefix)], filter="data")
    # The tests import one another as a package; the distribution leaves out the file that makes them one.
    (source / "tests" / "__init__.py").touch()
    return source


def environment(out: Path) -> dict[str, str]:
    paths = [str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_CACHE": str(out / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",  # or test_torch_compile.py leaves itself out
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "peft-suite")
    options, arguments = parser.parse_known_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    source = fetch(out, metadata.version("peft"))
    env = environment(out)
    subprocess.run([sys.executable, str(HERE / "tiny_hub.py"), env["HF_HUB_CACHE"]], env=env, check=True)

    report = out / "report.json"
    report.unlink(missing_ok=True)
    ini = out / "pytest.ini"  # in place of PEFT's own, which asks for pytest-cov
    ini.write_text("[pytest]\n")
    if not any(".py" in argument for argument in arguments):
        arguments += [f"tests/{name}" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-c", str(ini), "--rootdir", str(source), "-q", "-p", "no:cacheprovider"]
    command += ["-p", "mos_cases", "--mos-report", str(report), *arguments]
    status = subprocess.run(command, cwd=source, env=env).returncode

    if not report.exists():
        print("peft-suite: there is no report", file=sys.stderr)
        return status or 1
    result = json.loads(report.read_text())
    line = (
        f"peft-suite: peft {result['peft']}, {result['passed']} passed, {len(result['failed'])} failed, "
        f"{sum(result['skipped'].values())} skipped, {result['seconds']:.0f} s"
    )
    (out / "report.txt").write_text(line + "\n")
    for reason, count in result["skipped"].items():
        print(f"  skipped {count:4d}  {reason}")
    print(line)
    return status or int(bool(result["failed"]) or not result["passed"])


if __name__ == "__main__":
    sys.exit(main())
