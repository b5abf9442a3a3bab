"""Virtual environments that cost a second: what is installed already, by links, and nothing else."""

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def bare_environment(folder, *names, pip=False):
    """A virtual environment of installed distributions of these names and of what they require.

    With `pip`, also what Python itself puts into a new one. Returns its Python and where it installs to.
    """
    subprocess.run([sys.executable, "-m", "venv", *([] if pip else ["--without-pip"]), folder], check=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": folder, "platbase": folder}))
    links = folder.with_name(f"{folder.name}-links")  # outside, where pip replaces nothing
    links.mkdir()
    (site / "links.pth").write_text(f"{links}\n")
    wanted, seen = list(names), {"pip", "setuptools"} if pip else set()
    while wanted:
        name = wanted.pop()
        if name in seen or not (found := next(iter(metadata.distributions(name=name)), None)):
            continue  # those that are not installed do not matter: torch's CUDA libraries beside its CPU build
        seen.add(name)
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(found.locate_file(top))
        for requirement in map(Requirement, found.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
    return folder / "bin" / "python", site
