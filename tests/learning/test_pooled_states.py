"""Tasks without an output, matched by pooled states: in float64 the plain loop over PEFT's own models; laws; merges."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import nsc
from nsc.adapters.lora import read_adapters
from nsc.adapters.surgery import merged_layers
from nsc.bases.base_model import Base
from nsc.config import MergeConfig, learned_settings
from nsc.data.modalities import feed_of
from nsc.data.sources import read_data
from nsc.errors import NSCError
from nsc.learning.held_back import hold_back
from nsc.learning.preparation import Problem, distance_from_experts, prepare, stack_on
from nsc.recipes.merged_factors import factors_to_fit
from tests.learning.test_match import CLASSIFIER, SINGLE, START, apart, exact, found
from tests.plain_options import merged_parameters
from tests.tiny import LLAMA, VISION, WORDS, peft_adapter, save_image_base, word_tokenizer

SIZES = dict(num_hidden_layers=2, initializer_range=0.2)
TASKS = {"one": None, "two": None, "classes": 3}  # task -> outputs of its head, if it has one


class Kind(NamedTuple):
    """A kind of body: its config, LoRA layers, class with a head, and how states are pooled."""

    config: Callable[[], Any]
    modules: list[str]
    auto: str
    pool: Callable[[Tensor], Tensor]  # (1, L, d) -> (1, d)


KINDS = {
    "encoder": Kind(
        partial(transformers.BertConfig, **{**VISION, **SIZES, "vocab_size": 64}),
        ["query", "value"],
        CLASSIFIER,
        lambda states: states.mean(1),
    ),
    "causal": Kind(
        partial(transformers.LlamaConfig, **{**LLAMA, **SIZES}),
        ["q_proj", "v_proj"],
        CLASSIFIER,
        lambda states: states[:, -1],
    ),
    "images": Kind(
        partial(transformers.ViTConfig, **{**VISION, **SIZES}),
        ["query", "value", "q_proj", "v_proj"],  # of transformers 4 and 5
        "AutoModelForImageClassification",
        lambda states: states.mean(1),
    ),
}


class Setting(NamedTuple):
    kind: Kind
    base: Path
    adapters: dict[str, Path]
    rows: dict[str, list[Any]]


@pytest.fixture(scope="module", params=KINDS)
def setting(request, tmp_path_factory) -> Setting:
    """Two adapters without a head on a body that has none, and one with a head; eight rows of each."""
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if request.param == "images":
        base = save_image_base(folder / "base", **SIZES)
    else:
        transformers.AutoModel.from_config(kind.config()).save_pretrained(base := folder / "base")
        word_tokenizer().save_pretrained(base)
    made, rows = {}, {}
    for k, (task, labels) in enumerate(TASKS.items()):
        there = [n for n, _ in whole(kind, base, labels).named_modules() if n.rpartition(".")[2] in kind.modules]
        names = sorted({name.rpartition(".")[2] for name in there})
        lora = dict(r=4, lora_alpha=16, target_modules=names, modules_to_save=["score", "classifier"] if labels else [])
        made[task] = peft_adapter(folder / task, whole(kind, base, labels), seed=k, **lora)
        rows[task] = [" ".join(WORDS[(11 * k + 5 * i + j) % 60] for j in range(3 + (3 * i) % 7)) for i in range(8)]
        if request.param == "images":
            generator = torch.Generator().manual_seed(k)
            rows[task] = list(torch.randint(256, (8, 8, 8, 3), dtype=torch.uint8, generator=generator).numpy())
    return Setting(kind, base, made, rows)


def whole(kind: Kind, base: Path, labels: int | None) -> nn.Module:
    if labels is None:
        return transformers.AutoModel.from_pretrained(base).eval()
    torch.manual_seed(labels)
    return getattr(transformers, kind.auto).from_pretrained(base, num_labels=labels).eval()


def inputs(setting: Setting, row: Any) -> dict[str, Tensor]:
    if isinstance(row, str):
        return {"input_ids": torch.tensor([word_tokenizer()(row)["input_ids"]])}
    processor = transformers.AutoImageProcessor.from_pretrained(setting.base)
    return {"pixel_values": processor(images=[row], return_tensors="pt")["pixel_values"].double()}


class Plain:
    """Stock models, one a task; nothing is batched."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.models, self.experts = setting, {}, {}
        for task, labels in TASKS.items():
            load = partial(whole, setting.kind, setting.base, labels)
            expert = peft.PeftModel.from_pretrained(load(), setting.adapters[task])
            self.experts[task] = exact(expert)
            self.models[task] = model = exact(load())
            saved = load_file(setting.adapters[task] / "adapter_model.safetensors")
            inside = {n.removeprefix("base_model.model."): x.double() for n, x in saved.items() if "lora" not in n}
            model.load_state_dict(inside, strict=False)

    def output(self, task: str, said: Any) -> Tensor:
        return said.logits if TASKS[task] else self.setting.kind.pool(said[0])

    def distance(self, task: str, row: Any, weights: dict[str, Tensor]) -> Tensor:
        """() between the expert and a model with these weights of its body."""
        model, given = self.models[task], inputs(self.setting, row)
        prefix = f"{model.base_model_prefix}." if TASKS[task] else ""
        with torch.no_grad():
            e = self.output(task, self.experts[task](**given))
        inside = {f"{prefix}{name}": weight for name, weight in weights.items()}
        y = self.output(task, torch.func.functional_call(model, inside, kwargs=given))
        return apart(y, e) if TASKS[task] else (y - e).square().sum()

    def loss(self, rows: dict[str, list[Any]], weights: dict[str, Tensor]) -> Tensor:
        """Mean over tasks, relative to the bare base."""
        total = torch.zeros((), dtype=torch.float64)
        for task, mine in rows.items():
            with torch.no_grad():
                bare = sum(self.distance(task, row, {}) for row in mine)
            total = total + sum(self.distance(task, row, weights) for row in mine) / bare / len(rows)
        return total


