"""The directory of an adapter: its files, written whole, read checked. ``docs/format.md`` is the format."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
FORMAT_VERSION = 2
# Temporary files are of saves that died when they are this much older than one that is written now, by the clock of
# the file system. (Writing an adapter of gigabytes takes minutes.)
_STALE_SECONDS = 3600
_replacing = threading.Lock()  # threads that save into one directory leave the files of one of them
_FRONT_MATTER = re.compile(rb"\A---\r?\n.*?\n---\r?\n", re.DOTALL)
_NOTE = """\
```python
import mos_ext.integrations.peft  # before loading: it registers Mixture of Shards (peft_type MOS) with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this directory")
```

This is a Mixture of Shards adapter of mos_ext. Without the import, PEFT raises `KeyError: 'MOS'`; without PEFT,
`mos_ext.load_adapter(base_model, "this directory")` loads it.

"""


def safetensors_io() -> Any:
    """safetensors, with what it has for torch; ImportError says how to get it."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError("adapter files need safetensors: pip install 'mos_ext[io]'") from None
    return safetensors


def tensor_digest(content: bytes) -> str:
    """SHA-256 of the tensors in a valid safetensors file: of name, type, shape and bytes of each, by name."""
    size = int.from_bytes(content[:8], "little")
    header, data, digest = json.loads(content[8 : 8 + size]), memoryview(content)[8 + size :], hashlib.sha256()
    for name in sorted(header.keys() - {"__metadata__"}):
        entry = header[name]
        digest.update(f"{name} {entry['dtype']} {','.join(map(str, entry['shape']))}\n".encode())
        digest.update(data[slice(*entry["data_offsets"])])
    return digest.hexdigest()


def read(file: Path) -> bytes:
    """A file's content. Not mapped into memory, where another process that writes it could end this one.

    Raises:
        FileNotFoundError: it is not there. ValueError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"path must hold {file.name}, got {file.parent}") from None
    except OSError as error:
        raise ValueError(f"{file} must be a readable file, got {error}") from None


def tensors_of(content: bytes, file: Path) -> dict[str, Tensor]:
    """The tensors in the content of a safetensors file, which is named in errors. ValueError unless it is complete."""
    safetensors = safetensors_io()
    try:
        return safetensors.torch.load(content)
    # (A header whose bits are flipped can name a type that safetensors has and torch does not.)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} must be a complete safetensors file, got {error}") from None


def read_weights(file: Path, digest: object) -> dict[str, Tensor]:
    """The tensors of a weights file, which must have the digest that the configuration beside it names; None passes."""
    content = read(file)
    tensors = tensors_of(content, file)
    if digest is not None and digest != (here := tensor_digest(content)):
        raise ValueError(
            f"{file} must come from the same save as {CONFIG} beside it, and be unchanged since: got tensors of digest "
            f"{here} where tensor_digest is {digest}"
        )
    return tensors


def weights(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file. (Copies, for safetensors refuses tensors that share memory.)"""
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    return safetensors_io().torch.save(whole, metadata={"format": "pt"})


def json_content(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def with_card(folder: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """``files`` and a model card that begins with what loading needs; one that says it already stays as it is."""
    try:
        card = read(folder / CARD)
    except FileNotFoundError:
        card = b"---\nlibrary_name: peft\ntags:\n- mos\n---\n"
    if b"import mos_ext" in card:
        return files
    end = match.end() if (match := _FRONT_MATTER.match(card)) else 0
    return {**files, CARD: card[:end] + b"\n" * bool(end) + _NOTE.encode() + card[end:].lstrip(b"\r\n")}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Puts files into a directory: complete under temporary names first, then moved over the old ones in this order.

    Raises:
        ValueError: the directory is a file, or a file a directory.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a directory, got the file {folder}")
    for name in files:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} must be a file, got a directory")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{uuid.uuid4().hex}.tmp" for name in files}
    try:
        for name, content in files.items():
            with open(temporary[name], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sweep(folder, temporary)
        with _replacing:
            for name, written in temporary.items():
                os.replace(written, folder / name)
    finally:
        for written in temporary.values():
            with suppress(OSError):  # the directory itself may be gone
                written.unlink()


def _sweep(folder: Path, temporary: Mapping[str, Path]) -> None:
    """Removes what saves that were killed have left."""
    for name, written in temporary.items():
        now = written.stat().st_mtime
        for old in folder.glob(f".{name}.*.tmp"):
            with suppress(OSError):  # another save may be sweeping, too
                if now - old.stat().st_mtime > _STALE_SECONDS:
                    old.unlink()
