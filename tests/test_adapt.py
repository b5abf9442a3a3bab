"""Layers and whole models: adapt, switch off, merge, report, and the method's semantics on real architectures."""

import copy
import sys
import threading
import warnings
from dataclasses import replace

import accelerate
import pytest
import torch
from models import BUILDERS, gpt2, inputs, llama, randomize, stack
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

import mos_ext
import mos_ext.integrations.peft as mos_peft
from mos_ext import MoSConfig, MoSLinear, ShardPool, linear, reference
from mos_ext.adapt import mos_layers
from mos_ext.routing import IndexTables

SMALL = MoSConfig(r=4, equivalent_rank=3, shards_per_vector=2, private_rank=1)
ARCHITECTURES = sorted(BUILDERS)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_new_adapter_changes_nothing(name):
    model, batch = BUILDERS[name](), inputs(name)
    before = logits(model, batch)
    assert mos_ext.adapt(model, SMALL) is model
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trained_disabled_merged_unmerged(name):
    model, batch = BUILDERS[name](), inputs(name)
    base, weights = logits(model, batch), {k: v.clone() for k, v in model.state_dict().items()}
    randomize(mos_ext.adapt(model, SMALL))
    adapted = logits(model, batch)
    assert (adapted - base).abs().max() > 1e-3
    with mos_ext.disabled(model) as same:
        assert same is model
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), adapted)
    assert mos_ext.merge(model) is model
    torch.testing.assert_close(logits(model, batch), adapted, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    mos_ext.merge(model)  # again: nothing happens
    assert mos_ext.unmerge(model) is model
    for key, value in model.state_dict().items():
        if key in weights:
            torch.testing.assert_close(value, weights[key], rtol=1e-6, atol=1e-7)  # one rounding
    torch.testing.assert_close(logits(model, batch), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trainable_parameters_are_the_pools_and_nothing_else(name):
    model = mos_ext.adapt(BUILDERS[name](), SMALL)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"mos_pools.{n}" for n, _ in model.mos_pools.named_parameters()}
    assert all(n.endswith((".shards_a", ".shards_b")) for n in trainable)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n in trainable)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_base_state_dict_keeps_its_keys(name):
    model = BUILDERS[name]()
    before = model.state_dict()
    mos_ext.adapt(model, SMALL)
    after = model.state_dict()
    assert [k for k in after if not k.startswith("mos_pools.")] == list(before)
    assert all(after[k].data_ptr() == before[k].data_ptr() for k in before)
    assert len(after) == len(before) + 2 * len(model.mos_pools.pools)  # tables are derived


def test_adapted_model_computes_the_definition():
    """float64, layer by layer, against dense matrices built from pools and tables."""
    model = randomize(
        mos_ext.adapt(
            stack(dtype=torch.float64),
            MoSConfig(r=5, equivalent_rank=3, shards_per_vector=3, private_rank=2, alpha=7, pool_dtype="float64"),
        )
    )
    x = torch.randn(4, 24, dtype=torch.float64)
    want = x
    for block in list(model)[:3]:
        up, down = (
            layer.weight
            + 7
            / 5
            * (
                reference.gather_concat(layer.pool.shards_b, layer.pool.index_b[layer.layer]).T
                @ reference.gather_concat(layer.pool.shards_a, layer.pool.index_a[layer.layer])
            )
            for layer in (block.up, block.down)
        )
        want = want + torch.relu(want @ up.T + block.up.bias) @ down.T + block.down.bias
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    layer = model[0].up
    a, b = layer.factors()
    assert (a.shape, b.shape) == ((5, 24), (48, 5))
    torch.testing.assert_close(layer.delta_weight(), 7 / 5 * b @ a)


