"""Layers that read one tensor share the pass over it: the same values and gradients, nothing stale, nothing kept."""

import gc
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nsc.adapters.stack import whitened
from nsc.adapters.surgery import choose_plans, merged_layers, set_coefficients, share_inputs
from nsc.learning.assembly import _reachable
from nsc.learning.objective import NullSpaceObjective
from nsc_kernels import MergedLoRALinear, Siblings, modules
from tests.learning.test_objective import EXACT, make_batch, make_lam, mixed, model  # noqa: F401

RANKS = {"q": (2, 0, 3), "k": (1, 4, 0), "v": (3, 2, 2)}
SCALES = (1.0, 2.0, 0.5)
D = 7


class Attention(nn.Module):
    """q, k and v of the same tensor."""

    def __init__(self, plans=("factors",) * 3, share=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.lam = nn.Parameter(torch.rand(3, 3, generator=generator, dtype=torch.float64))
        for i, (name, ranks) in enumerate(RANKS.items()):
            A, B = (
                torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((sum(ranks), D), (6, sum(ranks)))
            )
            torch.manual_seed(i)
            base = nn.Linear(D, 6, dtype=torch.float64).requires_grad_(False)
            setattr(self, name, MergedLoRALinear(base, A, B, ranks, SCALES, self.lam.detach()[i], plan=plans[i]))
        self.group = Siblings(self.layers) if share else None

    @property
    def layers(self):
        return [self.q, self.k, self.v]

    def forward(self, z):
        for layer, row in zip(self.layers, self.lam, strict=True):
            layer.lam = row
        q, k, v = (layer(z) for layer in self.layers)
        return (q * k).tanh() + v


class Watching:
    """A loss of all that was watched."""

    def __init__(self, *layers):
        self.seen = []
        for layer in layers:
            layer.watch = lambda u, energy: self.seen.append(u.sin().sum() + energy.sqrt().sum())


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, D, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def forks(monkeypatch):
    """How many rows of A each call of lora_fork was given."""
    real, calls = modules.lora_fork, []

    def counting(z, lora_A, **options):
        calls.append(len(lora_A))
        return real(z, lora_A, **options)

    monkeypatch.setattr(modules, "lora_fork", counting)
    return calls


@pytest.mark.parametrize("watched", [(), ("k",), ("q", "v")])
@pytest.mark.parametrize("plans", [("factors",) * 3, ("weights", "factors", "weights")])
def test_values_and_gradients_are_those_of_each_alone(plans, watched, forks):
    results = []
    for share in (False, True):
        forks.clear()
        block, z = Attention(plans, share), rows()
        watching = Watching(*(getattr(block, name) for name in watched))
        y = block(z)
        loss = y.square().sum() + sum(watching.seen)
        results.append((y, *torch.autograd.grad(loss, (z, block.lam))))
        assert len(watching.seen) == len(watched)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)
    assert forks == [sum(map(sum, RANKS.values()))]


def test_factors_are_not_held_twice():
    block = Attention()
    parts = {layer.lora_A.untyped_storage().data_ptr() for layer in block.layers}
    assert parts == {block.group.lora_A.untyped_storage().data_ptr()}
    assert block.group.lora_A.shape == (sum(map(sum, RANKS.values())), D)


def test_one_gradient_for_the_whole_group(monkeypatch):
    """One kernel adds what returns to z through all bases, all u and the energy."""
    module = sys.modules["nsc_kernels.lora_down"]
    real, calls = module._backward_op, []
    monkeypatch.setattr(module, "_backward_op", lambda *args: calls.append(args) or real(*args))
    block = Attention()
    watching = Watching(block.v)
    (block(rows()).sum() + sum(watching.seen)).backward()
    ((dz_base, du, de, _, A),) = calls
    assert dz_base is not None and du.shape[1] == len(A) == sum(map(sum, RANKS.values())) and de is not None


def test_another_tensor_is_never_answered_from_the_shared_pass(forks):
    block, alone = Attention(), Attention(share=False)
    z, other = rows(), rows(1)
    block.q(z)
    torch.testing.assert_close(block.k(other), alone.k(other), rtol=0, atol=1e-12)
    torch.testing.assert_close(block.v(z), alone.v(z), rtol=0, atol=1e-12)
    assert forks[:2] == [17, 5]
    changed = rows().detach()
    block.q(changed)
    changed.mul_(2)  # in place: the same object with other values
    torch.testing.assert_close(block.k(changed), alone.k(changed), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_that_failed_leaves_nothing_for_the_next(grad):
    block, alone = Attention(), Attention(share=False)
    with torch.no_grad():  # u without a graph must not serve the next forward, which needs one
        z = rows()
        block.q(z)
    handle = block.k.base.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("on purpose")))
    with pytest.raises(RuntimeError, match="on purpose"):
        block(rows(1))
    handle.remove()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(block(z), alone(z), rtol=0, atol=1e-12)
    if grad:
        mine, theirs = (torch.autograd.grad(b(z).square().sum(), (z, b.lam)) for b in (block, alone))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_nothing_is_kept_when_all_have_run_or_it_is_cleared():
    block = Attention()
    for stop_early in (False, True):
        z = rows().detach() + 1
        gone = weakref.ref(z)
        with torch.no_grad():
            block.q(z) if stop_early else block(z)
        if stop_early:
            block.group.clear()
        del z
        gc.collect()
        assert gone() is None


