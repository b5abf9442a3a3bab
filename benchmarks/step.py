"""What does a training step of a whole model, forward and backward, cost with an adapter on every linear?

    python -m benchmarks.step FILE.csv [--grid default|smoke] [--seconds N] [--only TEXT]

A Llama of 6 layers and width 768, over the same of the frozen model; from its embeddings on, so that the frozen model
has a backward pass too. MoS, and PEFT's LoRA, VeRA and VB-LoRA as PEFT makes them by default: their adapters are
float32, and x is cast to it and back; ``lora_same`` is LoRA without these casts, its parameters in the dtype of the
base. Peak memory of each in a process of its own. A table goes to FILE.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import mos_ext

from .harness import CPU, SMOKE, Sizes, Step, importable, measure, normal, release, saved_bytes
from .memory import ask_for_peaks, tell_peak, tell_peaks
from .rows import answer, command_line

R, E, L_SHARDS, P = 16, 4, 4, 1
PROVIDERS = ("frozen", "mos", "frozen_again", "lora", "lora_same", "vera", "vblora")
LABELS = {
    "frozen": "the frozen model",
    "mos": f"MoS (r={R}, e={E})",
    "lora": f"PEFT LoRA r={R}",
    "lora_same": f"PEFT LoRA r={R}, adapter in the base's dtype",
    "vera": "PEFT VeRA r=256",
    "vblora": "PEFT VB-LoRA r=4",
    "frozen_again": "noise: the frozen model again",
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A Llama, and a batch of ``sequences`` x ``length`` tokens."""

    dtype: torch.dtype
    layers: int = 6
    hidden: int = 768
    intermediate: int = 2048
    vocabulary: int = 4096
    sequences: int = 4
    length: int = 256

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"step {self.dtype_name} T={self.tokens}"

    def row(self) -> dict[str, object]:
        where = {"question": "step", "model": f"Llama, width {self.hidden}", "mode": "train", "layers": self.layers}
        shape = {"T": self.tokens, "in": self.hidden, "out": self.intermediate, "dtype": self.dtype_name}
        return {**where, **shape, "r": R, "l": L_SHARDS, "e": E}


def grid(which: str) -> list[Case]:
    if which == "smoke":
        return [Case(torch.bfloat16, 5, 32, 64, 64, 2, 8)]
    return [Case(d, sequences=s) for s in (4, 1) for d in (torch.bfloat16, torch.float32)]


# ------------------------------------------------------------------------------------------------ providers


def frozen(case: Case) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.hidden // 64),
        max_position_embeddings=case.length,
    )
    return LlamaForCausalLM(config).to(case.dtype).requires_grad_(False)


def mos(case: Case) -> nn.Module:
    config = mos_ext.MoSConfig(
        r=R, equivalent_rank=E, shards_per_vector=L_SHARDS, private_rank=P, target_modules=TARGETS
    )
    return mos_ext.adapt(frozen(case), config)


def by_peft(name: str, case: Case, **options: object) -> nn.Module:
    import peft

    casts = options.pop("casts", True)
    config = getattr(peft, name)(target_modules=TARGETS, **options)
    return peft.get_peft_model(frozen(case), config, autocast_adapter_dtype=casts)


BUILDERS: dict[str, Callable[[Case], nn.Module]] = {
    "frozen": frozen,
    "mos": mos,
    "frozen_again": frozen,
    "lora": lambda case: by_peft("LoraConfig", case, r=R),
    "lora_same": lambda case: by_peft("LoraConfig", case, r=R, casts=False),
    "vera": lambda case: by_peft("VeraConfig", case, r=256),
    "vblora": lambda case: by_peft("VBLoRAConfig", case, r=4, num_vectors=256, vector_length=_length(case)),
}


def _length(case: Case) -> int:
    return min(256, case.hidden)