class TestAblations:
    """The paper's strategies, switched off one by one."""

    def deltas(self, config, layers=3):
        model = randomize(mos_ext.adapt(stack(layers), config))
        return model, [block.up for block in list(model)[:layers]]

    def test_pure_sharing_uses_the_whole_pool_in_every_layer(self):
        e, layers = 2, 3
        config = MoSConfig(
            r=e * layers, equivalent_rank=e, shards_per_vector=1, private_rank=0, pair_dissociation=False
        )
        _, ups = self.deltas(config)
        for layer in ups:
            dense = config.scale * layer.pool.shards_b.T @ layer.pool.shards_a
            torch.testing.assert_close(
                layer.delta_weight(), dense, rtol=1e-5, atol=1e-6
            )  # float32, another order of ranks

    def test_all_private_is_vanilla_lora(self):
        config = MoSConfig(r=4, equivalent_rank=4, shards_per_vector=1, private_rank=4)
        _, ups = self.deltas(config)
        for k, layer in enumerate(ups):
            own = slice(4 * k, 4 * k + 4)
            a, b = layer.factors()
            assert torch.equal(a, layer.pool.shards_a[own])
            assert torch.equal(b, layer.pool.shards_b[own].T)

    def test_pair_dissociation(self):
        for on in (True, False):
            _, ups = self.deltas(
                MoSConfig(r=4, equivalent_rank=3, shards_per_vector=2, private_rank=0, pair_dissociation=on)
            )
            assert torch.equal(ups[0].pool.index_a, ups[0].pool.index_b) != on

    def test_vector_sharding(self):
        for l in (1, 2, 4, 8):
            _, ups = self.deltas(MoSConfig(r=4, equivalent_rank=3, shards_per_vector=l, private_rank=1))
            assert ups[0].pool.shards_a.shape == (3 * 3 * l, 24 // l)

    def test_privatization(self):
        _, ups = self.deltas(MoSConfig(r=4, equivalent_rank=3, shards_per_vector=2, private_rank=2))
        tables = ups[0].pool.index_a
        private = tables[:, 2:].flatten(1)
        assert len(private.unique()) == private.numel()
        _, ups = self.deltas(MoSConfig(r=4, equivalent_rank=3, shards_per_vector=2, private_rank=0))
        assert ups[0].pool.index_a.max() < 18


def test_training_lowers_the_loss_and_leaves_the_base_alone():
    model, batch = llama(), inputs("llama")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    mos_ext.adapt(model, SMALL)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())


def test_dropout_only_in_training():
    model = randomize(mos_ext.adapt(llama(), MoSConfig(r=4, equivalent_rank=3, shards_per_vector=2, dropout=0.5)))
    batch = inputs("llama")
    assert torch.equal(logits(model, batch), logits(model, batch))
    model.train()
    assert not torch.equal(logits(model, batch), logits(model, batch))
    torch.manual_seed(1)
    first = logits(model, batch)
    torch.manual_seed(1)
    assert torch.equal(first, logits(model, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_and_double_models(dtype):
    model = randomize(mos_ext.adapt(llama().to(dtype), SMALL))
    batch = inputs("llama")
    assert logits(model, batch).dtype == dtype
    model(**batch).logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.mos_pools.parameters())
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.weight.clone()
    layer.merge()
    want = (before.double() + layer.delta_weight().double()).to(dtype)
    torch.testing.assert_close(layer.weight, want, rtol=torch.finfo(dtype).eps, atol=0)  # one rounding, not two
    layer.unmerge()
    torch.testing.assert_close(
        layer.weight, before, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps * want.abs().max().item()
    )


def test_autocast():
    model, batch = randomize(mos_ext.adapt(llama(), SMALL)), inputs("llama")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.mos_pools.parameters())


def test_conv1d_keeps_its_layout():
    model = randomize(mos_ext.adapt(gpt2(), SMALL))
    layer = model.transformer.h[0].attn.c_attn
    assert not isinstance(layer, nn.Linear)  # tools would take its weight for (out, in)
    assert (layer.in_features, layer.out_features) == (48, 144)
    assert layer.weight.shape == layer.delta_weight().shape == (48, 144)


def test_report():
    model = mos_ext.adapt(llama(), MoSConfig(r=4, equivalent_rank=3, shards_per_vector=2))
    report = mos_ext.parameter_report(model)
    assert report.trainable == 3 * 4 * (128 + 96 + 96 + 128 + 160 + 160 + 160)
    assert report.lora_parameters == report.trainable * 4 // 3
    assert (report.equivalent_rank, report.r) == (3, 4)
    assert report.total == sum(p.numel() for p in model.parameters())
    text = str(report)
    assert "model.layers.*.self_attn.q_proj[64->64]" in text
    assert f"trainable {report.trainable:,} of {report.total:,}" in text
    assert "the budget of LoRA rank 3, the rank of LoRA rank 4" in text


