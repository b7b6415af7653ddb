"""The loop: the bound on drift, NaN, what is frozen, what a step reads, writes and leaves behind."""

import gc
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nsc.learning.loop as learning
from nsc.adapters.lora import read_adapter
from nsc.adapters.stack import stack_adapters, whitened
from nsc.adapters.surgery import merged_layers
from nsc.config import MergeConfig
from nsc.data.text import TextBatches
from nsc.errors import NonFiniteError, NSCError, TargetError
from nsc.learning.loop import learn, take_step
from nsc.learning.objective import NullSpaceObjective
from nsc.learning.passes import Passes
from nsc.learning.state import begin
from nsc.runtime.distributed import ALONE
from nsc.seal import unsealed
from tests.tiny import linears, random_factors, tiny_llama, write_adapter

TARGETS = ["layers.3.self_attn.v_proj"]
CONFIG = MergeConfig(steps=12, lr=1e-2)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(model, stack, batches) with two adapters on every v_proj."""
    model = tiny_llama("AutoModel").requires_grad_(False).eval()
    shapes = linears(model)
    names = [name for name in shapes if name.endswith("v_proj")]
    m, d = shapes[names[0]]
    adapters = {
        task: read_adapter(
            write_adapter(tmp_path_factory.mktemp(task), random_factors(names, d=d, m=m, seed=seed)), task
        )
        for seed, task in enumerate(("a", "b"))
    }
    stack = whitened(stack_adapters(adapters, {task: {n: n for n in names} for task in adapters}, shapes))
    generator = torch.Generator().manual_seed(0)
    tokens = {
        task: [torch.randint(3, 60, (length,), generator=generator).tolist() for length in (4, 7, 5)]
        for task in adapters
    }
    return model, stack, TextBatches(tokens, batch_size=2, pad_id=0)


def run(setting, config=CONFIG, batches=None, **options):
    model, stack, own = setting
    return learn(model, stack, TARGETS, batches or own, config, progress=False, **options)


def test_drift_is_bounded_and_the_bound_reported(setting):
    learned = run(setting, replace(CONFIG, steps=40))
    drift = (learned.coefficients - CONFIG.start).abs()
    assert drift.max().item() == pytest.approx(0.15, abs=1e-6)
    assert learned.bounded.any()
    assert (drift[learned.bounded] > 0.1499).all() and (drift[~learned.bounded] < 0.15).all()
    free = run(setting, replace(CONFIG, steps=40, max_drift=None))
    assert (free.coefficients - CONFIG.start).abs().max() > 0.2 and not free.bounded.any()


@pytest.mark.parametrize("max_drift", [0.15, None])
def test_the_bar_shows_loss_drift_and_bound(setting, capsys, max_drift):
    model, stack, batches = setting
    learned = learn(model, stack, TARGETS, batches, replace(CONFIG, steps=40, max_drift=max_drift))
    told = capsys.readouterr().err.rsplit("loss", 1)[1]
    drift = (learned.coefficients - CONFIG.start).abs().max()
    assert told.startswith(f" {learned.losses[-1]:.4f}, drift {drift:.3f} of {max_drift or float('inf'):.3f}")


def test_the_objective_falls(setting):
    learned = run(setting, replace(CONFIG, steps=40))
    assert learned.losses[-1] < learned.losses[0]


def test_coefficients_at_or_after_the_last_target_stay(setting):
    learned = run(setting, replace(CONFIG, weight_decay=0.1))
    assert learned.frozen.tolist() == [[False, False]] * 3 + [[True, True]]
    assert (learned.coefficients[3] == CONFIG.start).all()
    assert (learned.coefficients[:3] != CONFIG.start).all()


def test_same_seed_same_result_other_seed_another(setting):
    batches = setting[2]
    other = run(setting, batches=replace(batches, seed=1))
    assert torch.equal(run(setting).coefficients, run(setting).coefficients)
    assert not torch.equal(run(setting).coefficients, other.coefficients)


def token_of_task_a(batches):
    return next(
        ids[0]
        for batch in batches
        for ids, k in zip(batch.inputs["input_ids"], batch.task[:, 0], strict=True)
        if k == 0
    )


@pytest.mark.parametrize("first_bad", [0, 4])
def test_nan_activations_are_named_and_never_saved(setting, tmp_path, monkeypatch, first_bad):
    monkeypatch.setattr(learning, "CHECKPOINT_SECONDS", -1)
    model, _, batches = setting
    weight = model.get_input_embeddings().weight
    clean, checkpoint = weight.data.clone(), tmp_path / "state.pt"

    def poisoned(step):
        if step == first_bad:
            weight.data[token_of_task_a(batches(step))] = float("nan")
        return batches(step)

    try:
        with pytest.raises(NonFiniteError, match=r"activations enter layers.3.self_attn.v_proj \(task a\)"):
            run(setting, batches=poisoned, checkpoint=checkpoint)
    finally:
        weight.data.copy_(clean)
    if first_bad:
        assert torch.isfinite(unsealed(checkpoint.read_bytes())[0]["theta"]).all()
    else:
        assert not checkpoint.exists()


def test_only_the_coefficients_change(setting):
    model, stack, _ = setting
    before = {key: value.clone() for key, value in model.state_dict().items()}
    factors = [module.A.clone() for module in stack.modules.values()]
    run(setting)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(a, m.A) for a, m in zip(factors, stack.modules.values(), strict=True))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_settings_are_checked_and_survive_a_round_trip():
    config = MergeConfig(steps=3, target_modules=["v_proj"], max_drift=None)
    assert MergeConfig.from_dict(config.to_dict()) == config
    with pytest.raises(NSCError, match="unknown setting stpes"):
        MergeConfig.from_dict({"stpes": 3})
    for wrong in ({"steps": -1}, {"lr": 0}, {"batch_size": 0}, {"max_drift": -0.1}):
        with pytest.raises(NSCError, match=next(iter(wrong))):
            MergeConfig(**wrong)


class HostReads(TorchDispatchMode):
    """Notes every operator that makes the host wait for a device: reading a scalar, or a data-dependent shape."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in self.WAITING:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"shares_rows": True}], ids=str)
