"""The bank: adapters by name, in memory or evicted, changed while requests run; and the routes of batches."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import MoSConfig
from ..linear import AdaptedLayer, is_fresh
from ..lora import read_adapter
from ..ops.checks import check_integer, why_not_native
from ..planner import Base, device_of, is_experts, keep_calling, kinds_of, stop_calling
from ..stored import StoredAdapter
from .arena import Arena
from .hooks import Served, ServedExperts, Switch
from .members import BankReport, Member, MemberReport, Withdrawn
from .route import Layer, Route, positions_first
from .tiles import in_tiles

logger = logging.getLogger("mos_ext")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BankFull(RuntimeError):
    """An adapter does not fit beside those that are in use or pinned; nothing has changed."""


class Lease:
    """Holds one version of an adapter in memory: what ``replace``, ``remove`` and eviction do leaves it alone.

    Made by :meth:`AdapterBank.lease`; :meth:`close`, or the end of its ``with``, lets go.

    Attributes:
        name: the adapter's.
    """

    def __init__(self, bank: AdapterBank, member: Member) -> None:
        self.name, self._bank, self._member = member.name, bank, member
        self._open = True

    def close(self) -> None:
        """Lets go; once, however often it is called."""
        with self._bank._lock:
            if self._open:
                self._open = False
                self._bank._let_go(self._member)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AdapterBank:
    """Many adapters on one base model: their shards in memory, side by side, and routes of batches that use them.

    Layers stay what they are: each linear gets a hook, each experts module a forward, which do nothing outside of
    :meth:`route`. Adapters are files, MoS's (of any r, e, l, patterns and seed) or PEFT's LoRA. Everything may be
    called from any thread, while others compute.

    Args:
        model: the base, of transformers or any other; or a PEFT model, on whose base the bank's adapters go, beside
            what PEFT has active. Everything on one device.
        capacity: bytes for shards, allocated at once and divided among linear types as an adapter of all of them would
            need it. Where an adapter does not fit, those that nobody holds make room, least recently used first. None
            grows as adapters come.
        target_modules, target_parameters: what adapters may adapt, as of :class:`mos_ext.MoSConfig`.
        shards_per_vector: shards of the bank's in a rank vector; a multiple of every adapter's l.
        dtype: of the shards: float32, or what the base computes in.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Source: "when numerous customized models are served simultaneously" (MoS, ICLR 2025, section 1).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        capacity: int | None = None,
        target_modules: str | Sequence[str] = "all-linear",
        target_parameters: str | Sequence[str] = (),
        shards_per_vector: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if capacity is not None:
            check_integer("capacity", capacity, 1)
        check_integer("shards_per_vector", shards_per_vector, 1)
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        self._base = Base.of(model)
        for name, module in self._base.modules.items():
            if isinstance(module, AdaptedLayer):
                raise ValueError(
                    f"model must have no adapter of mos_ext.adapt, got one on {name}: call mos_ext.unload(model) first"
                )
            if any(isinstance(hook, Served) for hook in module._forward_hooks.values()):
                raise ValueError(f"model must have no other bank, got one on {name}: call close() of that one first")
        config = MoSConfig(
            r=1,
            private_rank=0,
            equivalent_rank=1,
            shards_per_vector=1,
            target_modules=target_modules,
            target_parameters=target_parameters,
        )
        kinds = kinds_of(self._base, config)
        for name in chain.from_iterable(kinds.values()):
            if (above := positions_first(name, self._base.modules)) is not None:
                raise ValueError(
                    f"target_modules must select modules that are given one sequence after the other, got {name}, "
                    f"whose {above} gives it all first positions, then all second ones: leave such modules out"
                )
        devices = {d for kind, names in kinds.items() if (d := self._device_of(names[0], kind.experts)) is not None}
        if len(devices) > 1:
            raise ValueError(f"model must be on one device, got {', '.join(map(str, sorted(map(str, devices))))}")
        self.device = next(iter(devices), torch.device("cpu"))
        if self.device.type == "meta":
            raise ValueError("model must have its values in memory, got parameters on the meta device")
        for kind, names in kinds.items():
            weight = getattr(self._base.modules[names[0]], "weight", None) if not kind.experts else None
            computes_in = getattr(weight, "dtype", dtype)
            if computes_in in DTYPES and dtype not in (torch.float32, computes_in):
                raise TypeError(f"dtype must be float32 or that of {names[0]}, {computes_in}, got {dtype}")
        self.capacity, self.dtype = capacity, dtype
        # As many shards of each type as an adapter of all types has, whose equivalent rank takes the capacity.
        item = torch.empty(0, dtype=dtype).element_size()
        widths = {kind: (kind.in_features + kind.out_features) * item for kind in kinds}
        whole = sum(len(names) * max(1, kind.experts) * widths[kind] for kind, names in kinds.items())
        self._arenas: dict[Any, Arena] = {}
        for kind, names in kinds.items():
            l = math.gcd(shards_per_vector, kind.in_features, kind.out_features)
            share = None if capacity is None else capacity * len(names) * max(1, kind.experts) * l // whole
            self._arenas[kind] = Arena(kind, names, l, dtype, self.device, share)
        self._members: dict[str, Member] = {}  # by name; versions without one live as long as somebody holds them
        self._nameless: set[Member] = set()
        self._rank, self._used = 1, set[Arena]()  # of the tables of routes: they only grow
        self._clock = itertools.count(1)
        self._evictions = 0
        self._lock = threading.RLock()  # of all that is said of members; held for moments
        self._writing = threading.RLock()  # of whoever puts shards into memory, or takes them out
        self._loader: ThreadPoolExecutor | None = None
        self._last: tuple[Any, Route] | None = None
        self._released: Any = None  # CUDA: an event after which nobody reads the rows that are free
        self._switch = Switch()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._experts: list[nn.Module] = []
        self._before: list[tuple[nn.Module, str, Any]] = []
        self._put_hooks()
        if (why := why_not_native("grouped_low_rank_", self.device.type)) is not None:
            logger.warning("a bank of adapters takes a slower way: %s", why)

    def _device_of(self, name: str, experts: int) -> torch.device | None:
        return device_of(self._base.modules[name.rpartition(".")[0] if experts else name])

    def _put_hooks(self) -> None:
        experts: dict[str, dict[str, Layer]] = {}
        for arena in self._arenas.values():
            for number, name in enumerate(arena.modules):
                if arena.kind.experts:
                    parent, _, parameter = name.rpartition(".")
                    experts.setdefault(parent, {})[parameter] = Layer(arena, number, True)
                    continue
                module = self._base.modules[name]
                hook = Served(self._switch, Layer(arena, number, is_fresh(module)))
                self._handles.append(module.register_forward_hook(hook))
        for name, layers in experts.items():
            module = self._base.modules[name]
            if "forward" in vars(module):
                self.close()
                raise ValueError(
                    f"target_parameters must select experts with the forward of their class, got {name}, a "
                    f"{type(module).__name__} whose forward was replaced (by a hook of accelerate, say)"
                )
            module.forward = ServedExperts(self._switch, module, layers)  # type: ignore[assignment]
            self._experts.append(module)
        self._before = keep_calling(self._base.modules[""], self._linears())

    def _linears(self) -> list[nn.Module]:
        arenas = [arena for arena in self._arenas.values() if not arena.kind.experts]
        return [self._base.modules[name] for arena in arenas for name in arena.modules]

    def close(self) -> None:
        """Takes the bank off its model, which computes the base alone from now on. Waits for other threads' routes.

        Raises:
            RuntimeError: a route of the calling thread is open.
        """
        if self._switch.is_here():
            raise RuntimeError("close must be called outside of a route, got one that is open here")
        with self._switch.turn():
            for handle in self._handles:
                handle.remove()
            for module in self._experts:
                vars(module).pop("forward", None)
            for module in self._linears():
                stop_calling(module)
            for module, attribute, value in self._before:
                setattr(module, attribute, value)
            self._handles, self._experts, self._before = [], [], []
        if self._loader is not None:
            self._loader.shutdown()

    # -------------------------------------------------------------------------------------------- members

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, evicted ones too, in the order in which they came."""
        with self._lock:
            return tuple(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def _named(self, name: object) -> Member:
        """The member of a name. With the lock."""
        member = self._members.get(name) if isinstance(name, str) else None
        if member is None:
            known = ", ".join(itertools.islice(self._members, 8)) + ", ..." * (len(self._members) > 8)
            raise ValueError(f"name must be that of an adapter in the bank, got {name!r}; there are: {known or 'none'}")
        return member

    def resident(self, name: str) -> bool:
        """Whether an adapter is in memory, rather than evicted. ValueError for an unknown name."""
        with self._lock:
            return self._named(name).tables is not None

    def add(self, name: str, path: str | os.PathLike, *, pin: bool = False) -> None:
        """Adds an adapter from its directory, of MoS or of PEFT's LoRA. It is checked whole before anyone sees it.

        Args:
            name: what routes call it; new.
            path: a directory of :func:`mos_ext.save_adapter`, or of PEFT's ``save_pretrained``. Only safetensors are
                read.
            pin: whether it is never evicted.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the name is taken, or the files are damaged, for another model, or hold what a bank cannot
                serve: modules that were trained beside the adapter, DoRA, ...
            BankFull: it does not fit beside what is in use or pinned.
                After any error the bank is as it was.
        """
        self._put(name, path, pin=pin, known=False)

    def replace(self, name: str, path: str | os.PathLike) -> None:
        """Gives a name to the adapter of another directory: :meth:`add`, for a name that there is.

        Whoever holds the version of before goes on with it; its memory is free when the last one lets go. Pinned stays
        pinned.
        """
        self._put(name, path, pin=None, known=True)

    def submit(self, name: str, path: str | os.PathLike, *, replace: bool = False) -> Future[None]:
        """:meth:`add` or :meth:`replace` in the bank's own thread, one after the other."""
        return self._in_loader(self.replace if replace else self.add, name, path)

    def _in_loader(self, function: Any, *args: Any) -> Future[None]:
        with self._lock:
            if self._loader is None:
                self._loader = ThreadPoolExecutor(1, thread_name_prefix="mos_ext adapter loader")
            return self._loader.submit(function, *args)

    def _put(self, name: str, path: str | os.PathLike, *, pin: bool | None, known: bool) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a string that is not empty, got {name!r}")
        self._check_name(name, known)
        member = self._member_of(name, read_adapter(self._base, Path(path)))
        with self._writing:
            self._check_name(name, known)
            with self._lock:
                old = self._members.get(name)
            self._place(member, leaving=old)
            with self._lock:
                if known and name not in self._members:  # removed while the new version came
                    self._drop(member)
                self._check_name(name, known)
                member.pinned = old.pinned if pin is None and old is not None else bool(pin)
                member.named, member.used = True, next(self._clock)
                self._members[name] = member
                self._rank = max(self._rank, *(part.index_a.shape[1] for part in member.parts.values()))
                self._used |= member.parts.keys()
                if old is not None:
                    self._drop(old)

    def _check_name(self, name: str, known: bool) -> None:
        with self._lock:
            if known:
                self._named(name)
            elif name in self._members:
                raise ValueError(f"name must not be in the bank yet, got {name!r}: call replace, or remove it first")

    def _member_of(self, name: str, stored: StoredAdapter) -> Member:
        if stored.beside or stored.modules_to_save:
            raise ValueError(
                "path must be an adapter alone, got one with modules that were trained beside it "
                f"({', '.join(sorted(stored.modules_to_save))}), of which a base has one version for all"
            )
        parts = {}
        for of_type in stored.types:
            arena = self._arenas.get(of_type.linear_type.kind)
            if arena is None:
                raise ValueError(
                    f"path must be an adapter for the bank's linear types, got one with {of_type.linear_type.name}: "
                    f"AdapterBank(target_modules=..., target_parameters=...) says which there are"
                )
            parts[arena] = arena.part_of(of_type)
        return Member(name, stored, parts)

    def _place(self, member: Member, leaving: Member | None = None) -> None:
        """Puts a member into memory, where nobody sees it yet. While writing.

        ``leaving`` is a version that it replaces, whose memory counts as free if nobody holds it. After an error
        everything is where it was.
        """
        evicted = self._make_room(member, leaving)
        self._carry_out(evicted)
        taken: dict[Arena, np.ndarray] = {}
        try:
            with self._lock:
                for arena, n in member.counts.items():
                    taken[arena] = arena.take(n)
            if self._released is not None:
                torch.cuda.current_stream(self.device).wait_event(self._released)
            tables = {arena: arena.write(taken[arena], part) for arena, part in member.parts.items()}
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # other streams may read it from now on
        except BaseException:  # out of memory, say
            with self._lock:
                self._give_back(taken)
            for other, *_ in evicted:
                self._bring_back(other)
            raise
        with self._lock:
            member.rows, member.tables = taken, tables
            for arena, part in member.parts.items():
                empty = part._replace(shards_a=part.shards_a.new_empty(0, 0), shards_b=part.shards_b.new_empty(0, 0))
                member.parts[arena] = empty

    def _bring_back(self, member: Member) -> None:
        """Puts an evicted member into memory, unless it was removed meanwhile. While writing."""
        self._place(member)
        with self._lock:
            if not member.named:
                self._drop(member)

    @staticmethod
    def _give_back(rows: Mapping[Arena, np.ndarray]) -> None:
        for arena, own in rows.items():
            arena.give_back(own)

    def _make_room(self, member: Member, leaving: Member | None) -> list[Withdrawn]:
        """Withdraws the least recently used members until another one will fit: they, and where they were.

        Nobody gets a lease of them any more; what lies in their rows is still to be carried out. A version that is
        being replaced goes first. While writing.

        Raises:
            BankFull: that would not do; nobody is withdrawn then.
        """
        if self.capacity is None:
            return []
        with self._lock:
            idle = [m for m in self._members.values() if m.tables is not None and not m.leases]
            idle = [m for m in idle if m is leaving or not m.pinned]
            missing = {arena: n - arena.free for arena, n in member.counts.items()}
            victims: list[Member] = []
            for candidate in sorted(idle, key=lambda m: (m is not leaving, m.used)):
                if any(missing[arena] > 0 for arena in candidate.counts if arena in missing):
                    victims.append(candidate)
                    missing = {arena: n - candidate.counts.get(arena, 0) for arena, n in missing.items()}
            if lacking := {arena.kind.name: n for arena, n in missing.items() if n > 0}:
                name, n = next(iter(lacking.items()))
                raise BankFull(
                    f"capacity must hold the adapters in use, those that are pinned and {member.name!r}, of "
                    f"{member.bytes:,} bytes, got {self.capacity:,}, which lack {n} shards of {name}: wait, unpin or "
                    f"remove others, or make the bank larger"
                )
            return [self._withdraw(victim) for victim in victims]

    def remove(self, name: str) -> None:
        """Removes an adapter: the name is unknown at once, its memory free when nobody holds it any more."""
        with self._lock:
            member = self._named(name)
            del self._members[name]
            self._drop(member)

    def pin(self, name: str) -> None:
        """Keeps an adapter in memory. ValueError for one that is evicted, or unknown."""
        with self._lock:
            member = self._named(name)
            self._check_resident(member)
            member.pinned = True

    def unpin(self, name: str) -> None:
        """Lets an adapter be evicted again."""
        with self._lock:
            self._named(name).pinned = False

    def evict(self, name: str) -> None:
        """Takes an adapter to host memory. ValueError while it is pinned, or held by a request; nothing to do when it
        is there."""
        with self._writing:
            with self._lock:
                member = self._named(name)
                if member.pinned or member.leases:
                    why = "pinned" if member.pinned else f"held by {member.leases} requests or routes"
                    raise ValueError(f"name must be of an adapter that nobody needs, got {name!r}, which is {why}")
                withdrawn = self._withdraw(member)
            self._carry_out([withdrawn])

    def restore(self, name: str) -> None:
        """Brings an evicted adapter back; nothing to do when it is in memory.

        Raises:
            BankFull: it does not fit beside what is in use or pinned.
        """
        with self._writing:
            with self._lock:
                member = self._named(name)
                member.used = next(self._clock)
            if member.tables is None:
                self._bring_back(member)

    def submit_restore(self, name: str) -> Future[None]:
        """:meth:`restore` in the bank's own thread."""
        return self._in_loader(self.restore, name)

    def _withdraw(self, member: Member) -> Withdrawn:
        """Makes a member one that is evicted, and hands out where it was. With the lock, while writing."""
        withdrawn = Withdrawn(member, member.rows, member.tables)
        member.rows, member.tables, self._last = {}, None, None
        return withdrawn

    def _carry_out(self, withdrawn: Sequence[Withdrawn]) -> None:
        """Copies withdrawn members to host memory, and gives their rows back. While writing.

        After an error (out of host memory, say) they are all where they were.
        """
        try:
            copies = [{arena: arena.read(own) for arena, own in one.rows.items()} for one in withdrawn]
        except BaseException:
            with self._lock:
                for member, rows, tables in withdrawn:
                    member.rows, member.tables = rows, tables
                    if not member.named:  # removed meanwhile
                        self._drop(member)
            raise
        with self._lock:
            for (member, rows, _), shards in zip(withdrawn, copies, strict=True):
                for arena, (a, b) in shards.items():
                    member.parts[arena] = member.parts[arena]._replace(shards_a=a, shards_b=b)
                self._give_back(rows)
                self._evictions += bool(rows)

    # -------------------------------------------------------------------------------------------- holding

    def lease(self, name: str) -> Lease:
        """Holds an adapter as it is now, for a request that takes many steps.

        Raises:
            ValueError: the name is unknown, or the adapter is evicted.
        """
        with self._lock:
            return Lease(self, self._hold(self._named(name)))

    def _hold(self, member: Member) -> Member:
        """With the lock."""
        self._check_resident(member)
        member.leases, member.used = member.leases + 1, next(self._clock)
        return member

    @staticmethod
    def _check_resident(member: Member) -> None:
        if member.tables is None:
            raise ValueError(
                f"name must be that of an adapter in memory, got {member.name!r}, which is evicted: call "
                f"restore({member.name!r})"
            )

    def _let_go(self, member: Member) -> None:
        """With the lock."""
        member.leases -= 1
        if member.leases == 0 and self.device.type == "cuda":
            self._released = torch.cuda.Event()
            self._released.record(torch.cuda.current_stream(self.device))
        self._free_if_unused(member)

    def _drop(self, member: Member) -> None:
        """No name means a member any more: it goes when nobody holds it. With the lock."""
        member.named = False
        self._nameless.add(member)
        self._free_if_unused(member)

    def _free_if_unused(self, member: Member) -> None:
        """With the lock."""
        if member.named or member.leases or member not in self._nameless:
            return
        self._nameless.discard(member)
        self._give_back(member.rows)
        self._last, member.rows, member.tables = None, {}, None

    # -------------------------------------------------------------------------------------------- routes

    @contextmanager
    def route(
        self, model: nn.Module, names: Sequence[str | Lease | None], *, batch_invariant: bool = False
    ) -> Iterator[nn.Module]:
        """``with bank.route(model, ["fr", None, ...]):`` each sequence of a batch gets its adapter, or the base alone.

        Inside, the model computes batches of as many sequences: forward passes and ``generate``, with beams and other
        repetitions of each, of any length, padded or not, encoders and decoders. A row of a layer's input belongs to
        the sequence in whose part of the batch it lies: a model that appends a second batch (classifier-free guidance,
        say) takes ``names * 2``. Threads take turns; other threads' and asyncio tasks' calls outside of a route compute
        the base alone, but those of a compiled model, who enter ``[None, ...]``.

        What an adapter adds to a row does not depend, to the bit, on the other rows. What the base computes does: its
        products round otherwise for another number of rows. ``batch_invariant`` makes them in tiles of always the same
        number, so that a sequence gets the same bits alone and among others of its (padded) length. (With MKL, torch's
        library on x86, attention's products also depend on where operands lie in memory, unless the environment has
        ``MKL_CBWR=AUTO``.)

        Args:
            model: the bank's model, or what it was made into since (``torch.compile``, PEFT).
            names: an adapter for each sequence: a name, a :class:`Lease`, or None.
            batch_invariant: see above. It takes longer, and is for models without experts.

        Raises:
            ValueError: a name is unknown, or its adapter evicted; before anything runs. RuntimeError: inside, a batch
                of other sequences; another task of the thread has a route; at the end, an inner one has not ended.
        """
        self._check_model(model)
        if batch_invariant and any(map(is_experts, self._base.modules.values())):
            raise ValueError("batch_invariant must be False for models with experts, whose products are grouped")
        if isinstance(names, (str, bytes)) or not isinstance(names, Sequence) or not len(names):
            raise ValueError(f"names must be a list with an adapter for each sequence, got {names!r}")
        with self._switch.turn() as put, in_tiles() if batch_invariant else nullcontext():
            members = self._hold_all(names)
            try:
                put(self._route_of(members))
                yield model
            finally:
                with self._lock:
                    for member in members:
                        if member is not None:
                            self._let_go(member)

    def _check_model(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        first = next(iter(self._arenas.values()))
        name = first.modules[0].rpartition(".")[0] if first.kind.experts else first.modules[0]
        own = self._base.modules[name]
        if not (self._handles or self._experts):
            raise ValueError("model must have its bank, got one whose bank was closed")
        if not any(module is own for module in model.modules()):
            raise ValueError(f"model must be the bank's, or hold it, got a {type(model).__name__} without its {name}")

    def _hold_all(self, names: Sequence[str | Lease | None]) -> list[Member | None]:
        with self._lock:
            members: list[Member | None] = []
            for name in names:
                if isinstance(name, Lease):
                    if name._bank is not self or not name._open:
                        raise ValueError(f"names must hold open leases of this bank, got another one, of {name.name!r}")
                    members.append(name._member)
                else:
                    members.append(None if name is None else self._named(name))
            for member in members:
                if member is not None:
                    self._check_resident(member)
            for member in members:
                if member is not None:
                    self._hold(member)
            return members

    def _route_of(self, members: list[Member | None]) -> Route:
        """The route of members that are held; the last one again where they are the same."""
        adapters = [None if member is None else member.tables for member in members]
        modes = threading.get_ident(), torch.is_inference_mode_enabled()  # autograd takes no tensors of the latter
        key = tuple(map(id, adapters)), self._rank, len(self._used), modes
        if (last := self._last) is not None and last[0] == key:
            return last[1]
        route = Route(adapters, self._used, self._rank, self.device)
        with self._lock:
            self._last = key, route
        return route

    # -------------------------------------------------------------------------------------------- report

    def report(self) -> BankReport:
        """What is in the bank, and what it takes."""
        with self._lock:
            adapters = tuple(
                MemberReport(
                    name=m.name,
                    kind=m.stored.method,
                    r=m.stored.r,
                    equivalent_rank=m.stored.equivalent_rank,
                    bytes=m.bytes,
                    table_bytes=m.table_bytes,
                    lora_bytes=m.lora_bytes,
                    resident=m.tables is not None,
                    pinned=m.pinned,
                    leases=m.leases,
                )
                for m in self._members.values()
            )
            living = [*self._members.values(), *self._nameless]
            used = sum(m.bytes for m in living if m.tables is not None)
            capacity = (
                None
                if self.capacity is None
                else sum(len(arena.shards_a) * arena.shard_bytes for arena in self._arenas.values())
            )
            free = None if capacity is None else capacity - used
            return BankReport(adapters, capacity, used, free, self._evictions)
