"""The two doors of an op: straight to the kernel for plain tensors, the registered operator for whoever traces."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from nsc_kernels import (
    GramCache,
    lora_down,
    lora_fold,
    lora_fork,
    lora_moments,
    lora_up,
    null_space_ratio,
    ratio_from_energy,
)
from nsc_kernels._op import INTERPRET

z, A, B, W = torch.randn(5, 8), torch.randn(3, 8), torch.randn(6, 3), torch.randn(6, 8)
CALLS = {
    "lora_down": lambda z: lora_down(z, A)[0].sum(),
    "lora_fork": lambda z: lora_fork(z, A)[1].sum(),
    "lora_up": lambda z: lora_up(z[:, :6], z[:, 5:], torch.ones(3), B).sum(),
    "lora_fold": lambda z: lora_fold(W, B, torch.ones(3), z[:3]).sum(),
    "lora_fold out": lambda z: lora_fold(W, B, torch.ones(3), z[:3].detach(), out=torch.empty_like(W)).sum(),
    "lora_moments": lambda z: lora_moments(z, A, other=z[:, :3]).second.sum(),
    "null_space_ratio": lambda z: null_space_ratio(z, z[:, :3]).sum(),
    "ratio_from_energy": lambda z: ratio_from_energy(z.square().sum(-1), z[:, :3]).sum(),
}
every_call = pytest.mark.parametrize("name", CALLS)


class Seen(TorchDispatchMode):
    """The operators of this project that went through torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nsc":
            self.names.append(func._schema.name.removeprefix("nsc::"))
        return func(*args, **(kwargs or {}))


@every_call
def test_modes_see_the_operator(name):
    with Seen() as seen:
        CALLS[name](z)
    op = {"lora_fork": "lora_down", "lora_fold out": "lora_fold"}.get(name, name)
    assert seen.names == [op]


@every_call
def test_fake_tensors_and_traces(name):
    """Shapes without values; and a graph that computes with what it is given, not with what it was traced with."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert CALLS[name](mode.from_tensor(z)).shape == ()
    graph = make_fx(CALLS[name], tracing_mode="real")(z)
    other = torch.randn(5, 8)
    torch.testing.assert_close(graph(other), CALLS[name](other))


@every_call
def test_plain_tensors_go_straight(name, monkeypatch):
    """With and without a gradient the dispatcher has no part in it, and the value is the operator's."""
    if name == "lora_fold out" and INTERPRET:
        pytest.skip("its launch fills the buffer itself, without a range for the profiler")
    with Seen():
        want = CALLS[name](z)
    plain, leaf = CALLS[name](z), z.clone().requires_grad_()
    with torch.profiler.profile() as profile:
        CALLS[name](leaf)
    torch.testing.assert_close(plain, want, rtol=0, atol=0)
    named = [event for event in profile.events() if event.name.startswith("nsc::")]
    assert named and all(event.is_user_annotation for event in named)  # a range for the profiler, not an operator


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("lora_fold out", "lora_moments")])
def test_function_transforms(name):
    want = torch.autograd.grad(CALLS[name](leaf := z.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(torch.func.grad(CALLS[name])(z), want)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("lora_fold out", "lora_moments")])
def test_tangents_are_refused(name):
    """A kernel would drop them, and the derivative be zero without a word."""
    with forward_ad.dual_level():
        CALLS[name](z)
        with pytest.raises(NotImplementedError, match=r"has no forward-mode derivative; differentiate in reverse mode"):
            CALLS[name](forward_ad.make_dual(z, torch.ones_like(z)))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(CALLS[name], (z,), (torch.ones_like(z),))


def test_tangents_are_refused_where_no_operator_is_called():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(A, torch.ones_like(A))
        with pytest.raises(NotImplementedError, match=r"lora_fold has no forward-mode derivative"):
            lora_fold(W, B, torch.ones(3), dual, out=torch.empty_like(W))
        with pytest.raises(NotImplementedError, match=r"GramCache\.inverse has no forward-mode derivative"):
            GramCache().inverse(dual)


def test_a_second_derivative_is_refused():
    leaf = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(CALLS["null_space_ratio"](leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.sum().backward()
