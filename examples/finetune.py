"""Fine-tune a causal language model with MoS, from a text file to an adapter, an exported LoRA and a merged model.

    python examples/finetune.py --model meta-llama/Llama-3.2-1B --data notes.txt --output my-adapter
    python examples/finetune.py                                     # no downloads: see below
    torchrun --nproc_per_node 2 examples/finetune.py --parallel fsdp    # the same on several processes or GPUs

With --model and --data: any Hugging Face causal LM (a directory or a name) and any text or JSONL files. The script
evaluates, trains, evaluates again, saves the adapter, exports it as standard LoRA, checks that the exported and the
merged model compute the same logits, generates a sample and draws loss.png. --compare-lora trains LoRA (PEFT) at the
same trainable budget beside it.

Without arguments it makes everything itself, in at most four minutes on two cores: it trains a small Llama on the
source of Python's standard library for about a minute, then adapts it to the English of Python's reference manual
(pydoc_data.topics), with MoS and with LoRA.

Under torchrun each process works on its part of every batch: --parallel ddp (default) keeps a copy of the model in
each, --parallel fsdp shards base model and pools (FSDP2, one unit per block, the pools in the root's). Both take the
same steps as one process would, and write the same files.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import mos_ext

# ------------------------------------------------------------------------------------------------ data


def read_texts(files: list[Path], text_field: str) -> str:
    """The text of all files: .jsonl contributes `text_field` of every line, anything else is text as it is."""
    parts = []
    for file in files:
        content = file.read_text(encoding="utf-8", errors="replace")
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
            missing = next((i for i, row in enumerate(rows, 1) if not isinstance(row.get(text_field), str)), None)
            if missing is not None:
                sys.exit(
                    f"--text-field must name a string in every line, got none for {text_field!r} in {file}:{missing}"
                )
            parts += [row[text_field] for row in rows]
        else:
            parts.append(content)
    return "\n\n".join(parts)


def to_blocks(tokenizer, text: str, length: int) -> Tensor:
    """(blocks, length) token ids, the text cut into equal pieces."""
    pieces = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]  # a tokenizer is slow on one huge string
    ids = [i for piece in tokenizer(pieces, add_special_tokens=False)["input_ids"] for i in piece]
    return torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)


def split(blocks: Tensor, eval_blocks: int) -> tuple[Tensor, Tensor]:
    """Training and evaluation blocks; the latter spread over the text, a tenth of it at most."""
    count = max(1, min(eval_blocks, len(blocks) // 10))
    if len(blocks) < 2:
        sys.exit(f"--data must hold at least two blocks of --sequence-length tokens, got {len(blocks)}")
    chosen = torch.linspace(0, len(blocks) - 1, count).long().unique()
    keep = torch.ones(len(blocks), dtype=torch.bool)
    keep[chosen] = False
    return blocks[keep], blocks[chosen]


# ------------------------------------------------------------------------------------------------ several processes


def start_processes(args: argparse.Namespace) -> None:
    """Under torchrun: joins the others, takes this process's GPU, and leaves printing to the first."""
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.world == 1:
        return
    if args.batch_size % args.world:
        sys.exit(f"--batch-size must be a multiple of {args.world} processes, got {args.batch_size}")
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if args.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)


def parallel(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """What to call in training: the model itself, DDP around it, or the model sharded in place."""
    if args.world == 1:
        return model
    if args.parallel == "ddp":
        devices = [torch.device(args.device)] if args.device.startswith("cuda") else None
        return DistributedDataParallel(model, device_ids=devices)
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block)
    return fully_shard(model)  # with what is left: embeddings, norms, and the pools that all blocks share


def my_part(batch: Tensor, args: argparse.Namespace) -> Tensor:
    """This process's rows of a batch that all processes have drawn alike."""
    return batch[args.rank :: args.world]


# ------------------------------------------------------------------------------------------------ training