def loaded(setting: Setting, **settings: Any) -> tuple:
    ours = dict(dtype="float64", device="cpu", start=START, batch_size=8, steps=1, stop="last", graphs=False)
    config = MergeConfig(**{**learned_settings("match", settings), "borrow_rows": 0, **ours, **settings})
    read = read_adapters(setting.adapters)
    base, matched = stack_on(Base(str(setting.base)), read, config)
    exact(base.model)
    return base, matched, read_data(setting.rows, read, feed_of(base).read), config


def problem_of(setting: Setting, **settings: Any) -> Problem:
    base, matched, samples, config = loaded(setting, **settings)
    return prepare(base, matched, samples, config, factors_to_fit(matched.stack, config))


@pytest.mark.parametrize("granularity", ["layer", "rank", "factors"])
def test_a_step_is_the_plain_loop_over_peft_models(setting, granularity):
    """All rows are in it; a task with a head is beside those without."""
    problem, plain = problem_of(setting, granularity=granularity), Plain(setting)
    body, stack = plain.models["one"], problem.stack
    weights: dict[str, Tensor] = {}
    if problem.factors is None:
        parts = [torch.full(stack.owned.shape, START, dtype=torch.float64, requires_grad=True)]
        for name, row in zip(stack.names, parts[0], strict=True):
            weights |= merged_parameters(body, name, stack.layer(name), row)
    else:
        parts = [x.double().requires_grad_() for pair in problem.factors.values() for x in pair]
        for name, A, B in zip(problem.factors, parts[::2], parts[1::2], strict=True):
            weights[f"{name}.weight"] = body.get_parameter(f"{name}.weight") + B @ A
    loss = plain.loss(setting.rows, weights)
    gradients = torch.autograd.grad(loss, parts)
    expected = gradients[0] if problem.factors is None else torch.cat([g.flatten() for g in gradients])
    got = found(problem)
    torch.testing.assert_close(got[0], loss.detach(), **SINGLE)
    torch.testing.assert_close(got[1], expected, **SINGLE)
    assert 0.05 < loss < 2 and expected.abs().max() > 1e-3


