"""A base sharded over 2 to 4 gloo processes learns what one process does, and no rank holds more than its slice."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import nsc
from nsc.adapters.surgery import choose_plans
from nsc.errors import NonFiniteError, NSCError
from nsc.learning.objective import NullSpaceObjective
from nsc.learning.passes import share_out
from nsc.runtime.distributed import ALONE, Team, join
from nsc.runtime.placement import is_plain
from nsc.runtime.sharding import ShardedLinear, Shards, shard_linears, shards_of, weightless
from tests.runtime.ranks import CLOSE, assert_same, run, together, torchrun
from tests.tiny import linears


def sharded(setting, **options):
    """Call ``learn`` on this rank's slice of the setting's model, which the forked process has a copy of."""
    shard_linears(setting[0], join(), "cpu")
    return run(setting, **options)


def whole_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"shares_rows": True}], ids=str)
def test_a_sharded_base_learns_what_a_whole_one_does(setting, tmp_path, size, options):
    """This holds even with fewer rows than ranks."""
    batches = replace(setting[2], **options)
    expected = run(setting, batches=batches)
    assert_same(together(tmp_path, size, lambda rank: sharded(setting, batches=batches)), expected)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_rank_holds_its_share_and_the_forward_is_the_same(setting, tmp_path, size):
    model, stack, batches = setting
    matrices = sum(m * d for m, d in linears(model).values())
    rest = whole_bytes(model) // 8 - matrices
    ids = batches(0)[0].inputs["input_ids"]
    expected = model(input_ids=ids)[0]

    def work(rank):
        body = shard_linears(model, join(), "cpu")
        assert not any(is_plain(module) for module in body.modules())
        assert set(choose_plans(body, stack, "weights", 9).values()) == {"factors"}
        held = sum(m.shard.untyped_storage().nbytes() for m in body.modules() if isinstance(m, ShardedLinear))
        return whole_bytes(body) // 8, held // 8, body(input_ids=ids)[0].detach().numpy()

    for total, shards, states in together(tmp_path, size, work):
        assert total == rest + shards and matrices / size <= shards <= matrices / size + len(linears(model))
        torch.testing.assert_close(torch.from_numpy(states), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scarce", [0, 1])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_that_runs_out_on_one_rank_halves_the_passes_of_all(
    setting,
    tmp_path,
    monkeypatch,
    scarce,
    where,
):
    """Memory runs out in the middle of a pass, when the other rank is about to gather the next weight."""
    loss, fell = NullSpaceObjective.loss, []
    batches = replace(setting[2], batch_size=4)

    def out_of_memory(*_):
        fell.append(1)
        raise torch.OutOfMemoryError

    def short(self, batch):
        if join().rank != scarce or batch.tokens <= 17:
            return loss(self, batch)
        layer = self.layers["layers.1.self_attn.q_proj"]
        if where == "forward":
            handle = layer.base.register_forward_pre_hook(out_of_memory)
        else:
            handle = layer.base.register_forward_hook(lambda m, z, y: y.register_hook(out_of_memory) and None)
        try:
            return loss(self, batch)
        finally:
            handle.remove()

    def work(rank):
        monkeypatch.setattr(NullSpaceObjective, "loss", short)
        learned = sharded(setting, batches=batches)
        assert bool(fell) == (rank == scarce) and len(fell) < 8
        return learned

    assert_same(together(tmp_path, 2, work), run(setting, batches=batches))


def test_nan_and_its_place_are_told_alike_by_all(setting, tmp_path):
    def work(rank):
        def poisoned(step):
            batches = setting[2](step)
            if step == 4:
                batch = share_out(batches, 2)[1][0]
                setting[0].get_input_embeddings().weight.data[batch.inputs["input_ids"][0, 0]] = float("nan")
            return batches

        return sharded(setting, batches=poisoned)

    first, second = together(tmp_path, 2, work)
    assert isinstance(first, NonFiniteError) and str(first) == str(second)
    assert "activations enter layers.2.self_attn.v_proj (task" in str(first)


def test_a_sharded_merge_is_that_of_one_process_and_is_proven(base, adapters, texts, tmp_path):
    settings = dict(steps=5, lr=0.05, dtype="float64", progress=False)

    def work(rank):
        result = nsc.merge(base, adapters, texts, shard=True, **settings)
        proof = str(result.save(tmp_path / "out")) if rank == 0 else None
        return result.coefficients, result.report.to_dict(), proof

    (first, told, proof), (second, _, _) = together(tmp_path, 2, work, environment=True)
    expected = nsc.merge(base, adapters, texts, **settings)
    assert torch.equal(first, second) and "hidden states to" in proof
    torch.testing.assert_close(first, expected.coefficients, **CLOSE)
    for name in ("ratio_before", "ratio_after"):
        torch.testing.assert_close(told[name], expected.report.to_dict()[name], rtol=0, atol=1e-6)


def test_refusals(base, adapters, texts):
    with pytest.raises(NSCError, match="start them by torchrun"):
        nsc.merge(base, adapters, texts, shard=True, progress=False)
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})
    with pytest.raises(NSCError, match=r"experts\.0 runs for some tokens only"):
        shard_linears(experts, Team(0, 2), "cpu")
    assert shards_of(nn.Linear(2, 2)) is None


def test_a_row_that_weighs_nothing(setting):
    batch = weightless(setting[2](0)[0])
    assert batch.task.shape[0] == 1 and not batch.weight.any()
    assert len(Shards(ALONE).even([batch])) == 1


@pytest.mark.slow
def test_the_command_line_shards_under_torchrun(command, tmp_path):
    done = torchrun(2, ["-m", "nsc"], command, tmp_path / "out", "--shard")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1 and "hidden states to" in done.stdout
