"""The one directory that adapters come from: a folder for each, by its name. Nothing outside of it is ever opened."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path

from mos_ext.serving import AdapterBank, BankFull

log = logging.getLogger("server")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FILES = ("adapter_config.json", "adapter_model.safetensors")  # all that is read


class Folder:
    """Adapters of ``root``, for a bank. A name is a word of letters, digits, dots, dashes and underscores."""

    def __init__(self, root: Path, bank: AdapterBank, changed: Callable[[], None] = lambda: None) -> None:
        self.root, self.bank = root.resolve(strict=True), bank
        self._changed = changed
        self._writing = threading.Lock()  # the watcher and the endpoints take turns
        self._loaded: dict[str, tuple] = {}  # adapter -> what its files looked like; of those that the watcher minds
        self._seen: dict[str, tuple] = {}  # at the last look
        self._failed: dict[str, tuple] = {}  # files that are no adapter, until they change

    def path(self, name: str) -> Path:
        """The folder of a name. ValueError for a name, a link or a file that leads out, FileNotFoundError for none."""
        if not NAME.fullmatch(name):
            raise ValueError(f"directory must be the name of a folder of adapters, got {name!r}")
        folder = self.root / name
        if not folder.is_dir():
            raise FileNotFoundError(f"directory must be a folder of adapters that is there, got {name!r}")
        for path in (folder, *(folder / file for file in FILES)):
            if not path.exists():
                raise FileNotFoundError(f"directory must have {' and '.join(FILES)}, got {name!r} without {path.name}")
            if not path.resolve().is_relative_to(self.root):
                raise ValueError(f"directory must lie in the folder of adapters, got {name!r}, which leads out of it")
        return folder

    def put(self, name: str, directory: str, replace: bool = False) -> None:
        """Adds, or replaces, an adapter from a folder; what the bank raises for files that are none."""
        if not NAME.fullmatch(name):
            raise ValueError(f"name must match {NAME.pattern}, got {name!r}")
        path = self.path(directory)
        with self._writing:
            self.bank.submit(name, path, replace=replace and name in self.bank).result()
            if directory == name:
                self._loaded[name] = self._files(path)
            else:  # not the watcher's from now on
                self._loaded.pop(name, None)
        self._changed()

    def remove(self, name: str) -> None:
        """ValueError for a name that is unknown. A watched folder that stays comes back when it is written again."""
        with self._writing:
            self.bank.remove(name)
            if name in self._loaded:
                self._failed[name] = self._loaded.pop(name)
        self._changed()

    def look(self, first: bool = False) -> None:
        """Makes the bank what the directory is: folders that are new, written again, or gone since the last look.

        Files are taken when two looks in a row saw the same of them (``first`` takes them at once), and only by a bank
        that has checked them whole: half of a copy is never served. A folder that is no adapter is logged, once.
        """
        now = {folder.name: self._files(folder) for folder in self.root.iterdir() if NAME.fullmatch(folder.name)}
        with self._writing:
            for name in [name for name in self._loaded if not now.get(name)]:
                del self._loaded[name]
                if name in self.bank:
                    self.bank.remove(name)
                    log.info("removed %s", name)
                    self._changed()
            for name, files in sorted(now.items()):
                known = (self._loaded.get(name), self._failed.get(name))
                if files and files not in known and (first or self._seen.get(name) == files):
                    self._take(name, files)
            self._failed = {name: files for name, files in self._failed.items() if name in now}
            self._seen = now

    def _take(self, name: str, files: tuple) -> None:
        if name in self.bank and name not in self._loaded:
            self._failed[name] = files
            log.warning("%s is an adapter of another folder: not replaced", name)
            return
        try:
            self.bank.submit(name, self.path(name), replace=name in self.bank).result()
        except BankFull as error:  # there may be room at the next look
            log.warning("%s is not loaded: %s", name, error)
        except Exception as error:  # of whatever lies there; what is served stays
            self._failed[name] = files
            log.warning("%s is not loaded: %s", name, error)
        else:
            self._loaded[name] = files
            log.info("loaded %s", name)
            self._changed()

    def _files(self, folder: Path) -> tuple:
        """What tells one save from another: node, size and time of each file. Empty until all are there."""
        try:
            stats = [(folder / file).stat() for file in FILES]
        except (OSError, ValueError):
            return ()
        return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)

    def watch(self, seconds: float, end: threading.Event) -> None:
        """Looks every so often, until the end; for a thread of its own."""
        while not end.wait(seconds):
            try:
                self.look()
            except OSError as error:  # the directory itself, say; it may come back
                log.warning("%s cannot be read: %s", self.root, error)