def test_a_step_never_reads_from_the_device(setting, options):
    """Forward, backward, optimiser, bounds and the noting of the loss."""
    model, stack, batches = setting
    batches = replace(batches, **options)
    lam = torch.nn.Parameter(torch.full((len(stack.names), 2), 0.4))
    with merged_layers(model, stack, lam.detach()) as layers:
        objective = NullSpaceObjective(model, layers, stack, TARGETS)
        state = begin(lam, torch.zeros_like(lam, dtype=torch.bool), CONFIG, "")
        passes = Passes(objective, lam, loss=state.loss)

        def step():
            take_step(state, lambda number: passes.gradient(batches(number)), ALONE, [])

        step()  # what a model caches on its first forward is not part of a step
        with HostReads() as reads:
            step()
            inside = list(reads.seen)
            lam.sum().item()
    assert inside == [] and reads.seen == ["_local_scalar_dense.default"]
    assert (state.losses[:2] > 0).all() and (state.losses[2:] == 0).all()


def test_a_step_leaves_nothing_behind(setting):
    """As many tensors of as many bytes after 49 steps as after 4."""
    batch, seen = setting[2](0), []

    def counting(step):
        if step not in (4, 20, 49):
            return batch
        gc.collect()
        live, storages = 0, {}
        for x in gc.get_objects():
            if type(x) in (torch.Tensor, torch.nn.Parameter):
                with suppress(NotImplementedError):  # torch 2.6 shows tensors that have no storage
                    storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                    live += 1
        seen.append((live, sum(storages.values())))
        return batch

    run(setting, replace(CONFIG, steps=50), batches=counting)
    assert len(seen) == 3 and len(set(seen)) == 1 and seen[0][0] > 0


def test_a_merge_that_nothing_can_learn_is_refused(setting):
    """The only module with LoRA is the target itself: its own coefficient comes behind what is measured."""
    model, stack, batches = setting
    alone = replace(stack, modules={TARGETS[0]: stack.modules[TARGETS[0]]}, order=())
    with pytest.raises(TargetError, match=r"no coefficient changes.*last target \(layers.3.self_attn.v_proj\)"):
        learn(model, alone, TARGETS, batches, CONFIG, progress=False)