class Tied(nn.Module):
    """One linear in two places, and one weight in two linears."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(8, 8)
        self.x = nn.ModuleList([shared, nn.Linear(8, 8)])
        self.y = nn.ModuleList([shared, nn.Linear(8, 8)])
        self.y[1].weight = self.x[1].weight


def test_modules_tied_to_two_places(tmp_path):
    model = Tied()
    mos_ext.adapt(model, MoSConfig(r=1, equivalent_rank=1, private_rank=0, shards_per_vector=2))
    assert isinstance(model.x[0], MoSLinear)
    assert model.x[0] is model.y[0]
    with pytest.raises(ValueError, match=r"an exported module must have one name, got one that is also y\.0"):
        mos_ext.export_lora(model, tmp_path)


def test_merging_a_weight_that_others_use_too():
    model = randomize(mos_ext.adapt(Tied(), MoSConfig(r=1, equivalent_rank=1, private_rank=0, shards_per_vector=2)))
    unchanged(
        model,
        lambda: mos_ext.merge(model),
        ValueError,
        r"a merged weight must belong to one module alone, got one that is x\.1\.weight, y\.1\.weight",
    )
    head = llama(tie_word_embeddings=True)
    randomize(
        mos_ext.adapt(
            head, MoSConfig(r=1, equivalent_rank=1, private_rank=0, shards_per_vector=2, target_modules=["lm_head"])
        )
    )
    unchanged(
        head, lambda: mos_ext.merge(head), ValueError, r"got one that is model\.embed_tokens\.weight, lm_head\.weight"
    )


def test_unmerging_needs_the_pools_that_were_merged():
    model = mos_ext.merge(randomize(mos_ext.adapt(llama(), SMALL)))
    other = copy.deepcopy(model)
    mos_ext.unmerge(other)  # a copy counts anew
    with torch.no_grad():
        model.mos_pools.pools[0].shards_b.mul_(2)
    unchanged(
        model,
        lambda: mos_ext.unmerge(model),
        ValueError,
        r"q_proj: the pools must not change between merge and unmerge",
    )


def test_loading_weights_into_a_merged_model():
    model = randomize(mos_ext.adapt(llama(), SMALL))
    state = copy.deepcopy(model.state_dict())
    mos_ext.merge(model)
    with pytest.raises(ValueError, match="q_proj must not be merged while its weight is loaded: call unmerge first"):
        model.load_state_dict(state)


def test_pools_in_another_configuration_do_not_bring_their_tables():
    """Shapes do not tell private_rank=1 from 2; the tables are the configuration's all the same."""
    model, other = mos_ext.adapt(llama(), SMALL), mos_ext.adapt(llama(), replace(SMALL, private_rank=2))
    want = [pool.index_a.clone() for pool in other.mos_pools.pools]
    other.load_state_dict(randomize(model).state_dict())
    for ours, theirs, table in zip(other.mos_pools.pools, model.mos_pools.pools, want, strict=True):
        assert torch.equal(ours.shards_a, theirs.shards_a)
        assert torch.equal(ours.index_a, table)
        assert not torch.equal(ours.index_a, theirs.index_a)


def test_merge_inside_disabled():
    model = randomize(mos_ext.adapt(llama(), SMALL))
    with pytest.raises(ValueError, match=r"model must not be merged inside disabled\(\)"), mos_ext.disabled(model):
        mos_ext.merge(model)


def test_compiled_wrappers_are_seen_through(tmp_path):
    model = torch.compile(llama(), backend="eager")
    assert mos_ext.adapt(model, SMALL) is model
    randomize(model._orig_mod)
    assert mos_ext.parameter_report(model).equivalent_rank == 3
    mos_ext.unmerge(mos_ext.merge(model))
    mos_ext.save_adapter(model, tmp_path / "a")
    mos_ext.export_lora(model, tmp_path / "l")
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "l" / "adapter_model.safetensors"))
    mos_ext.load_adapter(llama(), tmp_path / "a")


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Activated(nn.Linear):
    """Its backward needs its output, which must therefore not be overwritten."""

    def forward(self, x):
        return super().forward(x).sigmoid()


