"""The tools people train with, each of them itself on tiny local models, for both ways in: ``mos_ext.adapt`` and PEFT."""

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from models import llama, moe, stack
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import mos_ext
from mos_ext import ShardPool

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations at import
    import peft
    import transformers
    import trl
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from datasets import Dataset
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers.models import WordLevel

    import mos_ext.integrations.peft as mos_peft

pytestmark = [
    # PEFT 0.21 and TRL 1.16 still use the names that transformers 5.24 calls "activation checkpointing". So do these
    # tests: they are the names that every supported transformers knows.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # torch's tracer makes its own placeholder of an autograd.Function.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

FIELDS = {"r": 4, "equivalent_rank": 3, "shards_per_vector": 2, "private_rank": 1, "target_modules": "all-linear"}


def natively(model, **fields):
    return mos_ext.adapt(model, mos_ext.MoSConfig(**{**FIELDS, **fields}))


def peft_config(**fields):
    return mos_peft.MoSConfig(**{**FIELDS, **fields})


def under_peft(model, **fields):
    return peft.get_peft_model(model, peft_config(**fields))


WAYS = {"adapt": natively, "peft": under_peft}


@pytest.fixture(params=WAYS)
def wrap(request):
    """Puts an adapter on a model, by either way in."""
    return WAYS[request.param]


@pytest.fixture(autouse=True)
def _fresh():
    """Accelerate keeps its settings, and torch its compiled code, for the whole process."""

    def reset():
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        torch._dynamo.reset()

    reset()
    yield
    reset()


def pools(model):
    return [module for module in model.modules() if isinstance(module, ShardPool)]


def fill(model, seed=1):
    """Non-zero pools, so that an adapter does something; another seed makes other pools."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pool in pools(model):
            for parameter in (pool.shards_a, pool.shards_b):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model):
    """The values of everything trainable, which is the pools and nothing else."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in parameters.values()} == {
        id(p) for pool in pools(model) for p in (pool.shards_a, pool.shards_b)
    }
    return [p.detach().clone() for p in parameters.values()]


def gradients(model, loss):
    model.zero_grad()
    loss().backward()
    return [p.grad.clone() for pool in pools(model) for p in (pool.shards_a, pool.shards_b)]


def dense_gradients(model, base, batch):
    """Ordinary autograd's, without a line of the layers: the base, its weights replaced by W + scale * B A."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, mos_ext.MoSLinear):
            pool, k = module.pool, module.layer
        elif isinstance(module, mos_peft.MoSLayer):
            name, pool, k = (
                name.removeprefix("base_model.model."),
                module.mos_pools["default"],
                module.mos_layer["default"],
            )
        else:
            continue
        a, b = pool.factors(k)
        weights[f"{name}.weight"] = base.get_parameter(f"{name}.weight").detach() + pool.scales[k] * b @ a
    assert len(weights) == sum(pool.num_layers for pool in pools(model))
    loss = torch.func.functional_call(base, weights, kwargs=batch).loss
    return torch.autograd.grad(loss, [p for pool in pools(model) for p in (pool.shards_a, pool.shards_b)])


def same(a, b):
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def error(got, want):
    """Of all tensors together, relative."""

    def flat(tensors):
        return torch.cat([t.double().flatten().cpu() for t in tensors])

    return ((flat(got) - flat(want)).norm() / flat(want).norm()).item()


def batch_of(rows=4, length=12):
    ids = torch.randint(1, 96, (rows, length))
    return {"input_ids": ids, "labels": ids}


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] = self.calls.get(func, 0) + 1
        return func(*args, **(kwargs or {}))

    def total(self, operators):
        return sum(self.calls.get(operator, 0) for operator in operators)


# ------------------------------------------------------------------------------------------------ transformers.Trainer


def rows(count=24, length=12):
    """Of a few tokens only, which is soon learnt."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 9, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


