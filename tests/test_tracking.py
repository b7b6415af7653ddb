"""Tracking a model: the ratios against their definition, the model restored, what cannot be tracked refused by name."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

from nsc.errors import AdapterError, UnsupportedAdapter
from nsc.tracking import track, untrack
from tests.tiny import LLAMA, tiny_llama

IDS = torch.randint(3, LLAMA["vocab_size"], (4, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = MASK[2, 6:] = 0
BATCH = dict(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100))
Q0 = "model.layers.0.self_attn.q_proj"


def make(blocks=4, **lora):
    """A tiny LLaMA with LoRA on three linears of each block, in training mode."""
    settings = dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False) | lora
    base = tiny_llama("AutoModelForCausalLM", use_cache=False, num_hidden_layers=blocks)
    torch.manual_seed(1)
    return peft.get_peft_model(base, peft.LoraConfig(**settings)).train()


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def lora_As(model):
    """Every lora_A, in the order of the layers."""
    return [m for name, m in model.named_modules() if name.rpartition(".")[0].endswith("lora_A")]


def defined(weight, z, mask):
    """Mean of |(I - P) z| / |z| over the rows that count, in float64 and differentiable."""
    z, A = z.double(), weight.double()
    outside = z - torch.linalg.solve(A @ A.T, A @ z.flatten(0, -2).T).T.reshape(*z.shape[:-1], -1) @ A
    return (outside.norm(dim=-1) / z.norm(dim=-1))[mask != 0].mean()


@pytest.mark.parametrize("positional", [False, True])
def test_ratios_of_two_adapters_follow_the_definition_and_leave_padding_out(positional):
    model = make(lora_dropout=0.3)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    inputs = {}
    for layer in lora_As(model):
        layer.register_forward_pre_hook(lambda layer, z: inputs.update({layer: z[0]}))
    with track(model) as tracker:
        model(IDS, MASK) if positional else model(**BATCH)
    assert len(inputs) == 16 and set(tracker.layers) == set(tracker.ratios)
    assert {Q0, "model.layers.3.self_attn.v_proj.second"} < set(tracker.ratios)
    for name, layer in tracker.layers.items():
        exact = defined(layer.weight, inputs[layer], MASK)
        padded = defined(layer.weight, inputs[layer], torch.ones_like(MASK))
        assert abs(tracker.ratios[name] - exact) < 1e-6 < abs(padded - exact), name
    torch.testing.assert_close(tracker.mean(), torch.stack(list(tracker.ratios.values())).mean())


class Twice(nn.Module):
    """A model that runs its one LoRA layer on half of its rows, and again on the other half."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, z, attention_mask=None):
        return [self.layer(half) for half in z.chunk(2)]


@pytest.mark.parametrize("mask", [None, torch.ones(4, 1, 9, 9), torch.zeros(4, 12), "no tensor"])
def test_without_a_mask_for_every_row_all_rows_count_of_all_calls(mask):
    layer = make().get_base_model().model.layers[0].self_attn.q_proj
    model, z = Twice(layer), torch.randn(4, 9, 32)
    exact = defined(layer.lora_A["default"].weight, z, torch.ones(4, 9))
    with track(model) as tracker:
        model(z, attention_mask=mask)
    assert list(tracker.ratios) == ["layer"] and abs(tracker.mean() - exact) < 1e-6
    with track(layer) as alone:
        layer(z)
    assert list(alone.ratios) == ["default"] and abs(alone.mean() - exact) < 1e-6


def test_under_autocast_the_projection_is_that_of_the_rounded_A():
    layer = make().get_base_model().model.layers[0].self_attn.q_proj
    weight, z = layer.lora_A["default"].weight, torch.eye(32)  # for which u is a column of A, not rounded once more
    with track(layer) as tracker, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(z)
    exact, rounded = (defined(A, z, torch.ones(32)) for A in (weight, weight.bfloat16()))
    assert abs(tracker.mean() - rounded) < 1e-6 < abs(exact - rounded)