def replaced_forward(model):
    model[1].down.forward = lambda x: 3 * x[..., :24]


def weight_norm(model):
    torch.nn.utils.parametrizations.weight_norm(model[1].down)


def subclass(model):
    model[1].down = Tripled(48, 24)


def activated(model):
    model[1].down = Activated(48, 24)


def pruned(model):
    prune.l1_unstructured(model[1].down, "weight", 0.5)


@pytest.mark.parametrize("change", [replaced_forward, weight_norm, subclass, activated, pruned])
def test_linears_that_compute_something_else_are_called_as_they_are(change):
    model = stack()
    change(model)
    base = model[1].down
    randomize(mos_ext.adapt(model, SMALL))
    layer, x = model[1].down, torch.randn(5, 48, requires_grad=True)
    assert layer.base_layer is base
    assert model[0].down.opaque is None
    y = layer(x)
    torch.testing.assert_close(y, base(x) + x @ layer.delta_weight().T, rtol=1e-5, atol=1e-5)  # float32, another order
    (got,) = torch.autograd.grad(y.sum(), x)
    (want,) = torch.autograd.grad((base(x) + x @ layer.delta_weight().T).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with mos_ext.disabled(model):
        assert torch.equal(layer(x), base(x))
    with pytest.raises(ValueError, match=r"1\.down: a merged layer must have a plain weight, got one of which .*"):
        mos_ext.merge(model)
    assert not any(layer.merged for _, layer in mos_layers(model))


def test_offloaded_bases(tmp_path):
    """accelerate keeps weights elsewhere and brings them when a layer is called: the adapter is where they are brought."""
    want, batch = randomize(mos_ext.adapt(llama(), SMALL)), inputs("llama")
    mos_ext.save_adapter(want, tmp_path)
    for put in (lambda base: randomize(mos_ext.adapt(base, SMALL)), lambda base: mos_ext.load_adapter(base, tmp_path)):
        base = accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))
        assert {p.device.type for p in base.parameters()} == {"meta"}
        model = put(base)
        assert {p.device.type for p in model.mos_pools.parameters()} == {"cpu"}
        torch.testing.assert_close(logits(model, batch), logits(want, batch), rtol=1e-5, atol=1e-6)
        model(**batch).logits.sum().backward()
        assert all(pool.shards_b.grad.abs().sum() > 0 for pool in model.mos_pools.pools)


@pytest.mark.parametrize(
    "root", [nn.ModuleList, lambda layers: nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)})]
)
def test_bare_containers(root):
    model = root([nn.Linear(8, 8), nn.Linear(8, 8)])
    unchanged(
        model,
        lambda: mos_ext.adapt(model, SMALL),
        TypeError,
        "model must be a module with a forward of its own, got a Module",
    )


def test_an_attribute_in_the_way():
    model = stack()
    model.mos_pools = None
    unchanged(model, lambda: mos_ext.adapt(model, SMALL), ValueError, "model must have no attribute mos_pools")


def test_from_meta_to_memory():
    """The flow of large models: adapt on meta, to_empty, reset: tables come back, pools start anew."""
    with torch.device("meta"):
        model = llama()
        mos_ext.adapt(model, SMALL)
    assert all(t.device.type == "meta" for t in (*model.parameters(), *(p.index_a for p in model.mos_pools.pools)))
    model.to_empty(device="cpu")
    for pool in model.mos_pools.pools:
        pool.reset_parameters()
    for ours, fresh in zip(model.mos_pools.pools, mos_ext.adapt(llama(), SMALL).mos_pools.pools, strict=True):
        assert torch.equal(ours.index_a, fresh.index_a)
        assert torch.equal(ours.index_b, fresh.index_b)
        assert not ours.shards_b.any()


