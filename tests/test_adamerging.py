"""AdaMerging's own numbers: the original code on a tiny network, layer by layer and task by task.

From https://github.com/EnnengYang/AdaMerging, commit cea1165: 30 steps of Adam (lr 1e-3) on the entropy summed over
tasks; its coefficients are float32.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.entropy import Entropy, Head
from nsc.learn import learn
from nsc.stack import ModuleStack, Stack, whitened
from nsc_kernels import GramCache

GOLDEN = np.load(Path(__file__).parent / "golden/adamerging.npz")


class Net(nn.Module):
    """fc2(relu(fc1(x))), as a body: its states of one token a row."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(40, 24, bias=False), nn.Linear(24, 16, bias=False)
        self.double().requires_grad_(False)
        self.fc1.weight.copy_(tensor("W1"))
        self.fc2.weight.copy_(tensor("W2"))

    def forward(self, x):
        return (self.fc2(self.fc1(x).relu()),)


def tensor(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def module(place: str) -> ModuleStack:
    A, B = ([tensor(f"{place}/task{k}/{side}") for k in range(3)] for side in "AB")
    grams = tuple(GramCache().factor(A))
    inverse = torch.block_diag(*[gram.inverse for gram in grams])
    return ModuleStack(torch.cat(A), torch.cat(B, 1), (4, 4, 4), (1.0, 1.0, 1.0), grams, inverse)


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_the_path_of_the_coefficients_is_the_original_one(granularity):
    stack = Stack(("a", "b", "c"), {"fc1": module("W1"), "fc2": module("W2")})
    inputs = torch.cat([tensor(f"x/task{k}") for k in range(3)])[:, None]
    task = torch.arange(3).repeat_interleave(16)[:, None]
    batch = Batch({"x": inputs}, task, torch.full((48, 1), 1 / 16, dtype=torch.float64))
    config = MergeConfig(
        steps=30, lr=1e-3, start=0.3, optimizer="adam", objective="entropy", granularity=granularity, max_drift=None
    )
    entropy = Entropy([Head(tensor(f"head/task{k}")) for k in range(3)], "last")
    learned = learn(
        Net(), whitened(stack), ["fc2"], lambda step: [batch], config, progress=False, entropy=entropy
    )  # fmt: skip
    case = f"adamerging_{granularity}"
    expected = torch.from_numpy(GOLDEN[f"{case}/lambdas"])[-1, :, 1:].double().expand(2, 3)
    torch.testing.assert_close(learned.coefficients, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(learned.losses, GOLDEN[f"{case}/losses"], rtol=0, atol=2e-6)