def test_read_is_the_mean_over_rows_however_they_are_cut_into_forwards():
    model = make()
    with track(model) as tracker:
        model(**BATCH)
        whole = tracker.read()
        for part in (slice(0, 1), slice(1, 4)):
            model(**{key: value[part] for key, value in BATCH.items()})
        model.eval()(IDS.flip(0))
        of_eval = tracker.ratios
        assert tracker.read() == pytest.approx(whole, rel=1e-6) and len(whole) == 12
        assert tracker.read() == {}
    assert abs(of_eval[Q0] - whole[Q0]) > 1e-6


def state(model):
    """All that tracking might leave behind."""
    modules = {name: (type(m), sorted(vars(m))) for name, m in model.named_modules()}
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    return modules, hooks, [(name, id(p)) for name, p in model.named_parameters()], list(model.state_dict())


def test_the_model_is_restored_exactly_also_after_an_exception():
    model = make()
    compiled = torch.compile(model)
    lora_As(model)[0].register_forward_hook(print)
    before = state(model)
    with pytest.raises(RuntimeError, match="mine"), track(model) as tracker:
        model(**BATCH)
        during = state(model)
        assert during[2:] == before[2:] and during[0] != before[0] and during[1] != before[1]
        raise RuntimeError("mine")
    assert state(model) == before
    tracker.remove()  # once more
    assert state(model) == before and len(tracker.ratios) == 12
    second = track(compiled)  # the hooks are those of the model in it
    tracker.remove()  # the first, again
    model(**BATCH)
    assert len(second.ratios) == 12
    untrack(model)
    assert state(model) == before


def test_saving_merging_and_copying_do_not_notice(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "plain")
    with track(model):
        model.save_pretrained(tmp_path / "tracked")
        twin = copy.deepcopy(model)
        model.merge_adapter()
        merged = model(**BATCH).loss
        model.unmerge_adapter()
    files = ["adapter_model.safetensors", "adapter_config.json"]
    assert all((tmp_path / "plain" / f).read_bytes() == (tmp_path / "tracked" / f).read_bytes() for f in files)
    torch.testing.assert_close(merged, make()(**BATCH).loss)
    untrack(twin)
    assert state(twin)[0] == state(model)[0]


def test_a_reentrant_checkpoint_cannot_regularise_and_says_so():
    model = make()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with track(model, differentiable=True) as tracker:
        with torch.no_grad():
            assert not model(**BATCH).loss.requires_grad and tracker.ratios  # an evaluation is no mistake
        with pytest.raises(ValueError, match="use_reentrant"):
            model(**BATCH)


def test_models_without_a_ratio_are_refused_by_name():
    with pytest.raises(AdapterError, match="get_peft_model"):
        track(nn.Linear(3, 3))
    with pytest.raises(UnsupportedAdapter, match=f"{Q0} .*DoRA"):
        track(make(use_dora=True))
    model = make(target_modules=["q_proj", "embed_tokens"])
    with pytest.warns(UserWarning, match="embed_tokens has no null-space ratio"), track(model) as tracker:
        assert list(tracker.skipped) == ["model.embed_tokens"] and len(tracker.layers) == 4
        with pytest.raises(ValueError, match="no LoRA layer has run"):
            tracker.mean()
        with pytest.raises(ValueError, match="already"):
            track(model)
    lora_As(model)[0].forward = print
    with pytest.warns(UserWarning, match="custom forward"), track(model) as tracker:
        assert len(tracker.layers) == 3
    lora = peft.LoraConfig(target_modules=["q"])
    shape = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9, decoder_start_token_id=0)
    t5 = peft.get_peft_model(transformers.T5ForConditionalGeneration(transformers.T5Config(**shape)), lora)
    with pytest.raises(ValueError, match="get_encoder"):
        track(t5)
    with track(t5.get_base_model().get_encoder()) as tracker:
        t5(input_ids=IDS % 9, attention_mask=MASK, labels=IDS % 9)
    assert len(tracker.ratios) == 1
