"""Which modules a config targets, beside PEFT's own function; and ranks by pattern, beside PEFT's own look-up."""

import re

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from nsc.adapters import targets
from nsc.adapters.inspection import inspect
from nsc.adapters.lora import read_adapter
from nsc.adapters.matching import check_coverage
from nsc.adapters.targets import Patterns, is_targeted
from nsc.bases.module_names import resolve
from nsc.errors import NameMismatch, UnsupportedAdapter
from tests.tiny import linears, peft_adapter, random_factors, tiny_llama, write_adapter

DEEP = tiny_llama("AutoModelForCausalLM")
NAMES = [name for name in linears(DEEP) if name != "lm_head"]
CONFIGS = {
    "list": dict(target_modules=["q_proj", "v_proj"]),
    "full names": dict(target_modules=["model.layers.1.self_attn.q_proj"]),
    "ends of names": dict(target_modules=["1.self_attn.q_proj", "mlp.up_proj"]),
    "regex": dict(target_modules=r".*\.(q|v)_proj"),
    "regex of some layers": dict(target_modules=r"model\.layers\.[02]\..*(q|up)_proj"),
    "regex that is no full match": dict(target_modules=r"q_proj"),
    "layers": dict(target_modules=["q_proj"], layers_to_transform=[0, 3]),
    "one layer": dict(target_modules=["q_proj"], layers_to_transform=2),
    "layers by pattern": dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "layers by another pattern": dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["h"]),
    "excluded": dict(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.3.self_attn.q_proj"]),
    "excluded by regex": dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.[13]\..*"),
    "saved whole": dict(target_modules=["q_proj", "v_proj"], modules_to_save=["v_proj"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_rule_is_that_of_peft(case):
    ours, theirs = CONFIGS[case], peft.LoraConfig(**CONFIGS[case])
    for name in NAMES:
        assert is_targeted(ours, name) == bool(check_target_module_exists(theirs, name)), name


ANY_DEPTH = {
    "list": dict(target_modules=["q_proj", "v_proj"]),
    "regex": dict(target_modules=r".*\.(q|v)_proj"),
    "regex with names": dict(target_modules=r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"),
    "excluded": dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.0\.self_attn\.v_proj"),
    "layers beyond": dict(target_modules=["q_proj"], layers_to_transform=[0, 1, 2, 3]),
}


@pytest.mark.parametrize("case", ANY_DEPTH)
def test_a_deeper_base_is_refused_whatever_form_the_targets_have(case, tmp_path):
    shallow = tiny_llama("AutoModelForCausalLM", num_hidden_layers=2)
    adapter = read_adapter(peft_adapter(tmp_path / "a", shallow, r=2, **ANY_DEPTH[case]))
    same, deeper = linears(tiny_llama(num_hidden_layers=2)), linears(tiny_llama())
    check_coverage(adapter, resolve("a", adapter.factors, same), same)
    with pytest.raises(NameMismatch, match=r"targets 'layers\.2\.self_attn\.q_proj'.*deeper"):
        check_coverage(adapter, resolve("a", adapter.factors, deeper), deeper)


UNTARGETED = {
    "layers": dict(target_modules=["q_proj"], layers_to_transform=[0, 1, 2]),
    "excluded": dict(target_modules=["q_proj"], exclude_modules=["layers.3.self_attn.q_proj"]),
    "regex": dict(target_modules=r".*layers\.[0-2]\..*q_proj"),
    "full names": dict(target_modules=[f"model.layers.{i}.self_attn.q_proj" for i in range(3)]),
    "all of them excluded": dict(target_modules=["q_proj"], exclude_modules=r".*q_proj"),
}


@pytest.mark.parametrize("case", UNTARGETED)
def test_factors_that_peft_would_leave_out_are_refused_by_name(case, tmp_path):
    names = [name for name in NAMES if name.endswith("q_proj")]
    path = write_adapter(tmp_path / "a", random_factors(names), **UNTARGETED[case])
    first = names[0] if case == "all of them excluded" else names[3]
    with pytest.raises(UnsupportedAdapter, match=rf"factors of '{re.escape(first)}'.*PEFT leaves them out"):
        read_adapter(path)
    assert any("PEFT leaves them out" in problem for problem in inspect([path])[0].problems)


def test_targets_of_another_transformers_say_nothing(tmp_path):
    path = write_adapter(tmp_path / "a", random_factors(NAMES[:1]), target_modules=["query"])
    assert list(read_adapter(path).factors) == NAMES[:1]


@pytest.mark.parametrize("broken", [r"*q_proj", r".*(q_proj"])
def test_a_pattern_that_is_none_is_named(broken, tmp_path):
    path = write_adapter(tmp_path / "a", random_factors(NAMES[:1]), target_modules=broken)
    with pytest.raises(UnsupportedAdapter, match=r"target_modules.*cannot be read"):
        read_adapter(path)


PATTERNS = [
    {"q_proj": 1, "v_proj": 2},
    {"model.layers.1.self_attn.q_proj": 1, "layers.1.self_attn.q_proj": 2, "self_attn.q_proj": 3},
    {r".*\.1\..*q_proj": 1, "q_proj": 2},
    {"layers.1.self_attn": 1, "1.self_attn.v_proj": 2, "proj": 3},
    {"self.attn.q.proj": 4, "....._proj": 5, "mlp.up_proj": 6},  # a dot is any character
    {r"^model\.layers\.2\.self_attn\.(q|k)_proj": 1, r"layers\.\d+\.mlp\.up_proj": 2},
]


@pytest.mark.parametrize("entries", PATTERNS, ids=str)
def test_patterns_fit_as_in_peft(entries):
    patterns = Patterns(entries)
    for name in NAMES:
        found = patterns.matching(name)
        assert found[:1] == [entries[key] for key in [get_pattern_key(entries, name)] if key in entries]
        assert found == [value for key, value in entries.items() if re.match(rf"(.*\.)?({key})$", name)]


def test_a_rank_for_each_of_many_modules_takes_no_regex(monkeypatch):
    """With an entry for each of 2,000 modules, nothing is compiled or matched for a pair of them."""
    names = [f"model.layers.{i}.self_attn.{kind}" for i in range(500) for kind in ("q_proj", "k_proj", "v_proj", "o")]
    counts = {"masked": 0}
    masked = targets._masked
    monkeypatch.setattr(targets, "_masked", lambda *a: counts.update(masked=counts["masked"] + 1) or masked(*a))
    for name in ("match", "compile"):
        monkeypatch.setattr(targets.re, name, lambda *_: pytest.fail("a regex for each module"))
    patterns = Patterns({name: rank for rank, name in enumerate(names)})
    assert [patterns.matching(name) for name in names] == [[rank] for rank in range(len(names))]
    assert counts["masked"] < 10 * len(names)