def test_torch_s_fused_encoder_path_does_not_skip_the_adapter():
    """nn.TransformerEncoderLayer reads the weights of its linears instead of calling them, in eval mode without gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)
    mos_ext.adapt(
        encoder, MoSConfig(r=2, equivalent_rank=2, shards_per_vector=2, target_modules=["linear1", "linear2"])
    )
    with torch.no_grad():
        before = encoder(x)
        randomize(encoder)
        without_grad = encoder(x)
    assert not torch.allclose(before, without_grad)
    torch.testing.assert_close(encoder(x), without_grad, rtol=1e-5, atol=1e-6)


def test_hooks_of_the_base_keep_firing():
    model, seen = stack(), []
    handle = model[0].up.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    mos_ext.adapt(model, SMALL)
    model(torch.randn(2, 24))
    assert seen == ["MoSLinear"]
    handle.remove()
    model(torch.randn(2, 24))
    assert seen == ["MoSLinear"]


# ------------------------------------------------------------------------------------------------ the layer alone


def test_standalone_layer():
    config = MoSConfig(r=4, equivalent_rank=4, shards_per_vector=2, private_rank=1)
    layer = MoSLinear(16, 24, config=config)
    assert {n for n, _ in layer.named_parameters()} == {"weight", "bias", "pool.shards_a", "pool.shards_b"}
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert MoSLinear(16, 24, bias=False, config=config).bias is None
    assert "in_features=16, out_features=24, bias=True, r=4" in repr(layer)


def test_layers_that_share_a_pool():
    pool = ShardPool(MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, private_rank=1), 16, 16, num_layers=3)
    model = nn.Sequential(*(MoSLinear(16, 16, pool=pool, layer=k) for k in range(3)))
    assert sum(p is pool.shards_a for p in model.parameters()) == 1
    model(torch.randn(2, 16)).sum().backward()
    assert pool.shards_b.grad is not None
    assert all(layer.pool is pool for layer in model)


def test_from_linear_shares_the_parameters():
    linear = nn.Linear(8, 8).eval()
    layer = MoSLinear.from_linear(linear, config=MoSConfig(r=2, equivalent_rank=2, shards_per_vector=2))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training


# ------------------------------------------------------------------------------------------------ bad input


def unchanged(model, call, error, message):
    """The call raises, and the model is bit for bit what it was."""
    state, modules = (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(n, type(m)) for n, m in model.named_modules()],
    )
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        call()
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (MoSConfig(target_modules=["nothing"]), ValueError, "target_modules must match"),
        (MoSConfig(r=4, equivalent_rank=4, shards_per_vector=5), ValueError, "shards_per_vector must divide"),
        (MoSConfig(r=99, equivalent_rank=2, target_modules=["q_proj"]), ValueError, "r must be at most"),
        (MoSConfig(target_modules=["embed_tokens"]), TypeError, "target_modules must select"),
        ({"r": 4}, TypeError, "config must be a mos_ext.MoSConfig, got a builtins.dict"),
    ],
)
def test_bad_adapt(config, error, message):
    model = llama()
    unchanged(model, lambda: mos_ext.adapt(model, config), error, message)


def test_adapting_twice():
    model = randomize(mos_ext.adapt(llama(), SMALL))
    unchanged(model, lambda: mos_ext.adapt(model, SMALL), ValueError, "model must not be adapted yet")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        mos_ext.adapt(3, SMALL)


def test_calls_that_need_an_adapter():
    model = llama()
    for call in (mos_ext.merge, mos_ext.unmerge, mos_ext.parameter_report, lambda m: mos_ext.disabled(m).__enter__()):
        with pytest.raises(
            ValueError,
            match="model must be adapted with mos_ext.adapt or mos_ext.load_adapter, got a plain LlamaForCausalLM",
        ):
            call(model)


def test_disabled_while_merged():
    model = mos_ext.merge(mos_ext.adapt(llama(), SMALL))
    with pytest.raises(ValueError, match="model must not be merged inside disabled"), mos_ext.disabled(model):
        pass


def test_disabled_is_undone_after_an_error():
    model = mos_ext.adapt(llama(), SMALL)
    with pytest.raises(KeyError), mos_ext.disabled(model):
        raise KeyError
    assert all(layer.enabled for layer in model.modules() if isinstance(layer, MoSLinear))


def test_merge_is_all_or_nothing():
    model = randomize(mos_ext.adapt(llama(), SMALL))
    with torch.no_grad():
        model.mos_pools.pools[-1].shards_b[-1] = float("inf")  # a private shard of the last layer's down_proj
    unchanged(
        model,
        lambda: mos_ext.merge(model),
        ValueError,
        r"model\.layers\.3\.mlp\.down_proj: the weight must be finite after merge",
    )
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, MoSLinear))


def test_bad_layers():
    pool = ShardPool(MoSConfig(r=2, equivalent_rank=2), 8, 8, 2)
    for call, error, message in (
        (lambda: MoSLinear(8, 8), ValueError, "config must be given when there is no pool, got None"),
        (lambda: MoSLinear(8, 12, pool=pool), ValueError, "pool must be for 8 -> 12 features, got 8 -> 8"),
        (lambda: MoSLinear(8, 8, pool=pool, layer=2), ValueError, r"layer must be in \[0, 2\), got 2"),
        (
            lambda: MoSLinear(8, 8, pool=pool, config=MoSConfig()),
            ValueError,
            "config must be left out, or equal the pool's",
        ),
        (
            lambda: MoSLinear.from_linear(nn.ReLU(), pool=pool),
            TypeError,
            "linear must have in_features and out_features, as torch.nn.Linear has, got a ReLU",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_mismatched_inputs_of_a_layer():
    layer = MoSLinear(8, 8, config=MoSConfig(r=2, equivalent_rank=2))
    with pytest.raises(ValueError, match=r"x must have 8 features in its last dimension, got the shape \(3, 7\)"):
        layer(torch.randn(3, 7))
    with pytest.raises(TypeError, match="x must be float64, float32, bfloat16 or float16, got torch.int64"):
        layer(torch.ones(3, 8, dtype=torch.long))
    layer.pool.to(torch.float64)
    with pytest.raises(
        TypeError, match="pool .pool_dtype. must be float32 or have the dtype of x, torch.float32, got torch.float64"
    ):
        layer(torch.randn(3, 8))
    layer.pool.to("meta")
    with pytest.raises(ValueError, match="x must be on the device of the pool, meta, got cpu"):
        layer(torch.randn(3, 8))


# ------------------------------------------------------------------------------------------------ ranks and blocks


def test_ranks_and_scales_per_layer():
    """float64, against dense matrices of each layer's own rank; pools and their number of shards stay as they are."""
    config = MoSConfig(
        r=5,
        equivalent_rank=3,
        shards_per_vector=2,
        private_rank=1,
        alpha=7,
        pool_dtype="float64",
        rank_pattern={r"1\..*": 2, "2.down": 4},
        alpha_pattern={"0.up": 3},
        use_rslora=True,
    )
    model = randomize(mos_ext.adapt(stack(dtype=torch.float64), config))
    x = torch.randn(6, 24, dtype=torch.float64)
    for name, layer in mos_layers(model):
        rank = {"1.up": 2, "1.down": 2, "2.down": 4}.get(name, 5)
        a, b = layer.factors()
        assert a.shape[0] == b.shape[1] == rank
        assert torch.equal(
            a[-1], layer.pool.shards_a[layer.pool.index_a[layer.layer, -1]].flatten()
        )  # the private rank
        assert layer.scale == (3 if name == "0.up" else 7) / rank**0.5
        h = x if layer.in_features == 24 else torch.randn(6, 48, dtype=torch.float64)
        want = nn.functional.linear(h, layer.weight, layer.bias) + layer.scale * h @ a.T @ b.T
        torch.testing.assert_close(layer(h), want)
    assert all(pool.shards_a.shape[0] == 3 * 3 * 2 for pool in model.mos_pools.pools)
    report = mos_ext.parameter_report(model)
    assert report.lora_parameters == (24 + 48) * (5 + 2 + 5 + 5 + 2 + 4)
    model(x).square().sum().backward()
    unused = set(range(18)) - {int(i) for _, m in mos_layers(model) for i in m.pool.table("a", m.layer).flatten()}
    assert all(model.mos_pools.pools[0].shards_a.grad[i].abs().sum() == 0 for i in unused)