@torch.no_grad()
def evaluate(model: nn.Module, blocks: Tensor, batch_size: int) -> float:
    """Mean loss per predicted token."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    losses = [model(input_ids=b.to(device), labels=b.to(device)).loss.item() * len(b) for b in blocks.split(batch_size)]
    model.train(training)
    return sum(losses) / len(blocks)


@dataclass
class Run:
    """What one training run left behind."""

    name: str
    trainable: int
    before: float
    after: float = float("nan")
    adapter_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def step_ms(self) -> float:
        return 1000 * statistics.median(self.seconds) if self.seconds else float("nan")


def train(model: nn.Module, blocks: Tensor, run: Run, args: argparse.Namespace, steps: int, lr: float) -> None:
    """AdamW, linear schedule, 3% warm-up: the paper's recipe, on random batches that depend on --seed alone."""
    forward = parallel(model, args)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warmup = max(1, int(0.03 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    bar = tqdm(range(steps), desc=f"{run.name:<12}", unit="step", dynamic_ncols=True, disable=args.rank > 0)
    for _ in bar:
        start = time.perf_counter()
        batch = blocks[torch.randint(len(blocks), (args.batch_size,), generator=generator)]
        batch = my_part(batch, args).to(args.device)
        loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        loss = loss.detach()
        if args.world > 1:
            distributed.all_reduce(loss)
        run.losses.append(loss.item() / args.world)
        run.seconds.append(time.perf_counter() - start)
        bar.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
    model.eval()


# ------------------------------------------------------------------------------------------------ the model of the demo


def standard_library_source(limit: int) -> str:
    """`limit` characters of the source of Python's standard library, without the manual that the demo adapts to."""
    folder = Path(os.__file__).parent
    text = ""
    for file in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py")):
        if "pydoc_data" in file.parts or "site-packages" in file.parts or "test" in file.parts:
            continue
        text += file.read_text(encoding="utf-8", errors="ignore") + "\n"
        if len(text) >= limit:
            break
    return text[:limit]


def make_demo_model(folder: Path, args: argparse.Namespace) -> None:
    """Trains a byte-level BPE tokenizer and a 1.1 M parameter Llama on the standard library; saves both to `folder`."""
    from tokenizers import ByteLevelBPETokenizer

    source = standard_library_source(3_000_000)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        source.splitlines(), vocab_size=2048, min_frequency=2, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config)
    blocks, _ = split(to_blocks(tokenizer, source, args.sequence_length), 64)
    run = Run("base model", sum(p.numel() for p in model.parameters()), float("nan"))
    train(model, blocks, run, args, args.base_steps, lr=3e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------ adaptation


def load_model(name: str, args: argparse.Namespace) -> nn.Module:
    dtype = getattr(torch, args.dtype)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(args.device).eval()


def adapt_with_mos(
    name: str, train_blocks: Tensor, eval_blocks: Tensor, args: argparse.Namespace
) -> tuple[Run, nn.Module]:
    model = load_model(name, args)
    config = mos_ext.MoSConfig(
        r=args.r,
        equivalent_rank=args.equivalent_rank,
        shards_per_vector=args.shards_per_vector,
        private_rank=args.private_rank,
        alpha=args.alpha,
        dropout=args.dropout,
        target_modules=args.target_modules,
        seed=args.seed,
    )
    torch.manual_seed(args.seed)
    mos_ext.adapt(model, config)
    report = mos_ext.parameter_report(model)
    print(f"\n{report}\n")
    run = Run("MoS", report.trainable, evaluate(model, eval_blocks, args.batch_size))
    train(model, train_blocks, run, args, args.steps, args.lr)
    adapter = args.output / "adapter"
    if args.rank == 0 or args.parallel == "fsdp":  # a sharded adapter is gathered from every process
        mos_ext.save_adapter(model, adapter)
    if args.world > 1:
        distributed.barrier()
        model = mos_ext.load_adapter(load_model(name, args), adapter)  # whole again
    run.after = evaluate(model, eval_blocks, args.batch_size)
    run.adapter_bytes = (adapter / "adapter_model.safetensors").stat().st_size
    return run, model


def adapt_with_lora(
    name: str, train_blocks: Tensor, eval_blocks: Tensor, targets: list[str], args: argparse.Namespace
) -> Run:
    """LoRA from PEFT with as many trainable parameters: rank equivalent_rank on the same modules."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(args.seed)
    model = get_peft_model(
        load_model(name, args),
        LoraConfig(r=args.equivalent_rank, lora_alpha=args.alpha, lora_dropout=args.dropout, target_modules=targets),
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run = Run(f"LoRA r={args.equivalent_rank}", trainable, evaluate(model, eval_blocks, args.batch_size))
    train(model, train_blocks, run, args, args.steps, args.lr)
    run.after = evaluate(model, eval_blocks, args.batch_size)
    model.save_pretrained(args.output / "lora-baseline")
    run.adapter_bytes = (args.output / "lora-baseline" / "adapter_model.safetensors").stat().st_size
    return run


@torch.no_grad()
def check_outputs(model: nn.Module, name: str, batch: Tensor, args: argparse.Namespace) -> None:
    """The exported LoRA, loaded by real PEFT, and the merged model must compute the adapter's logits."""
    from peft import PeftModel

    batch = batch.to(args.device)
    logits = model(input_ids=batch).logits.float()

    def difference(other: Tensor) -> float:
        return ((other.float() - logits).norm() / logits.norm()).item()

    exported = args.output / "exported-lora"
    mos_ext.export_lora(model, exported)
    lora = PeftModel.from_pretrained(load_model(name, args), exported).eval()
    print(f"exported LoRA in PEFT: logits differ by {difference(lora(input_ids=batch).logits):.1e} (relative)")
    del lora
    mos_ext.merge(model)
    print(f"merged model:          logits differ by {difference(model(input_ids=batch).logits):.1e} (relative)")
    mos_ext.unmerge(model)


def sample(model: nn.Module, tokenizer, prompt: str, args: argparse.Namespace) -> str:
    torch.manual_seed(args.seed)
    ids = tokenizer(prompt, return_tensors="pt").to(args.device)
    out = model.generate(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        max_new_tokens=60,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------ results


def draw(runs: list[Run], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for run in runs:
        window = max(1, len(run.losses) // 30)
        smooth = [statistics.fmean(run.losses[max(0, i - window + 1) : i + 1]) for i in range(len(run.losses))]
        color = "black" if run.name == "MoS" else "tab:gray"
        axes.plot(smooth, color=color)
        label = f"{run.name}, evaluation {run.after:.3f}"
        axes.annotate(label, (len(smooth) - 1, smooth[-1]), (4, 0), textcoords="offset points", color=color, fontsize=8)
    axes.set(xlabel="step", ylabel="training loss (moving average)")
    axes.set_xlim(right=1.4 * max(len(run.losses) for run in runs))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def print_table(base_loss: float, runs: list[Run]) -> None:
    print(f"\n{'':<12} {'trainable':>10} {'adapter':>10} {'loss before':>12} {'loss after':>11} {'step':>9}")
    print(f"{'frozen base':<12} {0:>10} {'':>10} {base_loss:>12.4f} {base_loss:>11.4f} {'':>9}")
    for run in runs:
        size = f"{run.adapter_bytes / 1000:,.1f} kB"
        print(
            f"{run.name:<12} {run.trainable:>10,} {size:>10} {run.before:>12.4f} "
            f"{run.after:>11.4f} {run.step_ms:>6.0f} ms"
        )
    if len(runs) == 2:
        best, other = sorted(runs, key=lambda run: run.after)
        print(
            f"\n{best.name} won this run by {other.after - best.after:.4f} nats per token. "
            "One seed of one small model is an anecdote, not a ranking."
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or a Hugging Face name; made on the spot when left out")
    parser.add_argument("--data", nargs="+", type=Path, help="text or .jsonl files; Python's manual when left out")
    parser.add_argument("--text-field", default="text", help="the field of .jsonl lines (default: text)")
    parser.add_argument("--output", type=Path, default=Path("finetune-output"), help="directory for everything written")
    parser.add_argument(
        "--compare-lora", action="store_true", help="also train LoRA at the same budget (always in the demo)"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base-steps", type=int, default=340, help="of the demo's own model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--eval-blocks", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--equivalent-rank", type=int, default=4)
    parser.add_argument("--shards-per-vector", type=int, default=4)
    parser.add_argument("--private-rank", type=int, default=1)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--target-modules", default="all-linear", help="all-linear, a regular expression, or names joined by commas"
    )
    parser.add_argument("--prompt", default="The")
    parser.add_argument("--parallel", default="ddp", choices=["ddp", "fsdp"], help="under torchrun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if "," in args.target_modules:
        args.target_modules = args.target_modules.split(",")
    for file in args.data or []:
        if not file.is_file():
            parser.error(f"--data must name files, got {file}")
    for name in ("steps", "base_steps", "batch_size", "sequence_length", "eval_blocks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None) -> list[Run]:
    args = parse(argv)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # notes to its own developers
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    start_processes(args)
    args.output.mkdir(parents=True, exist_ok=True)

    compare = (args.compare_lora or args.model is None) and args.world == 1
    name = args.model
    if name is None:
        name = str(args.output / "base-model")
        if args.rank == 0:
            make_demo_model(Path(name), argparse.Namespace(**{**vars(args), "world": 1}))
        if args.world > 1:
            distributed.barrier()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if args.data:
        text = read_texts(args.data, args.text_field)
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[key] for key in sorted(topics))
    train_blocks, eval_blocks = split(to_blocks(tokenizer, text, args.sequence_length), args.eval_blocks)

    mos, model = adapt_with_mos(name, train_blocks, eval_blocks, args)
    runs = [mos]
    if args.world > 1:
        distributed.destroy_process_group()
        if args.rank:
            return runs
    if compare:
        targets = [n for n, m in model.named_modules() if isinstance(m, mos_ext.MoSLinear)]
        runs.insert(0, adapt_with_lora(name, train_blocks, eval_blocks, targets, args))
    gc.collect()

    with mos_ext.disabled(model):
        base_loss = evaluate(model, eval_blocks, args.batch_size)
    print_table(base_loss, runs)
    print()
    check_outputs(model, name, eval_blocks[:2], args)
    print(f"\nsample: {sample(model, tokenizer, args.prompt, args)!r}\n")
    draw(runs, args.output / "loss.png")
    for what in ("adapter", "exported-lora", "loss.png"):
        print(f"wrote {args.output / what}")
    print(f"done in {time.perf_counter() - start:.0f} s")
    return runs


if __name__ == "__main__":
    main()