class Built:
    """A model, its step, and what is trained beside the embeddings that the step starts from."""

    def __init__(self, name: str, case: Case) -> None:
        self.model = BUILDERS[name](case)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in self.trained:  # a B of zeros would be as much work, but no gradient to A to compare
            nn.init.normal_(p, std=0.02)
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(case.vocabulary, (case.sequences, case.length), generator=generator)
        torch.manual_seed(1)
        shape = (case.sequences, case.length, case.hidden)
        self.x = normal(*shape, dtype=case.dtype, device="cpu").requires_grad_()

    def forward(self) -> Tensor:
        return self.model(inputs_embeds=self.x, labels=self.labels).loss

    def step(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), [self.x, *self.trained])


def absent(name: str, case: Case) -> str | None:
    """Why a provider cannot be measured, or need not: in float32 there is nothing to cast."""
    if name == "lora_same" and case.dtype == torch.float32:
        return "the same as lora in float32"
    return importable("peft") if name not in ("frozen", "mos", "frozen_again") else None


def step(case: Case, sizes: Sizes) -> list[dict]:
    missing = {name: why for name in PROVIDERS if (why := absent(name, case))}
    built = {name: Built(name, case) for name in PROVIDERS if name not in missing}
    known = {name: [*b.model.parameters(), *b.model.buffers()] for name, b in built.items()}
    saved = {name: saved_bytes(b.forward, known[name]) for name, b in built.items()}
    release("cpu")
    steps: dict[str, list[Step]] = {name: [b.step] for name, b in built.items()}
    rows = []
    for name, timing in measure(steps, "cpu", sizes).items():
        count = sum(p.numel() for p in built[name].trained)
        found = {"trainable": count, "saved_bytes": saved[name]}
        rows.append({"provider": name, "status": "ok", **found, **timing.row()})
    return rows + [{"provider": name, "status": "absent", "cause": why} for name, why in missing.items()]


# ------------------------------------------------------------------------------------------------ running


def run(which: str, seconds: float, only: str = "") -> Iterator[tuple[str, list[dict]]]:
    # Of a step of a second, five rounds in the usual two seconds would be an accident's.
    end, sizes = time.monotonic() + seconds, SMOKE if which == "smoke" else replace(CPU, seconds=60.0)
    peaks = ask_for_peaks("benchmarks.step", (which, only), seconds / 3)
    for case in grid(which):
        if only not in case.name:
            continue
        try:
            late = time.monotonic() > end
            found = [{"status": "skipped", "cause": "no time left"}] if late else step(case, sizes)
        except Exception as error:  # one case may not fit into memory
            found = [{"status": "failed", "cause": f"{type(error).__name__}: {error}"}]
        peak = peaks.get(case.name, {})
        yield case.name, [{**case.row(), **row, "peak_mib": peak.get(row.get("provider"))} for row in found]


def print_peaks(which: str, only: str) -> None:
    """A line for each case and provider."""
    for case in grid(which):
        for name in PROVIDERS if only in case.name else ():
            if name != "frozen_again" and not absent(name, case):
                built = Built(name, case)
                tell_peak(case.name, name, built.step)
                del built


def tables(rows: Sequence[dict]) -> str:
    """Markdown: a line for each provider, of all cases side by side; time over the frozen model's, and peak memory."""
    cases = list(dict.fromkeys((row["dtype"], row["T"]) for row in rows))
    of = {(row["dtype"], row["T"], row["provider"]): row for row in rows if row["status"] == "ok"}
    head = ["", "trainable", *(f"{dtype}, {tokens:,} tokens" for dtype, tokens in cases)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in ("frozen", "mos", "lora_same", "lora", "vera", "vblora", "frozen_again"):
        mine = [of.get((*case, name)) or {} for case in cases]
        if not any(mine):
            continue
        trainable = next(row["trainable"] for row in mine if row)
        cells = [LABELS[name], f"{trainable:,}" if trainable is not None else ""]
        for row in mine:
            us = row.get("us")
            time_cell = f"{us / 1e3:.0f} ms" if name == "frozen" and us else f"{row['ratio']:.3f}" if us else ""
            cells.append(time_cell + (f", {row['peak_mib']:.0f} MiB" if row.get("peak_mib") is not None else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--peaks"]:
        return tell_peaks(print_peaks, *arguments[1:])
    return answer(command_line(__doc__, 360.0).parse_args(arguments), "step", run, tables)


if __name__ == "__main__":
    sys.exit(main())