def test_ranks_per_layer_that_do_not_fit():
    config = MoSConfig(r=2, equivalent_rank=2, shards_per_vector=2, rank_pattern={"1.up": 9})
    unchanged(model := stack(), lambda: mos_ext.adapt(model, config), ValueError, "r must be at most 4 for 1.up, whose")


def test_layers_to_transform():
    config = MoSConfig(
        r=2, equivalent_rank=2, shards_per_vector=2, target_modules=["q_proj"], layers_to_transform=[0, 2]
    )
    model = mos_ext.adapt(llama(), config)
    assert [n for n, _ in mos_layers(model)] == ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]
    named = MoSConfig(**{**config.to_dict(), "layers_pattern": "h"})
    unchanged(
        model := llama(), lambda: mos_ext.adapt(model, named), ValueError, "target_modules must match at least one"
    )


# ------------------------------------------------------------------------------------------------ explain


@pytest.fixture
def native(monkeypatch):
    """As if there were native kernels, also where this file runs without."""
    monkeypatch.setattr(linear, "_why_not_native", lambda op, device: None)
    monkeypatch.setattr(linear, "_logged", set())


@pytest.mark.usefixtures("native")
def test_explain(caplog):
    caplog.set_level("INFO", logger="mos_ext")
    model = stack()
    model[1].down = Tripled(48, 24)
    randomize(mos_ext.adapt(model, SMALL))
    x = torch.randn(3, 24)
    model(x)
    model(x).sum().backward()
    explanation = mos_ext.explain(model)
    assert [layer.path for layer in explanation.layers] == [linear.FUSED] * 3 + ["the base layer is a Tripled"] + [
        linear.FUSED
    ] * 2
    assert explanation.layers[0].calls == {linear.FUSED: 2}
    assert explanation.layers[3].calls == {"the base layer is a Tripled": 2}
    assert str(explanation).splitlines() == [
        "5 of 6 layers: fused with the base layer",
        "    *.up (3 x Linear), *.down (2 x Linear)",
        "1 of 6 layers: the base layer is a Tripled",
        "    *.down (1 x Tripled)",
        "10 calls: fused with the base layer",
        "2 calls: the base layer is a Tripled",
        "    *.down (1 x Tripled)",
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "a layer takes a slower way: the base layer is a Tripled (mos_ext.explain(model) tells more)"
    ]
    with mos_ext.disabled(model):
        assert {layer.path for layer in mos_ext.explain(model).layers} == {linear.BASE_ALONE}
        model(x)
    assert mos_ext.explain(model).layers[0].calls == {linear.FUSED: 2, linear.BASE_ALONE: 1}
    with pytest.raises(ValueError, match="model must have adapted layers, got a plain Linear"):
        mos_ext.explain(nn.Linear(2, 2))


