"""DeepSpeed's ZeRO on two gloo ranks takes the steps of one process without it."""

import distributed_cases as cases
import pytest
import torch
import zero_cases
from two_ranks import TwoRanks

import mos_ext


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = TwoRanks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


def close(got, want):
    """float32: sums over rows in another order, a few roundings of 6e-8 each step, and pools of size 0.1."""
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=lambda m, step=step: f"step {step}: {m}")


def agree(ranks, stage, **kwargs):
    want = zero_cases.train(None, **{name: value for name, value in kwargs.items() if name != "zero"})
    assert all(not torch.equal(a, b) for a, b in zip(want[0], want[-1], strict=True))  # everything learns
    for got in ranks.run(zero_cases.train, stage, **kwargs):
        close(got, want)


@pytest.mark.parametrize("blocks", ["nnnn", "oooo", "rrrr", "rnor", "nrRn"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steps(ranks, stage, blocks):
    agree(ranks, stage, blocks=blocks)


@pytest.mark.parametrize("blocks", ["nnor", "rrrr"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_peft(ranks, stage, blocks):
    agree(ranks, stage, way="peft", blocks=blocks)


@pytest.mark.parametrize("blocks", ["rrrr", "nnor"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_head_is_trained_too_and_gradients_accumulate(ranks, stage, blocks):
    """DeepSpeed meets the head's gradient first, and learns of the pools' when the pass ends."""
    agree(ranks, stage, blocks=blocks, headed=True, micro=2, clip=0.5)


@pytest.mark.parametrize("blocks", ["nr--", "rn--"])
@pytest.mark.parametrize("stage", [2, 3])
def test_the_only_layer_of_a_pool_called_again(ranks, stage, blocks):
    agree(ranks, stage, blocks=blocks, tied=True, r=2, clip=0.1)


@pytest.mark.parametrize("way", ["adapt", "peft"])
def test_a_base_partitioned_from_birth(ranks, way):
    want = zero_cases.train(None, way=way)
    for got in ranks.run(zero_cases.train_partitioned_from_birth, way):
        close(got, want)


def test_zero_3_as_it_comes(ranks):
    """Small parameters, here all, are kept whole."""
    agree(ranks, 3, blocks="rnor", zero={"stage3_param_persistence_threshold": 100_000})


@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16(ranks, stage):
    """DeepSpeed casts the pools too, and keeps float32 masters: 8 bits in every value, 2**-9 relative to pools."""
    want = zero_cases.train(None)
    for got in ranks.run(zero_cases.train_in_bfloat16, stage):
        a, b = (torch.cat([p.flatten() for p in pools[-1]]) for pools in (got, want))
        assert (a - b).norm() < 0.05 * b.norm()


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("stage", [2, 3])
def test_saving(ranks, stage, tmp_path):
    (refused, pools), (_, others) = ranks.run(zero_cases.save, str(tmp_path), stage)
    assert ("must be whole, got one that is sharded over ranks" in refused) == (stage == 3)
    assert all(torch.equal(a, b) for a, b in zip(pools, others, strict=True))
    loaded = mos_ext.load_adapter(cases.Model(cases.stack(cases.LAYERS, cases.WIDTH)), tmp_path / "adapter")
    close([zero_cases.whole(loaded, None)], [pools])
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_saving_what_is_trained_beside(ranks, tmp_path):
    values, _ = ranks.run(zero_cases.save_beside, str(tmp_path))
    base = cases.Model(cases.stack(cases.LAYERS, cases.WIDTH))
    base.norm = torch.nn.LayerNorm(cases.WIDTH)
    loaded = mos_ext.load_adapter(base, tmp_path)
    close([zero_cases.whole(loaded, None)], [values])


def test_saving_under_peft(ranks, tmp_path):
    from peft import PeftModel

    (refused, pools), _ = ranks.run(zero_cases.save_peft, str(tmp_path))
    assert "must be whole, got a parameter that ZeRO-3 has partitioned: save inside" in refused
    base = cases.Model(cases.stack(cases.LAYERS, cases.WIDTH))
    loaded = PeftModel.from_pretrained(base, tmp_path / "gathered", is_trainable=True)
    close([zero_cases.whole(loaded, None)], [pools])


@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints_of_deepspeed(ranks, stage, tmp_path):
    for want, got in ranks.run(zero_cases.resume, str(tmp_path), stage, "nrrn"):
        close(got, want)


def test_other_tables_while_partitioned(ranks):
    for got, want in ranks.run(zero_cases.other_tables):
        close([got], [want])
