"""Options through a whole merge: what is learned, reported, recorded, written and replayed; and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

import nsc
from nsc.adapters.surgery import merged_layers
from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.bases.heads import Head
from nsc.bases.roles import choose_targets
from nsc.bases.task_head import load_task_head
from nsc.config import LAST_BLOCKS, MergeConfig
from nsc.data.images import collate_images, pixels_by, read_images
from nsc.data.packing import pack
from nsc.errors import DataError, NSCError, ResumeError
from nsc.learning.entropy import Entropy, entropy, row_weights
from nsc.learning.objective import goal_of
from nsc.merging.from_data import _identity
from tests.conftest import ADAPTERS
from tests.tiny import linears, random_factors, save_image_base, write_adapter

FAST = dict(steps=3, lr=0.05, progress=False)
MERGES = [
    dict(granularity="rank"),
    dict(granularity="task", link="sigmoid"),
    dict(link="softmax"),
    dict(granularity="rank", link="exp", objective="both", positions="last", max_new_tokens=1),
    dict(quantile=0.5, optimizer="sgd", schedule="linear", lr=1.0),
]


@pytest.mark.parametrize("options", MERGES, ids=str)
def test_what_is_learned_is_written_recorded_and_replayed(base, adapters, texts, tmp_path, options):
    result = nsc.merge(base, adapters, texts, **{**FAST, **options})
    assert (result.coefficients - 0.4).abs().max() > 1e-3
    proof = result.save(tmp_path / "out")
    assert proof.weights < 1e-5 and proof.outputs < 1e-4
    again = nsc.apply(tmp_path / "out")
    assert torch.equal(again.coefficients, result.coefficients)
    for name, module in result.stack.modules.items():
        row, start = result.coefficients[result.modules.index(name)].double(), 0
        update = torch.zeros(module.B.shape[0], module.A.shape[1], dtype=torch.float64)
        for k, (rank, scale) in enumerate(zip(module.ranks, module.scales, strict=True)):
            part = slice(start, start + rank)
            weights = row[part] if options.get("granularity") == "rank" else row[k].expand(rank)
            update += scale * module.B[:, part].double() @ weights.diag() @ module.A[part].double()
            start += rank
        for other in (result, again):
            torch.testing.assert_close(other.stack.modules[name].delta(row), update, rtol=0, atol=1e-10)
    again.save(tmp_path / "full", full=True)
    described = json.loads((tmp_path / "out" / "report.json").read_text())
    assert torch.tensor(described["coefficients"]).shape == (len(result.modules), len(ADAPTERS))
    assert described["granularity"] == options.get("granularity", "layer")
    if options.get("granularity") == "task":
        assert (result.coefficients == result.coefficients[0]).all()


def test_the_report_of_rank_rows_shows_means(base, adapters, texts):
    result = nsc.merge(base, adapters, texts, **FAST, granularity="rank")
    module = next(iter(result.stack.modules.values()))
    means = [part.mean() for part in result.coefficients[0][: sum(module.ranks)].split(module.ranks) if len(part)]
    shown = [value for value, rank in zip(result.report.coefficients[0], module.ranks, strict=True) if rank]
    torch.testing.assert_close(torch.tensor(shown), torch.stack(means))
    assert "rank row" in result.report.summary()
    assert all((name.endswith(")") and "v_proj" in name) or "layers.3" in name for name in result.report.untrained)


def test_a_record_with_other_coefficients_than_its_adapters_take_is_refused(base, adapters, texts, tmp_path):
    result = nsc.merge(base, adapters, texts, **FAST, granularity="rank")
    short = replace(result.record, coefficients=result.coefficients[:, :-1])
    (tmp_path / "short").mkdir()
    short.write(tmp_path / "short")
    with pytest.raises(NSCError, match="these adapters take"):
        nsc.apply(tmp_path / "short")


def test_a_task_without_data_is_merged_by_the_others(base, adapters, texts, tmp_path):
    seen = {task: rows for task, rows in texts.items() if task != "rslora"}
    result = nsc.merge(base, adapters, seen, **FAST, unseen=("rslora",))
    same = nsc.merge(base, adapters, texts, **FAST, preferences={"rslora": 0})
    torch.testing.assert_close(result.coefficients, same.coefficients, rtol=0, atol=1e-5)
    k = result.tasks.index("rslora")
    assert 0 < same.report.ratio_before[k] < 1  # it has data, which count for nothing
    assert (result.coefficients[:, k] - 0.4).abs().max() > 1e-3
    assert result.report.unseen == ["rslora"] and "rslora: null-space ratio" not in result.report.summary()
    assert "unseen, merged without data of their own: rslora" in result.report.to_markdown()
    result.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["ratio_after"][k] is None
    assert nsc.apply(tmp_path / "out").record.settings["unseen"] == ["rslora"]


def test_one_sample_a_task_is_enough(base, adapters, texts):
    one = {task: rows[:1] for task, rows in texts.items()}
    result = nsc.merge(base, adapters, one, **FAST, batch_size=2)
    assert (result.coefficients - 0.4).abs().max() > 1e-3
    assert result.report.losses[-1] < result.report.losses[0]


def test_unseen_tasks_must_be_named_and_only_they(base, adapters, texts):
    some = {task: texts[task] for task in ("plain", "double")}
    for unseen, message in (
        ((), "no data for pattern, rslora.*must be named as unseen"),
        (("patern", "rslora"), "no data for pattern"),
        (("pattern", "rslora", "plain"), "unseen names plain"),
    ):
        with pytest.raises(DataError, match=message):
            nsc.merge(base, adapters, some, **FAST, unseen=unseen)
    with pytest.raises(DataError, match="every task is unseen"):
        nsc.merge(base, adapters, {}, **FAST, unseen=tuple(adapters))


def test_a_schedule_is_resumed_with_its_own_steps_only(base, adapters, texts, tmp_path):
    state = tmp_path / "state.pt"

    def run(steps, **options):
        return nsc.merge(base, adapters, texts, lr=0.05, steps=steps, schedule="cosine", progress=False, **options)

    run(2, checkpoint=state)
    with pytest.raises(ResumeError, match="other adapters, data or settings"):
        run(3, checkpoint=state, resume=True)
    resumed = run(2, checkpoint=state, resume=True)
    torch.testing.assert_close(resumed.coefficients, run(2).coefficients)


OTHERS = dict(
    positions="full",
    max_new_tokens=3,
    modality="text",
    granularity="task",
    link="exp",
    preferences={"a": 2.0},
    optimizer="adam",
    schedule="linear",
    objective="both",
    quantile=0.5,
    unseen=("a",),
    weight_decay=0.1,
)


def test_every_option_is_part_of_what_a_checkpoint_must_match():
    usual = _identity("base", {}, {}, [], MergeConfig())
    others = {name: _identity("base", {}, {}, [], MergeConfig(**{name: value})) for name, value in OTHERS.items()}
    assert len({usual, *others.values()}) == len(OTHERS) + 1


def test_settings_come_back_from_plain_values():
    config = MergeConfig(**{k: v for k, v in OTHERS.items() if k != "modality"}, target_blocks="half")
    assert MergeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(link="relu"), "link must be one of identity, softplus"),
        (dict(positions="first"), "positions must be one of prompt, last, full"),
        (dict(target_blocks="third"), "target_blocks must be numbers or one of all, half, quarter, one, not third"),
        (dict(link="sigmoid", start=1.0), "link sigmoid cannot give a coefficient of 1.0"),
        (dict(link="exp", start=0.0), "link exp cannot give a coefficient of 0.0"),
        (dict(link="softmax", granularity="rank"), "softmax runs over tasks"),
        (dict(quantile=1.5), "quantile must be a fraction"),
        (dict(quantile=0.5, objective="entropy"), "quantile applies to null-space ratios"),
        (dict(modality="image", objective="both"), "leave modality at both"),
        (dict(preferences={"a": -1}), "preference for a must be 0 or more"),
        (dict(max_new_tokens=0), "max_new_tokens must be 1 or more"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(NSCError, match=message):
        MergeConfig(**settings)


def test_the_modality_that_a_base_lacks_is_refused(base, adapters, texts):
    with pytest.raises(NSCError, match="modality image leaves nothing of a base that takes text alone"):
        nsc.merge(base, adapters, texts, **FAST, modality="image")


def test_preferences_and_heads_must_fit():
    with pytest.raises(NSCError, match="preferences name c; the tasks are a, b"):
        goal_of(["a", "b"], MergeConfig(preferences={"c": 1}))
    with pytest.raises(NSCError, match="no task with data has a preference above 0"):
        goal_of(["a", "b"], MergeConfig(preferences={"a": 0}, unseen=("b",)))
    with pytest.raises(NSCError, match="belong together"):
        goal_of(["a"], MergeConfig(objective="entropy"))


@pytest.mark.parametrize(("blocks", "first"), [("all", 0), ("half", 2), ("quarter", 3), ("one", 3), ((1, 2), None)])
def test_target_blocks_by_word(merged, blocks, first):
    assert set(LAST_BLOCKS) == {"all", "half", "quarter", "one"}
    found = choose_targets(merged.model, merged.modules, ["v_proj"], blocks)
    wanted = blocks if first is None else range(first, 4)
    assert found == [f"layers.{i}.self_attn.v_proj" for i in wanted]


def test_rows_of_an_entropy():
    """Shared rows, padding, and a sample of which only the middle counts."""
    (batch,) = pack(
        [[5, 6, 7, 8, 9, 10, 11, 12], [8, 9], [9], [5, 6, 7]], [0, 0, 1, 1], 0, causal=True, shares_rows=True
    )
    assert batch.segment is not None
    for rows, take in (("first", 0), ("last", -1)):
        weight = row_weights(batch, rows).view_as(batch.weight)
        for i in range(4):
            places = (batch.segment == i).nonzero()
            assert weight[tuple(places[take])] == 0.5
        assert weight.sum() == 2
    assert row_weights(batch, "counted") is not None
    middle = replace(batch, weight=torch.where(batch.inputs["position_ids"] == 1, batch.weight, 0))
    picked = row_weights(middle, "last").view_as(batch.weight) > 0
    assert torch.equal(picked, (middle.weight > 0)) and picked.sum() == 3


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A ViT with two adapters, each with a head over its classes."""
    folder = tmp_path_factory.mktemp("vision")
    base = save_image_base(folder / "base")
    shapes = linears(loading.load_body(Base(str(base)), device="cpu"))
    names = [name for name, (m, d) in shapes.items() if m == d == 32 and "pooler" not in name]
    adapters, generator = {}, torch.Generator().manual_seed(0)
    for seed, (task, classes) in enumerate((("digits", 10), ("clothes", 4))):
        factors = {n: (a / 6, b / 4) for n, (a, b) in random_factors(names, seed=seed).items()}
        saved = {
            "classifier.weight": torch.randn(classes, 32, generator=generator),
            "classifier.bias": torch.randn(classes, generator=generator),
        }
        adapters[task] = write_adapter(folder / task, factors, saved=saved, target_modules=names)
    images = {task: list(torch.randint(256, (3, 8, 8, 3), dtype=torch.uint8, generator=generator)) for task in adapters}
    return base, adapters, {task: [image.numpy() for image in rows] for task, rows in images.items()}