@pytest.mark.usefixtures("native")
def test_what_leaves_the_fast_way_is_named_and_logged_once(caplog, monkeypatch):
    model, x = randomize(mos_ext.adapt(stack(), SMALL)), torch.randn(3, 24)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    for _ in range(2):
        torch.func.functional_call(model, parameters, (x,)).sum().backward()
    torch.func.grad(lambda values: torch.func.functional_call(model, values, (x,)).sum())(parameters)
    monkeypatch.setattr(linear, "_why_not_native", lambda op, device: "_C: not built: no compiler")
    model(x)
    assert mos_ext.explain(model).layers[0].calls == {
        "pools were replaced by other tensors (functional_call, FSDP1): a dense gradient per layer": 2,
        "torch.func transforms or forward-mode differentiation are active": 1,
        "_C: not built: no compiler": 1,
    }
    assert mos_ext.explain(model).layers[0].path == "_C: not built: no compiler"
    assert [(record.levelname, record.getMessage()[:52]) for record in caplog.records] == [
        ("WARNING", "a layer takes a slower way: pools were replaced by o"),
        ("WARNING", "a layer takes a slower way: torch.func transforms or"),
        ("WARNING", "a layer takes a slower way: _C: not built: no compil"),
    ]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropout_bias_dtypes_and_strides_stay_fused(dtype):
    config = MoSConfig(
        **{**SMALL.to_dict(), "dropout": 0.1, "pool_dtype": "float64" if dtype == torch.float64 else "float32"}
    )
    model = randomize(mos_ext.adapt(stack(dtype=dtype), config)).train()
    model(torch.randn(24, 5, dtype=dtype).T).sum().backward()
    model(torch.randn(0, 24, dtype=dtype))
    assert {path for layer in mos_ext.explain(model).layers for path in layer.calls} == {linear.FUSED}


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "FullyShardedDataParallel"])
def test_wrapped_models_are_refused(wrapper):
    model = stack()
    outside = type(wrapper, (nn.Sequential,), {})(model)
    unchanged(
        outside,
        lambda: mos_ext.adapt(outside, SMALL),
        TypeError,
        f"model must be adapted before it is wrapped, got a {wrapper}",
    )


