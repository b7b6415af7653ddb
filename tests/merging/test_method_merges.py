"""Every method through the whole house: written, loaded back, reported, replayed, refused; by Python and by flags."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import nsc
from nsc.bases import loading
from nsc.errors import NSCError, ProofError
from nsc.methods import METHODS
from nsc.recipes.combination import Combination
from nsc.recipes.merged_factors import merged_factors
from nsc.recipes.spec import read_recipe
from nsc.recipes.updates import dense
from tests.adapters.test_modules_to_save import whole  # noqa: F401 (a fixture)
from tests.cli.test_cli import refused, run
from tests.conftest import ADAPTERS
from tests.export.test_proof import ADAPTER, FULL, corrupted
from tests.tiny import WORDS, rewrite

TASKS = ("plain", "rslora")
# A full name of each kind of update: exact factors, of a space, truncated by itself, dense.
KINDS = {"task-arithmetic": {}, "core-ties": {"density": 0.5}, "svd": {"rank": 3}, "ties": {"density": 0.5}}
FORMS = {"adapter": {}, "truncated": {"rank": 3}, "full": {"full": True}}


@pytest.fixture(scope="module")
def two(adapters) -> dict[str, Path]:
    return {task: adapters[task] for task in TASKS}


def merge(base, adapters, method, **settings) -> nsc.MergeResult:
    return nsc.merge(base, adapters, method=method, progress=False, **settings)


def command(base, adapters, out, *more) -> list[str]:
    pairs = [part for task, path in adapters.items() for part in ("--adapter", f"{task}={path}")]
    return ["merge", "--base", str(base), *pairs, "--out", str(out), *map(str, more)]


def weights(folder: Path) -> bytes:
    name = "adapter_model.safetensors"
    return (folder / (name if (folder / name).exists() else "model.safetensors")).read_bytes()


def described(folder: Path) -> dict:
    return yaml.safe_load((folder / "merge.yaml").read_text())


def expected(result: nsc.MergeResult, name: str) -> torch.Tensor:
    """(m, d) of a layer by the method on a fresh combination."""
    return dense(Combination(result.stack, result.combination.recipe).update(name))


@pytest.mark.parametrize(
    ("method", "form"), [(m, f) for m in KINDS for f in FORMS if (m, f) != ("ties", "adapter")], ids=str
)
def test_written_proven_and_replayed(base, two, tmp_path, method, form):
    """Stock PEFT or transformers holds what the method makes, and the record makes it again, bit for bit."""
    result = merge(base, two, method, scale=0.7, **KINDS[method])
    proof = result.save(tmp_path / "out", **FORMS[form])
    assert proof.modules == 16 and proof.weights < 1e-6 and proof.outputs < 1e-5 < 1e-3 < proof.effect
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert proof.lost == max(report["truncation"].values(), default=0)
    assert (f"{proof.lost:.1%} of an update's norm left out" in str(proof)) == (form == "truncated" and method != "svd")
    assert report["method"] == method and report["settings"]["scale"] == 0.7 and report["proofs"] == [str(proof)]
    place = AutoModelForCausalLM.from_pretrained(tmp_path / "out" if form == "full" else base)
    if form != "full":
        layers = peft.PeftModel.from_pretrained(place, tmp_path / "out").get_base_model().model
    source = load_file(base / "model.safetensors")
    for name in result.modules:
        wanted = expected(result, name)
        if form == "full":
            found = place.model.get_submodule(name).weight.double() - source[f"model.{name}.weight"].double()
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        else:
            found = layers.get_submodule(name).get_delta_weight("default").double()
            lost = (found - wanted).norm() / wanted.norm()
            assert lost == pytest.approx(report["truncation"].get(name, 0), abs=1e-6)
    rank = {"rank": result.record.rank or FORMS[form].get("rank"), "full": form == "full"}
    nsc.apply(tmp_path / "out").save(tmp_path / "again", **rank)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


def test_a_recipe_is_a_method(base, two):
    first = merge(base, two, read_recipe("core-ties", density=0.5, scale=0.3))
    second = merge(base, two, "core-ties", density=0.5, scale=0.3)
    for name in first.modules:
        assert torch.equal(dense(first.merged.update(name)), dense(second.merged.update(name)))
    with pytest.raises(NSCError, match="density is given beside a recipe"):
        merge(base, two, read_recipe("core-ties"), density=0.5)


def test_no_weight_of_the_base_is_read_before_the_proof(base, two, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, tmp_path / "base" / name)
    result = merge(tmp_path / "base", two, "core-ties")
    proof = result.save(tmp_path / "out")
    assert proof.outputs is None and "outputs not compared" in str(proof) and proof.weights < 1e-6
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_body", None)
        merge(base, two, "core-ties")


def test_the_error_of_a_truncated_dense_update_is_the_true_one(base, two):
    result = merge(base, two, "ties", density=0.5)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    for rank in (1, 6, 16, 99):
        for name, factors in merged_factors(result.merged, rank).items():
            update = expected(result, name)
            sigma = torch.linalg.svdvals(update)
            assert factors.A.shape[0] == min(rank, *update.shape)
            lost = ((factors.B.double() @ factors.A.double() - update).norm() / update.norm()).item()
            best = (sigma[rank:].norm() / sigma.norm()).item()
            assert factors.error == pytest.approx(lost, abs=2e-7) and best - 1e-6 <= lost <= 1.01 * best + 1e-6
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("method", "case"), [("ties", "one entry"), ("core-ties", "sign"), ("svd", "alpha doubled")])
def test_a_tampered_adapter_is_refused(base, two, tmp_path, monkeypatch, method, case):
    corrupted(monkeypatch, "write_adapter", ADAPTER[case])
    with pytest.raises(ProofError):
        merge(base, two, method).save(tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["one entry", "NaN", "untouched layer off by a bit", "other rotation in config"])
def test_a_tampered_full_model_is_refused(base, two, tmp_path, monkeypatch, case):
    corrupted(monkeypatch, "write_full_model", FULL[case])
    with pytest.raises(ProofError):
        merge(base, two, "ties").save(tmp_path / "out", full=True)


def test_nsc_and_task_arithmetic_is_the_nsc_merge(base, two, texts, tmp_path):
    data = {task: texts[task] for task in TASKS}
    settings = dict(steps=3, lr=0.05, progress=False)
    first = nsc.merge(base, two, data, **settings)
    first.save(tmp_path / "nsc")
    result = nsc.merge(base, two, data, method="nsc+task-arithmetic", **settings)
    result.save(tmp_path / "both")
    taken = merge(base, two, "task-arithmetic", coefficients=tmp_path / "nsc")
    taken.save(tmp_path / "taken")
    nsc.apply(tmp_path / "both").save(tmp_path / "applied")
    assert {weights(tmp_path / out) for out in ("nsc", "both", "taken", "applied")} == {weights(tmp_path / "nsc")}
    assert (first.coefficients != 0.4).any() and torch.equal(result.coefficients, first.coefficients)
    assert described(tmp_path / "both")["method"] == "nsc+task-arithmetic"
    assert described(tmp_path / "both")["settings"]["steps"] == 3
    again = run("merge", "--config", tmp_path / "taken/merge.yaml", "--out", tmp_path / "fourth")
    assert again.exit_code == 0 and weights(tmp_path / "fourth") == weights(tmp_path / "nsc")
    card = (tmp_path / "both/README.md").read_text()
    assert "nsc+task-arithmetic" in card and "weighted by the coefficients of nsc" in card and "ratio after" in card
    assert (tmp_path / "both/coefficients.png").exists()


def test_masks_are_kept_beside_the_record(base, two, tmp_path):
    stack = merge(base, two, "dare").stack
    generator = torch.Generator().manual_seed(3)
    shapes = {name: (len(TASKS), *stack.modules[name].delta(torch.ones(2)).shape) for name in stack.names}
    masks = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}
    result = merge(base, two, "dare", drop=0.5, masks=masks)
    result.save(tmp_path / "out", full=True)
    nsc.apply(tmp_path / "out").save(tmp_path / "again", full=True)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    merge(base, two, "dare", drop=0.5).save(tmp_path / "drawn", full=True)
    assert weights(tmp_path / "drawn") != weights(tmp_path / "out")
    name = stack.names[0]
    assert not dense(result.merged.update(name))[~masks[name].any(0)].any()
    again = refused(run("merge", "--config", tmp_path / "out/merge.yaml", "--out", tmp_path / "x"))
    assert "masks were given in Python; repeat it with nsc apply" in again
    with pytest.raises(NSCError, match="core-ties takes no masks"):
        merge(base, two, "core-ties", masks=masks)
    with pytest.raises(NSCError, match="mask for typo, which is no layer"):
        merge(base, two, "dare", masks={"typo": masks[name]})
    with pytest.raises(NSCError, match="must be bool"):
        merge(base, two, "dare", masks={name: masks[name][:1]}).merged.update(name)


def test_a_changed_adapter_is_not_replayed(base, two, tmp_path):
    home = {task: shutil.copytree(path, tmp_path / task) for task, path in two.items()}
    merge(base, home, "core-ties").save(tmp_path / "out")
    rewrite(home["rslora"] / "adapter_model.safetensors", lambda t: next(iter(t.values())).view(-1)[:1].add_(1e-3))
    with pytest.raises(NSCError, match=r"adapter rslora at .* is not the one that was merged"):
        nsc.apply(tmp_path / "out")


@pytest.mark.parametrize("form", ["truncated", "full"])
def test_layers_fine_tuned_whole(whole, tmp_path, form):  # noqa: F811 (the fixture)
    base, made = whole
    result = merge(base, made, "ties", density=0.5)
    proof = result.save(tmp_path / "out", **FORMS[form])
    assert proof.outputs < 1e-4 < proof.effect
    stack, name = result.stack, "layers.0.mlp.gate_proj"
    for found, deltas in (
        (result.merged.update(name), stack.dense[name].deltas),
        (result.merged.bias_update(name), stack.dense[name].bias_deltas),
    ):
        kept = torch.stack(
            [d * (d.abs() >= d.abs().flatten().kthvalue(d.numel() - int(d.numel() * 0.5))[0]) for d in deltas]
        )
        agree = kept * (kept.sign() == kept.sum(0).sign())
        torch.testing.assert_close(found.double(), (agree.sum(0) / (agree != 0).sum(0).clamp_min(1)).double())
    nsc.apply(tmp_path / "out").save(tmp_path / "again", **FORMS[form])
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    with pytest.raises(NSCError, match=r"core-ties works on the factors.*gate_proj.*keep_modules"):
        merge(base, made, "core-ties")
    kept_apart = merge(base, made, "core-ties", keep_modules=("gate_proj", "down_proj"))
    assert not kept_apart.stack.dense and kept_apart.record.settings["keep_modules"] == ["gate_proj", "down_proj"]


def test_whole_layers_by_task_arithmetic_are_the_nsc_merge(whole):  # noqa: F811 (the fixture)
    base, made = whole
    data = {task: WORDS[5:9] for task in made}
    learned = nsc.merge(base, made, data, steps=2, lr=0.05, progress=False)
    both = nsc.merge(base, made, data, method="nsc+task-arithmetic", steps=2, lr=0.05, progress=False)
    for name in learned.modules:
        torch.testing.assert_close(dense(both.merged.update(name)), dense(learned.merged.update(name)))
        one, two = both.merged.bias_update(name), learned.merged.bias_update(name)
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one.double(), two.double())


def test_the_report_says_what_was_done(base, two, tmp_path):
    merge(base, two, "core-ties", density=0.5, scale=0.4).save(tmp_path / "out", rank=2)
    card, report = (tmp_path / "out/README.md").read_text(), json.loads((tmp_path / "out/report.json").read_text())
    assert f"Merged by core-ties: {METHODS['ties'].line} ({METHODS['ties'].source})" in card
    assert "- space: core" in card and "density 0.5" in card and "scale 0.4" in card and "truncation" in card
    assert "coefficients.png" not in card and "| module | rank | truncation |" in card and "null-space" not in card
    assert (
        set(report["ranks_by_module"].values()) == {2}
        and report["ranks_by_module"].keys() == report["truncation"].keys()
    )
    assert report["coefficients"] == [] and report["merged_rank"] == 2 and report["source"] == METHODS["ties"].source
    assert not (tmp_path / "out/coefficients.png").exists() and set(ADAPTERS) >= set(report["tasks"])
