"""Packed, bucketed and cut steps are exactly one sample at a time; no sample sees another."""

import random

import pytest
import torch
import transformers

from nsc.adapters.lora import read_adapter
from nsc.adapters.stack import stack_adapters, whitened
from nsc.adapters.surgery import merged_layers
from nsc.bases import structure
from nsc.config import MergeConfig
from nsc.data.packing import (
    MOST_PADDING,
    _rectangle,
    buckets,
    can_share_rows,
    collate,
    pack,
    padding,
    round_up,
    rows_of_few_shapes,
    shared_rows,
)
from nsc.errors import NSCError
from nsc.learning.loop import learn
from nsc.learning.objective import NullSpaceObjective
from nsc.learning.passes import Passes
from tests.tiny import linears, random_factors, tiny_llama, write_adapter

TARGETS = ["layers.2.self_attn.v_proj", "layers.3.self_attn.v_proj"]
LENGTHS, TASKS = [3, 17, 9, 4, 11, 2, 8, 1], [0, 0, 0, 1, 1, 2, 2, 2]
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(model, stack) in float64, three adapters on every q_proj and v_proj."""
    model = tiny_llama("AutoModel").double().requires_grad_(False).eval()
    names = [name for name in linears(model) if name.endswith(("q_proj", "v_proj"))]
    adapters = {}
    for seed, task in enumerate("abc"):
        factors = {}
        for i, name in enumerate(names):
            m, d = linears(model)[name]
            factors[name] = tuple(x.double() for x in random_factors([name], d=d, m=m, seed=100 * seed + i)[name])
        adapters[task] = read_adapter(write_adapter(tmp_path_factory.mktemp(task), factors), task)
    matches = {task: {name: name for name in names} for task in adapters}
    return model, whitened(stack_adapters(adapters, matches, linears(model)))


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (n,), generator=generator).tolist() for n in LENGTHS]


def gradient(setting, batches, tokens=None):
    """Loss and gradient of a step; the weights in float64, as the model."""
    model, stack = setting
    batches = [type(b)(b.inputs, b.task, b.weight.double(), b.segment) for b in batches]
    lam = torch.full((len(stack.names), 3), 0.4, dtype=torch.float64, requires_grad=True)
    with merged_layers(model, stack, lam.detach()) as layers:
        loss = Passes(NullSpaceObjective(model, layers, stack, TARGETS), lam, tokens).gradient(batches)
    return loss, lam.grad


@pytest.mark.parametrize("tokens", [None, 40, 1])
@pytest.mark.parametrize("shares_rows", [True, False])
def test_any_cut_is_one_sample_at_a_time(setting, samples, shares_rows, tokens):
    plain = collate(samples, TASKS, pad_id=0, causal=True)
    alone = [part.map(lambda x, n=n: x[:, :n]) for part, n in zip(plain.split(1), LENGTHS, strict=True)]
    batches = pack(samples, TASKS, 0, causal=True, shares_rows=shares_rows)
    assert (len(batches) == 1 and batches[0].segment is not None) == shares_rows
    torch.testing.assert_close(gradient(setting, batches, tokens), gradient(setting, alone), **EXACT)
    weight = torch.zeros(3)
    for batch in batches:
        weight.index_add_(0, batch.task.flatten(), batch.weight.flatten())
    torch.testing.assert_close(weight, torch.ones(3))


def test_rows_of_one_length_are_left_as_they_are(samples):
    (batch,) = pack([ids[:1] * 5 for ids in samples], TASKS, 0, causal=True, shares_rows=True)
    assert batch.segment is None and list(batch.inputs) == ["input_ids"] and batch.task.shape == (8, 5)


@pytest.mark.parametrize("shares_rows", [True, False])
def test_rounding_up_changes_nothing(setting, samples, shares_rows):
    """Rows of padding alone give no NaN and no gradient."""
    want = gradient(setting, pack(samples, TASKS, 0, causal=True, shares_rows=shares_rows))
    few = pack(samples, TASKS, 0, causal=True, shares_rows=shares_rows, few_shapes=True)
    torch.testing.assert_close(gradient(setting, few), want, **EXACT)
    taller = [
        _rectangle(samples, TASKS, [0.1] * 8, rows, (height, 20), 0, True)
        for rows, height in (([[1, 0], [2, 4], [3, 6, 7, 5]], h) for h in (3, 5))
    ]
    assert (taller[1].segment[3:] == -1).all() and taller[1].weight.sum() == taller[0].weight.sum()
    low, high = (gradient(setting, [batch]) for batch in taller)
    torch.testing.assert_close(high, low, **EXACT)
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in high)


@pytest.mark.parametrize("shares_rows", [True, False])
def test_few_shapes(shares_rows):
    """Still below a tenth of padding, whatever the lengths; of samples alike, steps have far fewer shapes."""
    draw, shapes = random.Random(0), {True: set(), False: set()}
    for _ in range(200):
        lengths = [min(500, int(draw.lognormvariate(3.5, 0.6)) + 1) for _ in range(20)]
        samples = [[1] * n for n in lengths]
        for few in (True, False):
            batches = pack(samples, [0] * 20, 0, causal=True, shares_rows=shares_rows, few_shapes=few)
            shapes[few] |= {tuple(batch.task.shape) for batch in batches}
            assert all((b.weight == 0).float().mean() <= MOST_PADDING for b in batches)
            assert sum((b.weight > 0).sum() for b in batches) == sum(lengths)
    assert len(shapes[True]) < (0.4 if shares_rows else 0.7) * len(shapes[False])


@pytest.mark.parametrize(
    ("n", "bits", "rounded"), [(1, 2, 1), (5, 2, 6), (97, 2, 128), (96, 2, 96), (33, 5, 34), (9, 4, 9)]
)
def test_round_up(n, bits, rounded):
    assert round_up(n, bits) == rounded


@pytest.mark.parametrize("seed", range(20))
def test_padding_stays_below_a_tenth(seed):
    """Whatever the lengths; every sample once; no row longer than it must be to get there."""
    draw = random.Random(seed)
    lengths = [draw.choice([draw.randint(1, 20), draw.randint(1, 500)]) for _ in range(draw.randint(1, 40))]
    rows = shared_rows(lengths)
    assert padding(lengths, rows) <= MOST_PADDING
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    rows, shape = rows_of_few_shapes(lengths)
    assert padding(lengths, rows, shape) <= MOST_PADDING
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    groups = buckets(lengths)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(padding(lengths, [[i] for i in group]) <= MOST_PADDING for group in groups)


def test_memory_that_runs_out_halves_the_pass(setting, samples, monkeypatch):
    """Each halving starts the step anew, so the gradient is that of an undisturbed one; and it is remembered."""
    batches = pack(samples, TASKS, 0, causal=True, shares_rows=False)
    want = gradient(setting, batches)
    loss, seen = NullSpaceObjective.loss, []

    def short_of_memory(self, batch):
        seen.append(batch.tokens)
        if batch.tokens > 10 and batch.task.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(self, batch)

    monkeypatch.setattr(NullSpaceObjective, "loss", short_of_memory)
    torch.testing.assert_close(gradient(setting, batches), want, **EXACT)
    assert any(n > 10 for n in seen)
    monkeypatch.setattr(NullSpaceObjective, "loss", lambda self, batch: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(NSCError, match="does not hold even one pass of 17 tokens"):
        gradient(setting, batches)


def test_learning_does_not_depend_on_the_cut(setting, samples):
    model, stack = setting
    results = []
    for tokens, shares in ((None, True), (20, True), (None, False)):
        batches = pack(samples, TASKS, 0, causal=True, shares_rows=shares)
        config = MergeConfig(steps=4, lr=1e-2, tokens_per_pass=tokens)
        results.append(learn(model, stack, TARGETS, lambda _, b=batches: b, config, progress=False).coefficients)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)  # weights are float32


def tiny(kind, **changes):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    config = getattr(transformers, f"{kind}Config")(**sizes, **changes)
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma"])
def test_causal_models_share_rows(kind, attention, dtype):
    changes = {"num_key_value_heads": 2, "head_dim": 8} if kind == "Gemma" else {"num_key_value_heads": 2}
    model = tiny(kind, **changes, attn_implementation=attention)
    assert can_share_rows(model.to(dtype))


def test_short_positions_can_be_tried():
    sizes = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
    assert can_share_rows(transformers.GPT2Model(transformers.GPT2Config(**sizes)).eval())


HYBRIDS = {
    "Lfm2": dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "FalconH1": dict(mamba_d_ssm=64, mamba_d_state=8, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1),
    "MiniMax": dict(head_dim=8, layer_types=["linear_attention", "full_attention"], num_local_experts=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("std", [0.02, 0.1])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_no_mixer_but_attention_shares_rows(kind, std, dtype):
    """Convolutions, state spaces and linear attention see no mask, however little they carry into the next sample."""
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this transformers has no {kind}")
    model = tiny(kind, num_key_value_heads=2, pad_token_id=0, initializer_range=std, **HYBRIDS[kind])
    assert not can_share_rows(model.to(dtype))


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("offset", [1, 6, -1])
def test_a_leak_below_any_tolerance_is_found(dtype, share, offset):
    """A mixer that carries this share of another token's state, which the residual may round away."""
    model = tiny("Llama").to(dtype)

    def leak(module, inputs, output):
        return output[0] + share * output[0].roll(offset, 1), *output[1:]

    assert can_share_rows(model)
    model.layers[1].self_attn.register_forward_hook(leak)
    assert not can_share_rows(model)


def test_what_cannot_share_rows_is_found_out(monkeypatch):
    """A window, attention both ways, an unknown implementation, and a model that ignores the mask it is given."""
    assert not can_share_rows(tiny("Mistral", num_key_value_heads=2, sliding_window=8))
    assert not can_share_rows(tiny("Bert"))
    llama = tiny("Llama")
    forward = llama.forward

    def deaf(input_ids=None, position_ids=None, attention_mask=None, **kwargs):
        return forward(input_ids=input_ids, position_ids=position_ids, **kwargs)

    assert can_share_rows(llama)
    monkeypatch.setattr(llama, "forward", deaf)
    monkeypatch.setattr(structure, "is_causal", lambda model: True)
    if transformers.__version__ < "4.53":  # later ones see packed positions by themselves
        assert not can_share_rows(llama)
    monkeypatch.setattr(
        llama, "forward", lambda input_ids=None, position_ids=None, attention_mask=None: forward(input_ids)
    )
    assert not can_share_rows(llama)