# ------------------------------------------------------------------------------------------------ merges and copies


def change_in_place(pool):
    with torch.no_grad():
        pool.shards_b.add_(1)


def change_tables(pool):
    pool.set_tables(IndexTables(pool.tables.a[::-1], pool.tables.b))


def replace_pool(pool):
    pool.shards_b = nn.Parameter(pool.shards_b.detach().clone() + 1)
    torch.autograd.graph.increment_version(pool.shards_b)  # a counter alone would not tell


@pytest.mark.parametrize("change", [change_in_place, change_tables, replace_pool])
def test_whatever_changes_between_merge_and_unmerge_is_noticed(change):
    model = randomize(mos_ext.adapt(stack(), SMALL))
    for parameter in model.mos_pools.parameters():
        torch.autograd.graph.increment_version(parameter)
    mos_ext.merge(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    same = copy.deepcopy(model)
    change(model.mos_pools.pools[0])
    for changed in (model, copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        with pytest.raises(
            ValueError, match="0.up: the pools must not change between merge and unmerge, got changed pools"
        ):
            mos_ext.unmerge(changed)
        assert all(torch.equal(v, before[k]) for k, v in changed.state_dict().items() if not k.startswith("mos_pools"))
    mos_ext.unmerge(same)


def test_second_derivatives_raise_on_a_called_base_too():
    """A gradient penalty: the gradient of a sum requires no gradient itself, but depends on the pools."""
    for change in (lambda model: None, subclass):
        model = stack()
        change(model)
        randomize(mos_ext.adapt(model, SMALL))
        x = torch.randn(3, 48, requires_grad=True)
        (dx,) = torch.autograd.grad(model[1].down(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="gradients of gradients are not implemented"):
            dx.square().sum().backward()


def test_threads_find_old_handles_or_new_ones():
    layers = 24
    pool = ShardPool(MoSConfig(r=2, equivalent_rank=2, shards_per_vector=2), 8, 8, layers)
    failures = []

    def forward():
        try:
            for k in range(layers):
                pool(k, training=True)
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            pool.shards_a = nn.Parameter(pool.shards_a.detach().clone())
            threads = [threading.Thread(target=forward) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


class Own(nn.Linear):
    """A base that is called, since it could compute anything."""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, Own, "peft"], ids=str)
def test_nested_tensors(kind, layout):
    """Outputs and gradients are those of the parts; what comes out of a jagged one can be added to it."""
    torch.manual_seed(0)
    model = nn.Sequential(*((nn.Linear if kind == "peft" else kind)(8, 8) for _ in range(2)))
    config = {"r": 4, "equivalent_rank": 4, "shards_per_vector": 2, "target_modules": ["0", "1"]}
    if kind == "peft":
        model = get_peft_model(model, mos_peft.MoSConfig(**config, init_weights=False))
    else:
        model = randomize(mos_ext.adapt(model, MoSConfig(**config)))
    parts = [torch.randn(n, 8) for n in (3, 5, 1)]

    def run(inputs, forward):
        for parameter in model.parameters():
            parameter.grad = None
        ys = forward(inputs)
        torch.cat(ys).square().sum().backward()
        return [*ys, *(p.grad for p in model.parameters() if p.requires_grad)]

    x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    found = run(x, lambda x: (model(x) + x).unbind())
    parts = [part.requires_grad_() for part in parts]
    want = run(parts, lambda parts: [model(part) + part for part in parts])
    assert len(found) == 3 + 2
    torch.testing.assert_close([*found, *x.grad.unbind()], [*want, *(part.grad for part in parts)])
