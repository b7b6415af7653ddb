"""The record replays a merge: byte for byte, without the base, and never with other adapters than those merged."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import nsc
from nsc.errors import NSCError
from nsc.export.description import digest_of
from nsc.export.record import UNVERIFIED, Record
from nsc.methods import LowRank
from nsc.recipes.updates import FixedFactors, WeightedSum
from tests.conftest import ADAPTERS
from tests.tiny import rewrite, save_base


@pytest.fixture(scope="module")
def made(tmp_path_factory, adapters, texts) -> Path:
    """A workplace with its own base and adapters, which tests may copy and damage, and the merge of them in ``out``."""
    home = tmp_path_factory.mktemp("made")
    save_base(home / "base")
    here = {task: shutil.copytree(path, home / "adapters" / task) for task, path in adapters.items()}
    nsc.merge(home / "base", here, texts, steps=3, lr=0.05, progress=False).save(home / "out")
    return home


@pytest.fixture
def home(made, tmp_path) -> Path:
    """A copy of the workplace; the record in it still names the adapters of ``made``."""
    return Path(shutil.copytree(made, tmp_path / "home"))


def moved(home: Path) -> dict[str, Path]:
    return {task: home / "adapters" / task for task in ADAPTERS}


def edit(home: Path, change, seal: bool = True, name: str = "merge.yaml") -> None:
    """Change a file of the record; ``seal`` gives it the digest of what it says then."""
    file = home / "out" / name
    record = yaml.safe_load(file.read_text())
    record.pop("digest", None)
    change(record)
    record = record | ({"digest": digest_of(yaml.safe_load(yaml.safe_dump(record)))} if seal else {})
    file.write_text(yaml.safe_dump(record, sort_keys=False))


def forget_digests(home: Path) -> None:
    """Make the record one of a version before digests."""
    edit(home, lambda record: record.pop("files"), seal=False)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_apply_is_byte_identical_without_the_base(home):
    shutil.rmtree(home / "base")
    edit(home, lambda record: record.update(base=str(home / "base")), name="local.yaml")
    result = nsc.apply(home / "out")
    assert result.model is None
    result.save(home / "again")
    assert weights(home / "again") == weights(home / "out")
    for file in ("coefficients.safetensors", "heads/double.safetensors"):
        before, after = load_file(home / "out" / file), load_file(home / "again" / file)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    nsc.apply(home / "again").save(home / "third")
    assert weights(home / "third") == weights(home / "out")


def test_the_record_holds_how_it_was_learned(home, merged):
    record = Record.read(home / "out")
    assert record.settings["steps"] == 3 and record.settings["lr"] == 0.05 and record.start == 0.4
    assert record.targets == ["layers.3.self_attn.v_proj"] and record.prefix == "model."
    assert list(record.adapters) == merged.tasks and list(record.modules) == merged.modules
    assert record.modules["layers.0.mlp.down_proj"] == (32, 48)
    assert nsc.MergeConfig.from_dict(record.settings).to_dict() == record.settings
    assert {"nsc", "torch", "transformers", "peft"} <= yaml.safe_load((home / "out/merge.yaml").read_text())[
        "made"
    ].keys()


def test_write_and_read_are_inverse(home, tmp_path):
    record = Record.read(home / "out")
    (tmp_path / "new").mkdir()
    record.write(tmp_path / "new")
    again = Record.read(tmp_path / "new")
    assert torch.equal(again.coefficients, record.coefficients)
    assert replace(again, coefficients=None) == replace(record, coefficients=None)
    assert list(again.modules) == list(record.modules) and list(again.adapters) == list(record.adapters)


def test_moved_adapters_and_base(home, made):
    gone = {task: {"path": f"/gone/{task}"} for task in moved(home)}
    edit(home, lambda r: r.update(adapters=gone), name="local.yaml")
    with pytest.raises(NSCError, match="adapter plain was called '/gone/plain'; say where it lies"):
        nsc.apply(home / "out")
    nsc.apply(home / "out", adapters=moved(home)).save(home / "again")
    assert weights(home / "again") == weights(made / "out")
    with pytest.raises(NSCError, match="the record has no task typo; it has plain, rslora"):
        nsc.apply(home / "out", adapters={"typo": made})
    edit(home, lambda r: r.update(base="/gone/base"), name="local.yaml")
    result = nsc.apply(home / "out", adapters=moved(home), base=home / "base")
    result.save(home / "full", full=True)
    assert result.record.base == str(home / "base") and (home / "full/model.safetensors").is_file()


def test_full_by_apply_is_full_by_merge(home, made, adapters, texts):
    shutil.rmtree(home / "out")
    direct = nsc.merge(home / "base", moved(home), texts, steps=3, lr=0.05, progress=False)
    direct.save(home / "direct", full=True)
    proof = nsc.apply(home / "direct").save(home / "applied", full=True)
    assert proof.outputs < 1e-5 < proof.effect
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (home / "direct" / file).read_bytes() == (home / "applied" / file).read_bytes()
    nsc.apply(home / "direct").save(home / "adapter")
    assert weights(home / "adapter") == weights(made / "out")


def change_weights(path: Path) -> None:
    rewrite(path / "adapter_model.safetensors", lambda t: next(iter(t.values())).view(-1)[:1].add_(1e-3))


def change_alpha(path: Path) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))


@pytest.mark.parametrize("change", [change_weights, change_alpha])
def test_a_changed_adapter_is_refused_by_name(home, change):
    change(home / "adapters/rslora")
    with pytest.raises(NSCError, match=r"adapter rslora at .* is not the one that was merged"):
        nsc.apply(home / "out", adapters=moved(home))


def test_two_adapters_exchanged_are_refused(home):
    places = moved(home)
    with pytest.raises(NSCError, match="is not the one that was merged"):
        nsc.apply(home / "out", adapters={**places, "plain": places["double"], "double": places["plain"]})


def test_the_order_in_the_description_does_not_move_coefficients(home, made):
    edit(home, lambda r: r.update(adapters=dict(reversed(r["adapters"].items()))))
    nsc.apply(home / "out").save(home / "again")
    assert weights(home / "again") == weights(made / "out")


def cut(name: str, keep: int):
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:keep])


def coefficients(change):
    def write(out: Path) -> None:
        file = out / "coefficients.safetensors"
        metadata = {
            "modules": json.dumps(Record.read(out).modules),
            "tasks": json.dumps(list(Record.read(out).adapters)),
        }
        save_file({"coefficients": change(load_file(file)["coefficients"]).contiguous()}, file, metadata=metadata)

    return write


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut("coefficients.safetensors", -4), "no readable record"),
        (cut("coefficients.safetensors", 3), "no readable record"),
        (cut("merge.yaml", 60), "no readable record|lacks"),
        (cut("merge.yaml", 0), "must hold a mapping"),
        (lambda out: (out / "merge.yaml").unlink(), r"no readable record.*merge\.yaml"),
        (lambda out: (out / "coefficients.safetensors").unlink(), "no readable record.*coefficients"),
        (lambda out: (out / "merge.yaml").write_text("- a\n- b\n"), "must hold a mapping"),
        (lambda out: (out / "merge.yaml").write_bytes(b"base: caf\xe9"), "no readable record"),
        (
            lambda out: save_file({"coefficients": torch.ones(1)}, out / "coefficients.safetensors"),
            "no readable record",
        ),
        (coefficients(lambda c: c[:-1]), r"coefficients \(19, 4\) must be finite and of shape \(20, 4\)"),
        (coefficients(lambda c: c * float("nan")), "must be finite"),
        (lambda out: shutil.rmtree(out), "no readable record"),
    ],
)
def test_damaged_records(home, damage, said):
    forget_digests(home)
    damage(home / "out")
    with pytest.raises(NSCError, match=said):
        nsc.apply(home / "out")


def test_a_description_that_lacks_a_task_is_refused(home):
    edit(home, lambda r: r["adapters"].pop("double"))
    with pytest.raises(NSCError, match="double"):
        nsc.apply(home / "out")


@pytest.fixture
def fixed(home):
    """The same merge, its factors changed so that no coefficients give them, written to ``out-fixed``."""
    result = nsc.apply(home / "out")
    rest = WeightedSum(result.stack, result.coefficients)
    factors = {name: LowRank(1.5 * rest.update(name).B, rest.update(name).A) for name in result.stack.modules}
    record = replace(result.record, factors=factors)
    replace(result, fixed=FixedFactors(factors, rest), record=record).save(home / "out-fixed")
    return home


def test_recorded_factors_are_the_merge_again(fixed):
    nsc.apply(fixed / "out-fixed").save(fixed / "again")
    assert weights(fixed / "again") == weights(fixed / "out-fixed") != weights(fixed / "out")


@pytest.mark.parametrize("damage", ["nan", "missing", "shape"])
def test_damaged_recorded_factors_are_refused(fixed, damage):
    shutil.rmtree(fixed / "out")
    (fixed / "out-fixed").rename(fixed / "out")
    forget_digests(fixed)
    file = fixed / "out/factors.safetensors"
    stored = load_file(file)
    name = next(iter(stored))
    if damage == "nan":
        stored[name][0, 0] = float("nan")
    elif damage == "shape":
        stored[name] = stored[name][:-1].contiguous()
    else:
        stored = {key: x for key, x in stored.items() if key[:-2] != name[:-2]}
    save_file(stored, file)
    with pytest.raises(NSCError, match="damaged"):
        nsc.apply(fixed / "out")


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place // 8 % len(content)] ^= 1 << place % 8
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["coefficients.safetensors", "merge.yaml"])
def test_flipped_bits_are_refused_or_change_nothing(made, tmp_path, name):
    home = Path(shutil.copytree(made / "out", tmp_path / "out"))
    sound, whole, places = (home / name).read_bytes(), Record.read(home), random.Random(1)
    for _ in range(60):
        (home / name).write_bytes(sound)
        flip(home / name, places.randrange(8 * len(sound)))
        try:
            found = Record.read(home)
        except NSCError as error:
            assert str(error).count("\n") == 0 and len(str(error)) < 2000
        else:
            assert torch.equal(found.coefficients, whole.coefficients)
            assert replace(found, coefficients=None) == replace(whole, coefficients=None)


def test_flipped_factors_are_refused(fixed):
    flip(fixed / "out-fixed/factors.safetensors", 8 * 5000 + 3)
    with pytest.raises(NSCError, match=r"factors\.safetensors is not what was written; it is damaged or was edited"):
        nsc.apply(fixed / "out-fixed")


def test_an_edited_record_is_refused_and_one_without_digests_told(home, made):
    edit(home, lambda record: record.update(base="/elsewhere"), seal=False)
    assert any(UNVERIFIED in warning for warning in nsc.apply(home / "out").report.warnings)
    forget_digests(home)
    result = nsc.apply(home / "out")
    assert any(UNVERIFIED in warning for warning in result.report.warnings)
    result.save(home / "again")
    assert weights(home / "again") == weights(made / "out") and not nsc.apply(made / "out").report.warnings
    edit_without_seal = (made / "out/merge.yaml").read_text().replace("base: ", "base: else")
    (home / "out/merge.yaml").write_text(edit_without_seal)
    with pytest.raises(NSCError, match=r"merge\.yaml is not what was written; .*--base and --adapter"):
        nsc.apply(home / "out")


IMPOSSIBLE = {
    "base null": lambda r: r.update(base=None),
    "base empty": lambda r: r.update(base=""),
    "prefix mistyped": lambda r: r.update(prefix="modle."),
    "prefix without dot": lambda r: r.update(prefix="model"),
    "prefix a number": lambda r: r.update(prefix=3),
    "start NaN": lambda r: r.update(start=float("nan")),
    "start text": lambda r: r.update(start="half"),
    "rank 0": lambda r: r.update(rank=0),
    "rank true": lambda r: r.update(rank=True),
    "adapters a list": lambda r: r.update(adapters=list(r["adapters"])),
    "adapter without path": lambda r: r["adapters"]["plain"].pop("path"),
    "adapter without fingerprint": lambda r: r["adapters"]["plain"].pop("fingerprint"),
    "fingerprint null": lambda r: r["adapters"]["plain"].update(fingerprint=None),
    "one adapter more": lambda r: r["adapters"].update(more=r["adapters"]["plain"]),
    "method unknown": lambda r: r.update(method="magic"),
    "method a list": lambda r: r.update(method=["nsc"]),
    "settings null": lambda r: r.update(settings=None),
    "setting unknown": lambda r: r["settings"].update(stepz=3),
    "setting of another type": lambda r: r["settings"].update(steps="three"),
    "setting NaN": lambda r: r["settings"].update(lr=float("nan")),
    "huge setting": lambda r: r["settings"].update(seed=10**400),
    "key unknown": lambda r: r.update(kind="merge"),
    "key missing": lambda r: r.pop("targets"),
    "targets numbers": lambda r: r.update(targets=[1]),
    "dense nested": lambda r: r.update(dense=[["x"]]),
    "masks that are not there": lambda r: r.update(masks=True),
    "factors that are not there": lambda r: r.update(factors=True),
    "fitted no JSON": lambda r: r.update(fitted="{"),
    "layers a list": lambda r: r.update(layers="[1]"),
    "layers deep": lambda r: r.update(layers="[" * 100000),
    "files outside": lambda r: r["files"].update({"/nowhere/x": "0"}),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_record_that_no_merge_has_written_is_refused_though_it_is_sealed(home, name):
    edit(home, IMPOSSIBLE[name])
    with pytest.raises(NSCError) as error:
        nsc.apply(home / "out")
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_a_coefficient_beyond_the_bound_is_refused(home):
    forget_digests(home)
    coefficients(lambda c: c + 0.5)(home / "out")
    with pytest.raises(NSCError, match="farther than max_drift"):
        nsc.apply(home / "out")