def test_recomputation_under_a_checkpoint():
    """Also where it ends before the last member, and where the block's input itself is what they read."""
    block, alone = Attention(), Attention(share=False)

    def twice(z):
        return block((block(z) @ torch.eye(6, D, dtype=torch.float64)).tanh())

    def plainly(z):
        return alone((alone(z) @ torch.eye(6, D, dtype=torch.float64)).tanh())

    for seed in (0, 1):
        z = rows(seed)
        mine = torch.autograd.grad(checkpoint(twice, z, use_reentrant=False).square().sum(), (z, block.lam))
        theirs = torch.autograd.grad(plainly(z).square().sum(), (z, alone.lam))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_siblings_must_agree():
    block = Attention(share=False)
    block.k.lora_A = block.k.lora_A.float()
    with pytest.raises(ValueError, match="agree in width, dtype and device"):
        Siblings(block.layers)


def test_groups_are_found_by_what_they_read(model, mixed):  # noqa: F811
    """q, k, v and gate, up of each block, without a name; of layers run by their weights the targets only."""
    lean, lam = whitened(mixed), make_lam(mixed)
    for plan, targets in (("factors", ["layers.3.self_attn.v_proj"]), ("weights", ["layers.3.mlp.up_proj"])):
        with merged_layers(model, lean, lam, choose_plans(model, lean, plan, 1)) as layers:
            share_inputs(model, layers, targets, make_batch().within(1)[0])
            found = {}
            for name, layer in layers.items():
                if layer.siblings is not None:
                    found.setdefault(layer.siblings, []).append(name.rsplit(".", 1)[-1])
            kinds = sorted(sorted(names) for names in found.values())
        if plan == "factors":
            assert kinds == [["gate_proj", "up_proj"]] * 4 + [["k_proj", "q_proj", "v_proj"]] * 4
        else:
            assert kinds == []
        assert all(layer.siblings is None for layer in layers.values())


@pytest.mark.parametrize(
    "targets", [["layers.2.self_attn.v_proj"], ["layers.1.self_attn.v_proj", "layers.2.mlp.up_proj"]]
)
def test_nothing_beside_the_last_target_runs(model, mixed, forks, targets):  # noqa: F811
    """Not the bases that read the same tensor, nor u of those that nobody watches; the same layers get a gradient."""
    lean, lam, ran, reached = whitened(mixed), make_lam(mixed), [], []
    block = targets[-1].rsplit(".", 2)[0]
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in mixed.names
        if name.startswith(block)
    ]
    for share in (False, True):
        with merged_layers(model, lean, lam) as layers:
            if share:
                share_inputs(model, layers, targets, make_batch().within(1)[0])
            objective = NullSpaceObjective(model, layers, lean, targets)
            reached.append(_reachable(objective, make_batch().within(1)[0], lam))
            ran.clear(), forks.clear()
            objective.loss(make_batch())
    for hook in hooks:
        hook.remove()
    mine = [name for name in ran if name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert mine == [] if targets[-1].endswith("v_proj") else not [name for name in ran if "mlp" in name]
    assert forks[-1] == lean.modules[targets[-1]].A.shape[0]
    assert torch.equal(reached[0], reached[1]) and reached[0].any() and not reached[0].all()


def test_a_broken_forward_leaves_no_tensor_with_the_layers(model, mixed):  # noqa: F811
    lean, lam, targets = whitened(mixed), make_lam(mixed), ["layers.3.mlp.up_proj"]
    with merged_layers(model, lean, lam) as layers:
        share_inputs(model, layers, targets, make_batch().within(1)[0])
        objective = NullSpaceObjective(model, layers, lean, targets)
        set_coefficients(layers, lam.clone().requires_grad_())
        expected = objective.loss(make_batch())
        base = layers["layers.1.mlp.gate_proj"].base  # the first of two
        handle = base.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("on purpose")))
        with pytest.raises(RuntimeError, match="on purpose"):
            objective.loss(make_batch(1))
        handle.remove()
        groups = {layer.siblings for layer in layers.values()} - {None}
        assert len(groups) == 8 and not any(x._read or x._u or x._handed is not None or x.ends for x in groups)
        torch.testing.assert_close(objective.loss(make_batch()), expected, **EXACT)
