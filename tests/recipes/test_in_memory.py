"""Factors in memory: what is merged is what a merge of the same adapters in folders is, and what PEFT then applies."""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

import nsc
from nsc.errors import AdapterError, NSCError, UnsupportedAdapter
from nsc.methods import Updates
from nsc.recipes.combination import Combination, stack_of
from nsc.recipes.in_memory import merge_factors
from nsc.recipes.spec import method_of, names, read_recipe
from tests.tiny import dense_updates, peft_adapter, tiny_llama

FREE = [name for name in names() if method_of(name).inputs is None]


def pairs(seed: int, layers=("q", "v"), r: int = 4, scale=()):
    draw = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(r, 24, generator=draw), torch.randn(30, r, generator=draw), *scale) for name in layers}


ADAPTERS = {"a": pairs(0, scale=(0.5,)), "b": pairs(1), "c": pairs(2, ("v", "o"))}


def product(factors):
    return {name: B.double() @ A.double() for name, (A, B) in factors.items()}


def test_a_sum_is_the_sum_of_all_updates():
    want = {name: torch.zeros(30, 24, dtype=torch.float64) for name in ("q", "v", "o")}
    for task, weight in {"a": 2.0, "b": 1.0, "c": -1.0}.items():
        for name, (A, B, *scale) in ADAPTERS[task].items():
            want[name] += 0.3 * weight * (scale[0] if scale else 1) * B.double() @ A.double()
    got = nsc.merge_factors(ADAPTERS, weights={"a": 2.0, "c": -1.0}, scale=0.3)
    assert list(got) == ["q", "v", "o"] and [len(A) for A, _ in got.values()] == [8, 12, 4]
    assert {x.dtype for pair in got.values() for x in pair} == {torch.float32}
    torch.testing.assert_close(product(got), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", FREE)
def test_every_method_without_data(method):
    """Exactly what its recipe makes, or the nearest of a rank; and dense updates are refused without one."""
    adapters = {"a": pairs(0, r=12), "b": pairs(1, r=12)}
    recipe = read_recipe(method)
    if recipe.is_dense:
        with pytest.raises(NSCError, match=r"makes dense updates.*give rank"):
            merge_factors(adapters, method)
    whole = merge_factors(adapters, method, rank=24 if recipe.is_dense else None)
    sides = [[[x[name][i] for x in adapters.values()] for i in (0, 1)] for name in ("q", "v")]
    updates = {
        name: Updates(name, ("a", "b"), tuple(A), tuple(B), (1.0, 1.0), (1.0, 1.0))
        for name, (A, B) in zip("qv", sides, strict=True)
    }
    combination = Combination(stack_of(updates), recipe)
    for name, got in product(whole).items():
        want = combination.update(name)
        want = want.B @ want.A if isinstance(want, tuple) else want.double()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert len(merge_factors(adapters, method, rank=3)["q"][0]) == 3


@pytest.fixture(scope="module")
def peft_models(tmp_path_factory):
    """task -> (folder, live model) of adapters that differ in rank, scale and targets."""
    made = {}
    settings = {
        "mnli": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "qnli": dict(
            r=8, lora_alpha=8, use_rslora=True, target_modules=["v_proj", "down_proj"], rank_pattern={"down_proj": 2}
        ),
    }
    for seed, (task, lora) in enumerate(settings.items()):
        folder = peft_adapter(tmp_path_factory.mktemp(task), tiny_llama("AutoModelForCausalLM"), seed=seed, **lora)
        made[task] = folder, peft.PeftModel.from_pretrained(tiny_llama("AutoModelForCausalLM"), folder)
    return made


def test_state_dicts_of_peft_in_and_out(peft_models):
    """Loaded by stock PEFT, the merge changes every weight by the sum of what PEFT itself applies of the adapters."""
    states = {t: (get_peft_model_state_dict(m), m.peft_config["default"]) for t, (_, m) in peft_models.items()}
    state, config = nsc.merge_factors(states, weights={"mnli": 0.3, "qnli": -0.5})
    assert {len(x) for key, x in state.items() if "lora_A" in key} == {config["r"]} == {12}
    base = tiny_llama("AutoModelForCausalLM")
    before = {name: x.clone() for name, x in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(**config))
    assert not set_peft_model_state_dict(model, state).unexpected_keys
    after = model.merge_and_unload().state_dict()
    parts = {task: dense_updates(folder) for task, (folder, _) in peft_models.items()}
    for name, x in before.items():
        module = name.removeprefix("model.").removesuffix(".weight")
        want = sum(w * parts[t].get(module, 0) for t, w in {"mnli": 0.3, "qnli": -0.5}.items())
        torch.testing.assert_close((after[name] - x).double(), want + torch.zeros_like(x).double(), rtol=0, atol=1e-6)
    live = {task: (m.state_dict(), m.peft_config["default"]) for task, (_, m) in peft_models.items()}
    live = {
        t: ({k: x for k, x in s.items() if "lora_" in k}, c) for t, (s, c) in live.items()
    }  # ...lora_A.default.weight
    again, _ = nsc.merge_factors(live, weights={"mnli": 0.3, "qnli": -0.5})
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


LORA = {"l.lora_A.weight": torch.ones(2, 5), "l.lora_B.weight": torch.ones(3, 2)}
PLAIN = {"r": 2, "lora_alpha": 4}
REFUSED = {
    "no adapter given": ({}, {}),
    "the adapters have no layer": ({"a": {}}, {}),
    "one form: b are \\(state dict, config\\), a map": ({"a": pairs(0), "b": (LORA, PLAIN)}, {}),
    "nsc needs data and a base; call nsc.merge": (ADAPTERS, {"method": "nsc"}),
    "nsc\\+ties needs data": (ADAPTERS, {"method": "nsc+ties"}),
    "auto needs data": (ADAPTERS, {"method": "auto"}),
    "regmean needs data": (ADAPTERS, {"method": "regmean"}),
    "aim needs data": (ADAPTERS, {"method": "core-ties", "aim": 0.4}),
    "no setting densty": (ADAPTERS, {"method": "core-ties", "densty": 0.4}),
    "weights names d, which is no task": (ADAPTERS, {"weights": {"d": 1.0}}),
    "rank must be": (ADAPTERS, {"rank": 0}),
    "layer q is \\(30, 24\\) in adapter b but \\(3, 5\\) in another": (
        {"a": {"q": (torch.ones(2, 5), torch.ones(3, 2))}, "b": pairs(0)}, {}),
    "adapter 'a', layer 'q': A \\(2, 5\\) and B \\(3, 4\\) must be": (
        {"a": {"q": (torch.ones(2, 5), torch.ones(3, 4))}}, {}),
    "layer 'q': .* must be finite": ({"a": {"q": (torch.full((2, 5), torch.nan), torch.ones(3, 2))}}, {}),
    "the tensors have rank 2, .* says 3": ({"a": (LORA, {"r": 3, "lora_alpha": 4})}, {}),
    "use_dora": ({"a": (LORA, PLAIN | {"use_dora": True})}, {}),
    "'score.weight' is fine-tuned whole": (
        {"a": (LORA | {"score.weight": torch.ones(2, 2)}, PLAIN | {"modules_to_save": ["score"]})}, {}),
}  # fmt: skip


@pytest.mark.parametrize("says", REFUSED)
def test_refusals(says):
    adapters, settings = REFUSED[says]
    with pytest.raises((NSCError, AdapterError, UnsupportedAdapter), match=says):
        merge_factors(adapters, **settings)