def test_the_entropy_of_a_classifier_is_that_of_its_class_token(vision):
    base, adapters, images = vision
    targets = dict(target_modules=["o_proj", "attention.output.dense"], target_blocks="all")
    result = nsc.merge(base, adapters, images, objective="entropy", **{**FAST, "lr": 1e-3}, **targets, batch_size=3)
    assert result.report.losses[-1] < result.report.losses[0]
    assert (result.coefficients[-1] - 0.4).abs().max() > 1e-4  # the forward goes on behind the last target
    model = result.model
    start = torch.full_like(result.coefficients, 0.4)
    pixels = pixels_by(loading.load_image_processor(Base(str(base))), torch.float32)
    total = 0.0
    with merged_layers(model, result.stack, start), torch.no_grad():
        for task, rows in images.items():
            inputs = torch.stack([pixels(image) for image in read_images(rows)])
            head = [result.adapters[task].saved[f"classifier.{kind}"] for kind in ("weight", "bias")]
            said = torch.nn.functional.linear(model(pixel_values=inputs)[0][:, 0], *head)
            total += torch.distributions.Categorical(logits=said).entropy().mean().item()
    assert result.report.losses[0] == pytest.approx(total, rel=1e-5)


def test_heads_that_an_entropy_cannot_use_are_refused(vision, adapters, base, texts):
    read = nsc.read_adapter(vision[1]["digits"], "digits")
    deep = {**read.saved, "classifier.dense.weight": torch.zeros(3, 3)}
    with pytest.raises(NSCError, match=r"adapter digits carries classifier.dense.weight, which is no part of ViT"):
        load_task_head(loading.load(Base(str(vision[0]))), deep, "digits")
    with pytest.raises(NSCError, match="double carry a head and pattern, plain, rslora do not"):
        nsc.merge(base, adapters, texts, **FAST, objective="entropy")
    batch = collate_images([torch.zeros(3, 8, 8)] * 2, [0, 0], 5)
    with pytest.raises(NSCError, match="needs a row for each"):
        Entropy([Head(torch.zeros(2, 3))], "first")(torch.zeros(2, 1, 3), batch, torch.ones(1))
    assert entropy(torch.zeros(1, 8)) == pytest.approx(torch.tensor(8.0).log().item())
