"""TrainableLoRALinear alone: values and gradients of both factors against the dense layer."""

import pytest
import torch
from torch import nn

from nsc_kernels.trainable import TrainableLoRALinear


def make(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(7, 6, bias=bias, dtype=dtype).requires_grad_(False)
    A, B = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((3, 7), (6, 3)))
    return base, A.requires_grad_(), B.requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7), (0, 7)])
def test_forward_and_gradients_equal_the_dense_layer(shape, bias):
    base, A, B = make(bias=bias)
    z = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    mine, theirs = TrainableLoRALinear(base, A, B)(z), nn.functional.linear(z, base.weight + B @ A, base.bias)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    grad = torch.randn_like(theirs)
    found, expected = (torch.autograd.grad(y, (z, A, B), grad) for y in (mine, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradcheck():
    base, A, B = make()
    z = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, A, B: TrainableLoRALinear(base, A, B)(z), (z, A, B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_in_float32_beside_a_base_in_low_precision(dtype):
    """The output is in the base's dtype, within twice the error of torch's own; gradients are in the factors'."""
    base, A, B = make(torch.float32)
    base, z = base.to(dtype), torch.randn(64, 7, dtype=dtype)
    a, b = A.to(dtype), B.to(dtype)
    exact = nn.functional.linear(z.double(), base.weight.double() + b.double() @ a.double(), base.bias.double())
    torchs, mine = base(z) + z @ a.T @ b.T, TrainableLoRALinear(base, A, B)(z)
    assert mine.dtype == dtype
    assert (mine.double() - exact).abs().max() <= 2 * (torchs.double() - exact).abs().max() + 1e-6
    assert {x.dtype for x in torch.autograd.grad(mine.float().sum(), (A, B))} == {torch.float32}


def test_factors_are_replaced_between_forwards_and_are_no_parameters():
    base, A, B = make()
    layer, z = TrainableLoRALinear(base, A, B), torch.randn(4, 7, dtype=torch.float64)
    assert set(layer.state_dict()) == {"base.weight", "base.bias"}
    assert not [name for name, p in layer.named_parameters() if p.requires_grad]
    assert layer.weight is base.weight and layer.bias is base.bias
    theta = torch.randn(3 * 7 + 6 * 3, dtype=torch.float64, requires_grad=True)
    layer.lora_A, layer.lora_B = theta[:21].view(3, 7), theta[21:].view(6, 3)
    expected = nn.functional.linear(z, base.weight + layer.lora_B @ layer.lora_A, base.bias)
    found = layer(z)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    mine, theirs = (torch.autograd.grad(y.square().sum(), theta, retain_graph=True)[0] for y in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("a", "b"), [((3, 7), (6, 4)), ((3,), (6, 3)), ((3, 7), (6, 3, 1))])
def test_shapes_that_do_not_fit_are_refused(a, b):
    with pytest.raises(ValueError, match=r"must be \(r, d\) and \(m, r\)"):
        TrainableLoRALinear(make()[0], torch.zeros(a), torch.zeros(b))


def test_compile_fullgraph():
    base, A, B = make(torch.float32)
    layer, z = TrainableLoRALinear(base, A, B), torch.randn(4, 7, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = [(y := function(z), *torch.autograd.grad(y.square().sum(), (z, A, B))) for function in (layer, compiled)]
    torch.testing.assert_close(*results)