def test_the_bare_base_is_1_and_an_expert_alone_is_0(setting):
    base, matched, samples, config = loaded(setting)
    distance = distance_from_experts(base, matched.adapters, matched.stack, samples, config)
    assert distance.agreement.by_states(matched.stack.tasks) == ["one", "two"]
    assert distance.distances(base.model) == pytest.approx([1.0] * 3, rel=0, abs=1e-12)
    for k in range(3):
        alone = torch.eye(3, dtype=torch.float64)[k].expand(len(matched.stack.names), 3)
        with merged_layers(base.model, matched.stack, alone):
            apart = distance.distances(base.model)
        assert abs(apart[k]) < 1e-12 and min(d for j, d in enumerate(apart) if j != k) > 0.1


@pytest.mark.parametrize("granularity", ["rank", "factors"])
def test_merged_told_and_replayed(setting, tmp_path, granularity):
    said = "without an output, compared by pooled last hidden states: one, two"
    settings = dict(method="match", granularity=granularity, steps=20, borrow_rows=0, progress=False)
    result = nsc.merge(setting.base, setting.adapters, setting.rows, **settings)
    report = result.report
    assert report.by_states == ["one", "two"] and said in report.summary() and said in report.to_markdown()
    assert report.losses[-1] < 0.9 * report.losses[0]
    result.save(tmp_path / "out")
    again = nsc.apply(tmp_path / "out")
    for name in result.modules:
        one, other = result.merged.update(name), again.merged.update(name)
        torch.testing.assert_close(one.B @ one.A, other.B @ other.A, rtol=0, atol=1e-6)


def test_a_scale_and_a_method_are_chosen_by_them(setting):
    settings = dict(progress=False, scales=(0.2, 1.0))
    result = nsc.merge(
        setting.base, setting.adapters, setting.rows, method="task-arithmetic", search="match", **settings
    )
    assert result.report.by_states == ["one", "two"] and "pooled last hidden states" in result.report.summary()
    curve = result.report.searched["curve"]
    assert curve[result.recipe.scale] == min(curve.values()) < 1
    chosen = nsc.merge(setting.base, setting.adapters, setting.rows, method="auto", steps=4, progress=False)
    assert chosen.report.by_states == ["one", "two"]
    assert all(entry["distance"] > 0 for entry in chosen.report.tried.values())


def test_all_tasks_have_an_output(base, adapters, texts):
    one = {"plain": adapters["plain"]}, {"plain": texts["plain"]}
    result = nsc.merge(base, *one, method="match", steps=1, progress=False)
    assert result.report.by_states == [] and "pooled" not in result.report.summary()


def test_an_output_that_is_not_followed_is_no_missing_one(setting, monkeypatch):
    """Nor are answers that are asked for by name."""

    def capped(base):
        raise NSCError("base changes its logits (final_logit_softcapping), which nsc does not follow")

    merge = partial(
        nsc.merge,
        setting.base,
        setting.adapters,
        setting.rows,
        method="match",
        steps=1,
        borrow_rows=0,
        progress=False,
    )
    if "pixel_values" not in inputs(setting, setting.rows["one"][0]):
        with pytest.raises(NSCError, match="adapter one carries no head that is followed, and the base's own cannot"):
            merge(positions="full")
    monkeypatch.setattr("nsc.learning.teachers.load_generating_head", capped)
    with pytest.raises(NSCError, match=r"cannot be matched .*softcapping.*merge by nsc, or name this task as unseen"):
        merge()


def test_an_infinite_state_is_named(setting, monkeypatch):
    monkeypatch.setattr(
        "nsc.bases.task_head._States.forward",
        lambda self, x: x.mean(1).fill_(float("-inf")) if x.ndim == 3 else x - torch.inf,
    )
    learned = hold_back(setting.rows, 0)[0]["one"]
    row = 1 + next(i for i, row in enumerate(setting.rows["one"]) if row is learned[0])  # as the user counts them
    settings = dict(method="match", steps=1, batch_size=len(learned), borrow_rows=0, progress=False)
    with pytest.raises(nsc.NSCError, match=f"the expert of task one says NaN or infinity about row {row} of its data"):
        nsc.merge(setting.base, setting.adapters, setting.rows, **settings)