ARGUMENTS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "save_steps": 3,
    "logging_steps": 1,
    "learning_rate": 0.05,
    "report_to": [],
    "use_cpu": not torch.cuda.is_available(),
    "disable_tqdm": True,
    "seed": 7,
}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(model, output, resume=None, **arguments):
    arguments = transformers.TrainingArguments(str(output), **{**ARGUMENTS, **arguments})
    trainer = transformers.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(8))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_trainer_resumes_to_the_bit(wrap, dropout, tmp_path):
    whole = train(wrap(llama(2), dropout=dropout), tmp_path / "whole")
    # What a new process has: pools that are not the checkpoint's, and another random state.
    model = fill(wrap(llama(2), dropout=dropout), seed=9)
    torch.manual_seed(99)
    resumed = train(model, tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-3")
    assert losses(resumed)[3:] == losses(whole)[3:]
    assert len(losses(whole)) == 6
    assert losses(whole)[-1] < losses(whole)[0]
    assert same(trained(resumed.model), trained(whole.model))
    base = dict(llama(2).named_parameters())
    kept = [p for p in whole.model.parameters() if not p.requires_grad]
    assert same([p.cpu() for p in kept], list(base.values()))


def test_trainer_resumes_experts_to_the_bit(tmp_path):
    def model(seed):
        config = mos_ext.MoSConfig(
            r=4, equivalent_rank=4, shards_per_vector=2, dropout=0.2, target_parameters=["experts.down_proj"]
        )
        return fill(mos_ext.adapt(moe("qwen3_moe"), config), seed=seed)

    whole = train(model(3), tmp_path / "whole")
    torch.manual_seed(99)
    resumed = train(model(9), tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-3")
    assert losses(resumed)[3:] == losses(whole)[3:]
    assert losses(whole)[-1] < losses(whole)[0]
    assert same(trained(resumed.model), trained(whole.model))


def test_trainer_s_checkpoints_are_adapters(wrap, tmp_path):
    """With what is trained beside the pools; and training goes on from them."""

    def model():
        fields = {"modules_to_save": ["lm_head"]} if wrap is under_peft else {}
        model = wrap(llama(2), **fields)
        if wrap is natively:
            model.lm_head.requires_grad_(True)
        return model

    whole = train(model(), tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    saved = {file.name for file in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= saved
    assert "config.json" not in saved
    weights = sum(file.stat().st_size for file in checkpoint.glob("*model*.safetensors"))
    assert weights < 0.5 * sum(p.numel() * p.element_size() for p in llama(2).parameters())
    resumed = train(model(), tmp_path / "resumed", resume=checkpoint)
    assert losses(resumed)[3:] == losses(whole)[3:]
    resumed.save_model(str(tmp_path / "final"))
    loaded = mos_ext.load_adapter(llama(2), tmp_path / "final").to(resumed.model.device)
    batch = {"input_ids": rows(2)[0]["input_ids"][None].to(resumed.model.device)}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, resumed.model.eval()(**batch).logits)


def test_dropout_is_drawn_from_the_random_state_that_is_saved(wrap, tmp_path):
    """The test above would pass with dropout that does nothing, too."""
    runs = [
        train(wrap(llama(2), dropout=0.2), tmp_path / str(seed), seed=seed, data_seed=1, max_steps=1).model
        for seed in (1, 1, 2)
    ]
    assert same(trained(runs[0]), trained(runs[1]))
    assert not same(trained(runs[0]), trained(runs[2]))


def test_trainer_loads_the_best_checkpoint(wrap, tmp_path):
    """Not the last, as a loss that should rise and falls: the steps after the best must leave nothing behind."""
    arguments = {"save_steps": 1, "lr_scheduler_type": "constant", "greater_is_better": True}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = train(wrap(llama(2)), tmp_path / "all", **arguments, **evaluation)
    best = trainer.state.best_global_step
    assert 0 < best < 6
    shorter = train(wrap(llama(2)), tmp_path / "shorter", **{**arguments, "max_steps": best})
    assert same(trained(trainer.model), trained(shorter.model))


def test_a_trainer_step_follows_the_gradient(wrap, tmp_path):
    model = fill(wrap(llama(2)))
    start = trained(model)
    every = {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels")}
    want = dense_gradients(model, llama(2), every)
    arguments = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "per_device_train_batch_size": 24}
    after = trained(train(model, tmp_path, max_steps=1, **arguments).model)
    # float32: the products are grouped in another way, and the pools, of size 0.1, are rounded after the step.
    assert error([a - b.cpu() for a, b in zip(start, after, strict=True)], want) < 1e-4


def test_trainer_accumulates_gradients(wrap, tmp_path):
    """Two micro-batches of 2 are one batch of 4. SGD, since Adam makes a step of any gradient, however small; and small
    steps: with a rate of 1 some draws of tables amplify a rounding a hundredfold in six."""
    arguments = {"optim": "sgd", "learning_rate": 0.05}
    start = trained(fill(wrap(llama(2))))
    whole = train(fill(wrap(llama(2))), tmp_path / "a", **arguments)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    in_parts = train(fill(wrap(llama(2))), tmp_path / "b", **arguments, **parts)
    moved = [
        [after.cpu() - before for after, before in zip(trained(run.model), start, strict=True)]
        for run in (whole, in_parts)
    ]
    # float32 sums over tokens in another order, six steps of them: a few roundings of 6e-8 in every sum.
    assert error(moved[1], moved[0]) < 1e-5
    assert losses(in_parts) == pytest.approx(losses(whole), rel=1e-5)


# ------------------------------------------------------------------------------------------------ TRL

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a stitch in time saves nine",
    "all that glitters is not gold",
    "two heads are better than one",
] * 6


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<unk>", "<eos>"]
    made.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(vocab_size=96, special_tokens=special))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


TRL_WAYS = {
    "adapt": lambda dropout: (natively(llama(2), dropout=dropout), None),
    "wrapped by PEFT": lambda dropout: (under_peft(llama(2), dropout=dropout), None),
    "peft_config": lambda dropout: (llama(2), peft_config(dropout=dropout)),
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("way", TRL_WAYS)
def test_sft_trainer_resumes_to_the_bit(way, packing, tokenizer, tmp_path):
    """With TRL's defaults, which are bf16 autocast and checkpointed activations, and with dropout."""

    def run(output, resume=None, pool_seed=None):
        model, config = TRL_WAYS[way](0.2)
        if pool_seed is not None:
            fill(model, pool_seed)
        arguments = trl.SFTConfig(
            str(output), **{**ARGUMENTS, "learning_rate": 0.1, "max_length": 32, "packing": packing}
        )
        assert arguments.bf16
        assert arguments.gradient_checkpointing
        trainer = trl.SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_dict({"text": SENTENCES}),
            processing_class=tokenizer,
            peft_config=config,
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3", pool_seed=9)
    assert losses(resumed)[3:] == losses(whole)[3:]
    assert len(losses(whole)) == 6
    assert losses(whole)[-1] < losses(whole)[0]
    assert same(trained(resumed.model), trained(whole.model))
    assert all(p.dtype == torch.float32 for p in trained(whole.model))


# ------------------------------------------------------------------------------------------------ Accelerate


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerator_is_the_plain_loop(wrap, precision, tmp_path):
    """Accumulation over two batches, clipping, mixed precision; and saved in the middle, loaded into another model."""

    def make(seed=1):
        model = fill(wrap(llama(2), dropout=0.2), seed).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        return model, optimizer, torch.utils.data.DataLoader(rows(), batch_size=4)

    def accelerator():
        return Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)

    def epoch(tool, model, optimizer, loader):
        seen = []
        for batch in loader:
            with tool.accumulate(model):
                loss = model(**batch).loss
                tool.backward(loss)
                if tool.sync_gradients:
                    tool.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                seen.append(loss.item())
        return seen

    model, optimizer, loader = make()
    torch.manual_seed(5)
    want = []
    for _ in range(2):
        for step, batch in enumerate(loader):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = model(**batch).loss
            (loss / 2).backward()
            want.append(loss.item())
            if step % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()

    tool = accelerator()
    prepared = tool.prepare(*make())
    torch.manual_seed(5)
    got = epoch(tool, *prepared)
    tool.save_state(tmp_path)
    got += epoch(tool, *prepared)
    assert got == want
    assert same(trained(tool.unwrap_model(prepared[0])), trained(model))

    AcceleratorState._reset_state(reset_partial_state=True)
    tool = accelerator()
    prepared = tool.prepare(*make(seed=9))
    tool.load_state(tmp_path)
    assert epoch(tool, *prepared) == want[len(want) // 2 :]
    assert same(trained(tool.unwrap_model(prepared[0])), trained(model))


# ------------------------------------------------------------------------------------------------ checkpointed activations


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(wrap, reentrant, dropout, bf16):
    model, batch = fill(wrap(llama(2), dropout=dropout)).train(), batch_of()
    blocks = []
    for name, module in model.named_modules():
        if name.endswith("input_layernorm"):
            module.register_forward_pre_hook(lambda *_: blocks.append(1))

    def loss():
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(**batch).loss

    want = gradients(model, loss)
    if not dropout and not bf16:
        assert error(want, dense_gradients(model, llama(2).train(), batch)) < 1e-5  # float32, grouped in another way
    assert len(blocks) == 2
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # reentrant checkpoints need an input with a gradient; so says transformers
    # To the bit: the same operators on the same values, with the same masks.
    assert same(gradients(model, loss), want)
    assert len(blocks) == 2 + 4  # every block twice


OURS = [getattr(torch.ops.mos_ext, name).default for name in ("low_rank", "low_rank_", "shrink", "expand")]
MATMULS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default]
SAVED = {"nothing": [], "ours": OURS, "matmuls": MATMULS, "both": OURS + MATMULS}


def saving(operators):
    """What torch's documentation calls a policy: these are kept, everything else is computed again."""

    def policy(context, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operator in operators else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda: create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("saved", SAVED)
def test_selective_checkpointing(wrap, saved, called, dropout):
    model = fill(wrap(called_linears(stack()) if called else stack(), dropout=dropout)).train()
    blocks = [module for module in model.modules() if hasattr(module, "up")]
    x = torch.randn(5, 24)

    def loss(selective):
        torch.manual_seed(3)
        y = x
        for block in blocks:
            policy = saving(SAVED[saved])
            y = checkpoint(block, y, use_reentrant=False, context_fn=policy) if selective else block(y)
        return y.square().sum()

    want = gradients(model, lambda: loss(False))
    model.zero_grad()
    # A loss, not only its backward: what is saved is still right when the forward pass is over.
    result = loss(True)
    with Count() as count:
        result.backward()
    got = [p.grad for pool in pools(model) for p in (pool.shards_a, pool.shards_b)]
    # float32: under a policy, base and branch may be computed as two products and rounded once more.
    assert error(got, want) < 1e-6
    # In a backward pass, addmm and linear are products of a forward pass that is computed again.
    again = count.total(OURS), count.total([torch.ops.aten.addmm.default, torch.ops.aten.linear.default])
    assert again[0] == (0 if saved in ("ours", "both") else 6)
    assert again[1] == (0 if saved in ("matmuls", "both") else 6)


def test_selective_checkpointing_of_two_adapters():
    model = fill(two_adapters(stack())).train()
    x = torch.randn(5, 24)

    def loss(saved):
        y = x
        for block in model.get_base_model():
            y = block(y) if saved is None else checkpoint(block, y, use_reentrant=False, context_fn=saving(saved))
        return y.square().sum()

    want = gradients(model, lambda: loss(None))
    for saved in SAVED.values():
        assert error(gradients(model, lambda saved=saved: loss(saved)), want) < 1e-6  # as above


@pytest.mark.parametrize("saved", ["ours", "both"])
def test_selective_checkpointing_of_a_transformer(wrap, saved):
    """As TRL's ``selective`` does it: a policy for transformers' own checkpoints; here under bf16 autocast."""
    model, batch = fill(wrap(llama(2), dropout=0.2)).train(), batch_of()

    def loss():
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    # A policy that keeps nothing takes the same way through a layer, so that bf16 rounds the same values.
    results = []
    for operators in ([], SAVED[saved]):
        kwargs = {"use_reentrant": False, "context_fn": saving(operators)}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        results.append(gradients(model, loss))
    assert same(*results)
    model.gradient_checkpointing_disable()
    # bf16 has 8 bits, and without a policy each layer rounds its sum in another place. Both ways are off by 0.07 from
    # float32, as plain PyTorch is (test_scaled_gradients); from each other by less.
    assert error(results[0], gradients(model, loss)) < 0.07


# ------------------------------------------------------------------------------------------------ hooks of parameters


def run_blocks(blocks, how, x):
    """Each block plainly (n), under non-reentrant (o) or reentrant (r) checkpointing, or the latter inside
    either (N, R)."""

    for block, way in zip(blocks, how, strict=True):
        if way == "n":
            x = block(x)
        elif way in "or":
            x = checkpoint(block, x, use_reentrant=way == "r")
        else:
            x = checkpoint(partial(checkpoint, block, use_reentrant=True), x, use_reentrant=way == "R")
    return x


def blocks_of(model):
    return [module for module in model.modules() if hasattr(module, "up")]


def adapted_stack(way, tied=False):
    """With every layer of a type in one pool; or one block, alone in its pools, that is called three times."""
    model = fill(WAYS[way](stack(1 if tied else 3).double(), pool_dtype="float64", **({"r": 3} if tied else {})))
    return model, blocks_of(model) * (3 if tied else 1)


def deliveries(model):
    """What hooks of the pools see, per parameter: a list of gradients."""
    seen = {name: [] for name, p in model.named_parameters() if p.requires_grad}

    def watch(name):
        return lambda p: seen[name].append(p.grad.clone())

    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(watch(name))
    assert len(seen) == 4
    return seen


HOWS = ["nnn", "ooo", "rrr", "nor", "ron", "nrn", "rnr", "RRR", "NNN", "nRN"]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("way", WAYS)
def test_a_pool_gets_its_gradient_once_per_backward_pass(way, how, tied, train):
    x = torch.randn(5, 24, dtype=torch.float64)

    def backward(model, blocks, how, scale=1.0):
        (scale * run_blocks(blocks, how, x.clone().requires_grad_()).square().mean()).backward()

    plain, blocks = adapted_stack(way, tied)
    backward(plain, blocks, "nnn")
    want = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    model, blocks = adapted_stack(way, tied)
    model.train(train)
    seen = deliveries(model)
    for passes, total in enumerate((1, 3, 4), 1):  # gradients accumulate, from another loss the second time
        backward(model, blocks, how, total - (0, 1, 3)[passes - 1])
        for name, gradients_seen in seen.items():
            assert len(gradients_seen) == passes
            # float64: a sum in another order.
            torch.testing.assert_close(gradients_seen[-1], total * want[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("how", ["nnn", "ooo", "rrr", "nrn", "RRR"])
@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_that_steps_in_hooks(way, how):
    """One that steps after backward makes the same steps: layer-wise optimisers, torchtune's optimizer_in_bwd."""
    xs = torch.randn(4, 5, 24, dtype=torch.float64)

    def optimizers(model):
        return {p: torch.optim.Adam([p], lr=0.01) for p in model.parameters() if p.requires_grad}

    plain, blocks = adapted_stack(way)
    after = optimizers(plain)
    for x in xs:
        run_blocks(blocks, "nnn", x).square().mean().backward()
        for optimizer in after.values():
            optimizer.step()
            optimizer.zero_grad()

    model, blocks = adapted_stack(way)
    inside, steps = optimizers(model), []

    def step(p):
        inside[p].step()
        inside[p].zero_grad()
        steps.append(p)

    for p in inside:
        p.register_post_accumulate_grad_hook(step)
    for x in xs:
        run_blocks(blocks, how, x.clone().requires_grad_()).square().mean().backward()
    assert len(steps) == 4 * len(inside)
    for got, want in zip(inside, after, strict=True):
        # float64; Adam divides by the gradient's size, so roundings of 2e-16 grow with small gradients.
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------------ accumulation, autocast


def test_micro_batches_are_one_batch(wrap):
    model = fill(wrap(llama(2))).train()
    ids = batch_of(8)["input_ids"]

    def backward(parts):
        for part in ids.chunk(parts):
            (model(input_ids=part, labels=part).loss / parts).backward()

    results = []
    for parts in (1, 4):
        model.zero_grad()
        backward(parts)
        results.append([p.grad.clone() for pool in pools(model) for p in (pool.shards_a, pool.shards_b)])
    # float32: the same sum over 8 x 11 tokens in another order, at 6e-8 a rounding.
    assert error(results[1], results[0]) < 2e-6
    dense = dense_gradients(model, llama(2), {"input_ids": ids, "labels": ids})
    assert error(results[1], dense) < 1e-5  # and these group the products in another way, too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(wrap, dtype, device):
    model = fill(wrap(llama(2), dropout=0.1)).train().to(device)
    batch = {name: tensor.to(device) for name, tensor in batch_of().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    seen = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            output = model(**batch)
        scaler.scale(output.loss).backward()
        assert all(p.grad.dtype == torch.float32 for p in optimizer.param_groups[0]["params"])
        scaler.step(optimizer)
        scaler.update()
        seen.append(output.loss.item())
    assert output.logits.dtype == dtype
    assert scaler.get_scale() == 2.0**10  # no step was skipped
    assert seen[-1] < seen[0] - 0.1
    assert all(p.dtype == torch.float32 for p in trained(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_gradients(wrap, dtype, device):
    """What scaling is for: gradients below float16's range, and right when they are unscaled."""
    model = fill(wrap(llama(2))).train().to(device)
    batch = {name: tensor.to(device) for name, tensor in batch_of().items()}
    small = 2.0**-20
    want = dense_gradients(model, llama(2).to(device), batch)

    def loss():
        with torch.autocast(device, dtype):
            return model(**batch).loss * small

    scaler = torch.amp.GradScaler(device, init_scale=2.0**24)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gradients(model, lambda: scaler.scale(loss()))
    scaler.unscale_(optimizer)
    got = [p.grad / small for pool in pools(model) for p in (pool.shards_a, pool.shards_b)]
    unscaled = [grad / small for grad in gradients(model, loss)]
    # Against float32 without autocast: the rounding of operands, 2**-8 and 2**-11, over some ten products in a row. Twice
    # what plain PyTorch is off by in bfloat16, 0.070; float16 has three bits more.
    bound = {torch.bfloat16: 0.14, torch.float16: 0.01}[dtype]
    assert error(got, want) < bound
    assert (error(unscaled, want) < bound) == (dtype == torch.bfloat16)  # float16 loses them; bfloat16 has the range


def test_a_step_with_infinite_gradients_is_skipped(wrap, device):
    model = fill(wrap(llama(2))).train().to(device)
    batch = {name: tensor.to(device) for name, tensor in batch_of().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**60, backoff_factor=2.0**-50)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return trained(model)

    before = trained(model)
    assert same(step(), before)
    assert scaler.get_scale() == 2.0**10
    after = step()
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(torch.isfinite(p).all() for p in after)


# ------------------------------------------------------------------------------------------------ torch.compile


class CalledLinear(nn.Linear):
    """Any linear that is not exactly torch's is called, and the adapter added to what it returns."""


def called_linears(model):
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = CalledLinear
    return model


def two_adapters(model, **fields):
    model = under_peft(model, **fields)
    model.add_adapter("second", peft_config(**{"r": 5, "seed": 5, **fields}))
    model.base_model.set_adapter(["default", "second"])
    return model


def counting():
    """The compiled graph is executed, not generated code, as in test_compile.py; and compilations are counted."""
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend("aot_eager")


def sgd_steps(model, forward, xs):
    optimizer = torch.optim.SGD([p for pool in pools(model) for p in (pool.shards_a, pool.shards_b)], lr=0.05)
    seen = []
    for x in xs:
        optimizer.zero_grad()
        loss = forward(x).square().mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


COMPILED = {
    "peft": under_peft,
    "peft, base called": lambda model, **fields: under_peft(called_linears(model), **fields),
    "peft, two adapters": two_adapters,
    "peft, two adapters, base called": lambda model, **fields: two_adapters(called_linears(model), **fields),
    "adapt, base called": lambda model, **fields: natively(called_linears(model), **fields),
}


@pytest.mark.parametrize(
    ("kind", "dynamic"), [*((kind, True) for kind in COMPILED), ("peft", False), ("peft, two adapters", False)]
)
def test_compiled_training_steps(kind, dynamic):
    """With dropout, so that the masks are tested to be those of eager mode, too."""
    eager, model = (fill(COMPILED[kind](stack(2), dropout=0.3)).train() for _ in range(2))
    counter = counting()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic or None, backend=counter)
    first, *rest = [torch.randn(count, 24) for count in ((6, 11, 3, 200, 17) if dynamic else (6, 6, 6, 6, 6))]
    torch.manual_seed(3)
    got = sgd_steps(model, compiled, [first])
    frames = counter.frame_count
    assert frames == 1 or dynamic  # torch may call the backend twice while it learns which sizes vary
    got += sgd_steps(model, compiled, rest)
    assert counter.frame_count == frames
    torch.manual_seed(3)
    # float32: a graph may add up in another order.
    assert got == pytest.approx(sgd_steps(eager, eager, [first, *rest]), rel=1e-5)


@pytest.mark.parametrize("called", [False, True])
def test_switching_adapters_compiles_each_once(called):
    def make():
        return fill(two_adapters(called_linears(stack(2)) if called else stack(2)))

    eager, model = make(), make()
    counter = counting()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    xs = [torch.randn(6, 24) for _ in range(3)]
    frames = []
    for active in (["default", "second"], "default", "second", "default", "second", ["default", "second"]):
        for either in (eager, model):
            either.base_model.set_adapter(active)
        assert sgd_steps(model, compiled, xs) == pytest.approx(sgd_steps(eager, eager, xs), rel=1e-5)  # as above
        frames.append(counter.frame_count)
    assert frames == [1, 2, 3, 3, 3, 3]


def test_a_compiled_transformer_under_peft():
    model, batch = fill(under_peft(llama(2))), batch_of()
    counter = counting()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    want = dense_gradients(model, llama(2), batch)
    for _ in range(2):
        # float32: the products are grouped in another way.
        assert error(gradients(model, lambda: compiled(**batch).loss), want) < 1e-5
    assert counter.frame_count == 1


# ------------------------------------------------------------------------------------------------ CUDA graphs

if torch.cuda.is_available():

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_cuda_graph(wrap, dropout):
        """Forward and backward, captured as torch's documentation says: warmed up on a side stream, gradients None."""
        model = fill(wrap(stack().cuda(), dropout=dropout)).train()
        xs = torch.randn(3, 6, 24, device="cuda")
        x = xs[0].clone()

        def loss():
            return model(x).square().sum()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                gradients(model, loss)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        model.zero_grad()
        with torch.cuda.graph(graph):
            loss().backward()
        static = [p.grad for pool in pools(model) for p in (pool.shards_a, pool.shards_b)]

        def replay(new):
            x.copy_(new)
            graph.replay()
            return [grad.clone() for grad in static]

        if dropout:
            assert not same(replay(xs[1]), replay(xs[1]))  # every replay draws a mask of its own
            return
        for factor, new in zip((1, 2, 2), xs, strict=True):  # a graph reads inputs and pools as they are
            with torch.no_grad():
                for pool in pools(model):
                    pool.shards_a.mul_(factor)
            got = replay(new)
            eager = copy.deepcopy(model)  # leaves the gradients alone that the graph writes
            want = gradients(eager, lambda: eager(new).square().sum())  # noqa: B023
            assert error(got, want) < 1e-5  # float32: cuBLAS may choose another product under capture


# ------------------------------------------------------------------------------------------------ copies, under PEFT


def adapted_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, mos_peft.MoSLayer)}


def deltas(model):
    return {name: layer.get_delta_weight("default") for name, layer in adapted_layers(model).items()}


COPIES = ["deepcopy", "pickle", "torch.save", "to float64 and back", "state_dict", "assign"]


def copied(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    if how == "to float64 and back":
        return copy.deepcopy(model).to(torch.float64).to(torch.float32)
    other = fill(under_peft(stack()), seed=9)
    gradients(other, lambda: other(torch.randn(5, 24)).sum())  # handles for the parameters that are replaced
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=how == "assign")
    for pool in pools(other):
        pool.requires_grad_(True)  # assigned tensors of a state_dict require none
    return other


@pytest.mark.parametrize("how", COPIES)
def test_copies_under_peft(how):
    model, x = fill(under_peft(stack())), torch.randn(5, 24)
    want = gradients(model, lambda: model(x).square().sum())  # handles exist now
    other = copied(model, how)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    assert torch.equal(other(x), model(x))
    before = [p.grad.clone() for pool in pools(model) for p in (pool.shards_a, pool.shards_b)]
    assert same(gradients(other, lambda: other(x).square().sum()), want)
    assert same([p.grad for pool in pools(model) for p in (pool.shards_a, pool.shards_b)], before)

    # Still shared: what a pool of the copy becomes, all its layers become, and none of the original's.
    assert len(pools(other)) == len(pools(model)) == 2
    mine, others = deltas(model), deltas(other)
    for pool in pools(other):
        with torch.no_grad():
            pool.shards_a.mul_(2)
    for name, delta in deltas(other).items():
        assert torch.equal(delta, 2 * others[name])
        assert delta.any()
    assert all(torch.equal(delta, mine[name]) for name, delta in deltas(model).items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_under_peft(dtype):
    model, x = fill(under_peft(stack())), torch.randn(5, 24)
    y, want = model(x).detach(), gradients(model, lambda: model(x).square().sum())
    assert model.to(dtype) is model
    got = gradients(model, lambda: model(x.to(dtype)).square().sum())
    assert model(x.to(dtype)).dtype == dtype
    assert all(grad.dtype == dtype for grad in got)
    # Roundings of the narrower dtype, 6e-8 or 4e-3, over the six layers.
    bound = 1e-6 if dtype == torch.float64 else 0.05
    assert error([model(x.to(dtype))], [y]) < bound
    assert error(got, want) < bound
    layers = adapted_layers(model).values()
    assert {layer.mos_pools["default"] for layer in layers} == set(pools(model))


def test_functional_call_under_peft():
    model, x = fill(under_peft(stack())), torch.randn(5, 24)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    replaced = {name: (2 * p.detach()).requires_grad_() for name, p in names.items()}
    gradients(model, lambda: model(x).sum())  # handles for the model's own parameters
    y = torch.func.functional_call(model, replaced, (x,))
    got = torch.autograd.grad(y.square().sum(), list(replaced.values()))
    with torch.no_grad():
        for p in names.values():
            p.mul_(2)
    assert torch.equal(y, model(x))
    model.zero_grad()
    model(x).square().sum().backward()
    # float32: a dense gradient per layer, added up in another order.
    assert error(got, [p.grad for p in names.values()]) < 1e-6
