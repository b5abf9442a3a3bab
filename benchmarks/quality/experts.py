"""report.md and the plot of the mixture of experts, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..drawing import color
from .report import Line, Results, main_table, origin, plot_sizes
from .settings import Settings


@dataclass(frozen=True)
class Question:
    """Whether ``other`` ends at another loss than ``reference``."""

    text: str
    other: str
    reference: str


def questions(s: Settings) -> list[Question]:
    lora, fractions = f"lora-r{s.equivalent_rank}", [f"mos-e{e:g}" for e in s.fractions]
    found = [
        Question("MoS against LoRA per expert, one budget", "mos", lora),
        Question("MoS against shared-outer LoRA, one budget", "mos", "shared-outer"),
        Question("shared-outer LoRA against LoRA per expert, one budget", "shared-outer", lora),
    ]
    for e, name in zip(s.fractions, fractions, strict=True):
        share = e / s.equivalent_rank
        found.append(Question(f"MoS of {share:g} of the budget against LoRA per expert of all of it", name, lora))
        found.append(Question(f"MoS of {share:g} of the budget against MoS of all of it", name, "mos"))
    return found


def answers(results: Results) -> list[str]:
    """A table row for every question: the paired difference, and what may be said."""
    lines = ["| question | loss - loss of the reference | answer |", "|---|---|---|"]
    for q in questions(results.settings):
        difference = results.difference(q.other, q.reference)
        answer = ("lower" if difference.mean < 0 else "higher") if difference.clear else "not shown to differ"
        lines.append(f"| {q.text} | {difference} | {answer} |")
    return lines


def write_report(s: Settings, rows: Sequence[dict], out: Path, command: str) -> None:
    results, base = Results(s, rows), s.base
    mos, lora = (
        tuple(sorted((n for n, m in results.methods.items() if m.kind == kind), key=results.trainable.__getitem__))
        for kind in ("mos", "lora")
    )
    others = Line(results.methods["shared-outer"].label, ("shared-outer",), color("shared-outer"))
    plot_sizes(results, [Line("MoS", mos, color("mos")), Line("LoRA", lora, color("lora")), others], out / "loss.png")
    lines = [
        "# Experts in miniature",
        "",
        f"`{command}`",
        "",
        origin(rows),
        "",
        f"A Qwen3-MoE of {base.layers} layers, hidden size {base.hidden}, with {base.experts} experts of "
        f"{base.intermediate} in each, of which a token takes {base.choices}, trained on the source of Python's "
        f"standard library and adapted on its experts alone to the English of its manual: {s.steps} steps of "
        f"{s.batch} x {base.length} tokens. Budget {s.budget:,} trainable parameters: LoRA of rank "
        f"{s.equivalent_rank} on every expert, the smallest that there is. Losses are nats per token of the test "
        "split, ± the standard deviation over seeds; differences are paired by seed, ± their standard error.",
        "",
        *main_table(results),
        "",
        "![loss](loss.png)",
        "",
        *answers(results),
        "",
        f'"Not shown": within the 95 % interval of the paired difference. Of {len(questions(s))} questions '
        f"{0.05 * len(questions(s)):.2g} would look answered by chance alone, were there no differences.",
        "",
        f"What this does not say: a pool here serves {base.layers * base.experts} matrices, not the 6,144 of "
        f"Qwen3-30B-A3B, and the width is {base.hidden}, not 2,048; {s.steps} steps are far from convergence, so how "
        "fast a method learns counts. Each method has its own rate, chosen by validation loss on a seed that no row "
        "uses. The other caveats are in the README beside the code.",
    ]
    temporary = out / "report.md.part"
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(out / "report.md")
