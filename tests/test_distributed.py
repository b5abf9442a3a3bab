"""Two gloo ranks take the steps that one process takes, with pools that all layers of all ranks contribute to."""

import distributed_cases as cases
import pytest
import torch
from models import llama
from two_ranks import TwoRanks

import mos_ext


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    ranks = TwoRanks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


def agree(ranks, **kwargs):
    """The pools after every step, on both ranks, are those of one process.

    float64: sums in another order differ by some eps (2e-16) each, and training amplifies that step by step.
    """
    want = cases.train(**{**kwargs, "wrapper": None})
    start = list(cases.trainable(cases.build(kwargs.get("way", "adapt"))).values())
    assert all(not torch.equal(a, b) for a, b in zip(start, want[0], strict=True))  # every pool learns
    for got in ranks.run(cases.train, **kwargs):
        for step, pools in enumerate(want):
            for a, b in zip(got[step], pools, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, step=step: f"step {step}: {m}")


@pytest.mark.parametrize("wrapper", ["ddp", "ddp unused", "ddp static", "fsdp2", "fsdp2 keep", "fsdp1"])
@pytest.mark.parametrize("way", ["adapt", "peft"])
def test_plain(ranks, wrapper, way):
    agree(ranks, wrapper=wrapper, way=way)


@pytest.mark.parametrize("blocks", ["nnnn", "oooo", "rnor"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("way", ["experts", "peft experts"])
def test_experts(ranks, wrapper, way, blocks):
    agree(ranks, wrapper=wrapper, way=way, blocks=blocks)


@pytest.mark.parametrize("blocks", ["oooo", "rrrr", "rnor", "nrrn", "RnRr"])
@pytest.mark.parametrize("wrapper", ["ddp", "ddp static", "fsdp2", "fsdp2 keep"])
def test_checkpointing(ranks, wrapper, blocks):
    agree(ranks, wrapper=wrapper, blocks=blocks)


@pytest.mark.parametrize("blocks", ["nnnn", "oooo", "rrrr", "rnor"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_gradient_accumulation(ranks, wrapper, blocks):
    agree(ranks, wrapper=wrapper, blocks=blocks, micro=3)
    agree(ranks, wrapper=wrapper, blocks=blocks, micro=2, sync_always=True)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_unused_layers_and_clipping(ranks, wrapper):
    agree(ranks, wrapper=wrapper, blocks="n-on", clip=0.01)


@pytest.mark.parametrize("blocks", ["nnnn", "oooo", "rrrr", "rn--", "nr--", "nrnr", "rnrn"])
def test_the_only_layer_of_a_pool_called_again(ranks, blocks):
    agree(ranks, wrapper="ddp", blocks=blocks, tied=True, r=2, clip=0.1)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("blocks", ["nnnn", "rrrr"])
def test_pools_that_were_frozen_before(ranks, wrapper, blocks):
    agree(ranks, wrapper=wrapper, blocks=blocks, thawed=True)


def test_what_ddp_itself_cannot_do(ranks):
    """find_unused_parameters decides after forward, when no reentrant layer has met its pool."""
    for error in ranks.errors(cases.train, wrapper="ddp unused", blocks="rrrr"):
        assert error.startswith(
            "RuntimeError: DistributedDataParallel must reduce the gradient of a shared pool after all"
        )
        assert error.endswith("use checkpoint(..., use_reentrant=False) or find_unused_parameters=False")


def test_fsdp1_computes_dense_gradients_under_checkpointing_too(ranks):
    agree(ranks, wrapper="fsdp1", blocks="oooo", micro=2)


def test_a_backward_pass_that_fails_leaves_nothing_behind(ranks):
    for blocks in ("rrrr", "oooo", "rnrn"):
        failed, want = cases.interrupted(blocks)
        assert failed
        for failed, got in ranks.run(cases.interrupted, blocks):
            assert failed
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_fsdp2_casts(ranks):
    """bfloat16 products of 8 bits: the same losses to a per cent over four steps."""
    want = cases.train_in_bfloat16(None)
    for got in ranks.run(cases.train_in_bfloat16, "fsdp2"):
        assert got == pytest.approx(want, rel=1e-2)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process loads on purpose
def test_saving_sharded_models(ranks, tmp_path):
    (refused, pools), (_, others) = ranks.run(cases.save_sharded, str(tmp_path))
    assert "must be whole, got one that is sharded over ranks" in refused
    assert all(torch.equal(pools[n], others[n]) for n in pools)
    base = cases.Model(cases.stack(cases.LAYERS, cases.WIDTH, torch.float32))
    loaded = mos_ext.load_adapter(base, tmp_path / "adapter")
    assert all(torch.equal(p, pools[n]) for n, p in cases.trainable(loaded).items())
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    # Another world size, one process without any group among them.
    for got in [*ranks.run(cases.load_sharded, str(tmp_path)), cases.load_sharded(str(tmp_path))]:
        assert all(torch.equal(got[n], pools[n]) for n in pools)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_saving_sharded_modules_beside_the_pools(ranks, tmp_path):
    from peft import PeftModel

    (logits, refused), _ = ranks.run(cases.save_sharded_beside, str(tmp_path))
    assert "state_dict must have the whole of mos_pools." in refused
    for name in ("adapter", "hf", "gathered"):
        loaded = mos_ext.load_adapter(llama(), tmp_path / name)
        torch.testing.assert_close(loaded(input_ids=torch.arange(1, 9)[None]).logits, logits, rtol=1e-5, atol=1e-5)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    torch.testing.assert_close(loaded(input_ids=torch.arange(1, 9)[None]).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_saving_a_sharded_peft_model(ranks, tmp_path):
    from peft import PeftModel

    (logits, _), _ = ranks.run(cases.save_peft_sharded, str(tmp_path))
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(loaded(input_ids=torch.arange(1, 9)[None]).logits, logits, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("function", [cases.adapt_with, cases.peft_with])
def test_ranks_that_disagree(ranks, function):
    first, second = ranks.errors(function, cases.RANKS, {**cases.RANKS, "alpha": 3, "seed": 2})
    assert first == (
        "ValueError: config must be the same on every rank, got alpha=16 on rank 0 and alpha=3 on rank 1; "
        "seed=0 on rank 0 and seed=2 on rank 1"
    )
    assert "alpha=3 on rank 1 and alpha=16 on rank 0" in second
    ranks.run(function, cases.RANKS, cases.RANKS)


def test_a_rank_that_cannot_adapt(ranks):
    first, second = ranks.errors(cases.adapt_with, cases.RANKS, {**cases.RANKS, "shards_per_vector": 5})
    assert first.startswith(
        "ValueError: every rank must be able to adapt its model, got on rank 1: ValueError: shards_per_vector"
    )
    assert second.startswith("ValueError: shards_per_vector must divide in_features=24")


def test_sharded_before_adapted(ranks):
    for error in ranks.errors(cases.adapt_after_sharding):
        assert "whose weight is a DTensor: adapt the model before fully_shard" in error


def test_pools_that_are_units_of_fsdp2_of_their_own(ranks):
    """Kept whole until backward is done they train as one process does; freed before their layers run, they are told."""
    want = cases.shard_each_pool(frees=False)
    for got in ranks.run(cases.shard_each_pool, frees=False):
        for a, b in zip(got, want, strict=True):
            for p, q in zip(a, b, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    for error in ranks.errors(cases.shard_each_pool, frees=True):
        assert error.endswith("fully_shard(pool, reshard_after_forward=False), or leave the pools to the root")


def test_pools_sharded_alone(ranks):
    for error in ranks.errors(cases.shard_the_pools_alone):
        assert error.startswith(
            "RuntimeError: a pool must be whole while layers use it, got a DTensor: call fully_shard on"
        )


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("before", "tensor-parallel layers cannot be adapted"),
        ("before, peft", "tensor-parallel layers cannot be adapted"),
        ("after", "the weight of an adapted layer must be whole while it computes, got a DTensor: tensor-parallel"),
        ("after, peft", "the output of the base layer must have the shape"),
    ],
)
def test_tensor_parallel(ranks, when, message):
    for error in ranks.errors(cases.tensor_parallel, when):
        assert message in error
