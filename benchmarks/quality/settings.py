"""The size of the experiment: one model, one budget, one schedule for all methods."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Base:
    """The model that is adapted, and how it is trained.

    Twelve narrow layers rather than few wide ones: what layers share is the subject. With ``experts``, a mixture of so
    many in every layer, of which a token goes to ``choices``; the experts are what is adapted then.
    """

    vocabulary: int = 1024
    hidden: int = 96
    intermediate: int = 256
    layers: int = 12
    heads: int = 3
    length: int = 64  # tokens in a block
    characters: int = 2_500_000  # of the base text
    steps: int = 600
    batch: int = 16
    lr: float = 3e-3
    eval_blocks: int = 128  # at most, of validation and of test
    seed: int = 0
    experts: int = 0
    choices: int = 0

    @property
    def types(self) -> dict[str, tuple[int, int]]:
        """(in, out) of every linear type that is adapted."""
        if self.experts:
            return {
                "mlp.experts.gate_up_proj": (self.hidden, 2 * self.intermediate),
                "mlp.experts.down_proj": (self.intermediate, self.hidden),
            }
        square, wide = (self.hidden, self.hidden), (self.hidden, self.intermediate)
        return {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), square),
            **dict.fromkeys(("gate_proj", "up_proj"), wide),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def rank_one(self) -> int:
        """Trainable parameters of LoRA of rank 1 on all of them: the paper's P1."""
        return self.layers * max(1, self.experts) * sum(sum(shape) for shape in self.types.values())


@dataclass(frozen=True)
class Settings:
    base: Base = field(default_factory=Base)
    steps: int = 140
    batch: int = 4
    alpha: float = 16.0
    seeds: int = 4  # of the main table: 0, 1, ...
    sweep_seeds: int = 3  # of the sweeps: the first of them
    equivalent_rank: int = 2
    ceiling: int = 8  # times the budget
    r: int = 8
    l: int = 4
    p: int = 1
    l_sweep: tuple[int, ...] = (1, 2, 4, 8, 16)
    r_sweep: tuple[int, ...] = (2, 4, 8, 12)
    p_equivalent_rank: int = 4  # at e=2 the only choices of p are no, one and both (which is LoRA)
    p_sweep: tuple[int, ...] = (0, 1, 2, 3)
    routing_sweep: tuple[int, ...] = (2, 4, 8)  # the ranks at which both draws are compared
    lr: float | None = None  # of all methods; None takes the tuned rates
    tune_seed: int = 1000  # none of the seeds above
    fractions: tuple[float, ...] = ()  # of experts: the equivalent ranks below the smallest that LoRA can have

    @property
    def budget(self) -> int:
        return self.equivalent_rank * self.base.rank_one


# Sixteen experts of a size at which shared-outer LoRA of rank 2 has exactly as many parameters as LoRA of rank 1.
EXPERTS = Settings(
    Base(intermediate=56, layers=6, experts=16, choices=4),
    seeds=3,
    sweep_seeds=0,
    equivalent_rank=1,
    p=0,
    fractions=(1 / 2, 1 / 4, 1 / 8),
)
