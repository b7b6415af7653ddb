"""The official implementation's numbers on a tiny LLaMA, a tiny ViT and a tiny LLaVA. See the manifest."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nsc.adapters.lora import read_adapter
from nsc.adapters.matching import body_of
from nsc.adapters.modules_to_save import dense_stacks, split_saved
from nsc.adapters.stack import stack_adapters, whitened
from nsc.adapters.surgery import merged_layers
from nsc.bases.base_model import Base
from nsc.bases.image_tower import ImageTower
from nsc.bases.llava import places
from nsc.bases.loading import load_body
from nsc.bases.module_names import resolve
from nsc.bases.roles import choose_targets
from nsc.bases.structure import linear_shapes
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.data.images import collate_images, tokens_seen
from nsc.learning.assembly import initial_gradient
from nsc.learning.loop import learn
from nsc.learning.objective import NullSpaceObjective

GOLDEN = Path(__file__).parents[1] / "golden/nsc"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())

# case, which numbers, whether padding counts (the official code averages over it)
FORMS = [
    ("llama_r4", "official", True),
    ("llama_r4", "ref64", True),
    ("llama_r4_pad", "official", True),
    ("llama_r4_pad", "ref64", True),
    ("llama_r4_pad", "ref64masked", False),
    ("vit_r4_o", "official", False),
    ("vit_r4_o", "ref64", False),
    ("llava_r4", "official", True),
    ("llava_r4", "ref64", True),
]
OLD = transformers.__version__.startswith("4.")


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> Path:
    """The models, LLaVA's as transformers 4 wants its image tower's names."""
    if not OLD:
        return GOLDEN
    folder = tmp_path_factory.mktemp("golden")
    for name in {case["model"] for case in MANIFEST["cases"].values()}:
        shutil.copytree(GOLDEN / name, folder / name)
    change = lambda tensors: {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in tensors.items()}  # noqa: E731
    file = folder / "llava_tiny/model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


@pytest.fixture(params=FORMS, ids=lambda form: f"{form[0]}-{form[1]}")
def golden(request, bases):
    name, source, padding_counts = request.param
    case = MANIFEST["cases"][name]
    dtype = torch.float32 if source == "official" else torch.float64
    expected = np.load(GOLDEN / case["expected"])
    values = {key: np.nan_to_num(expected[f"{source}_{key}"]) for key in ("ratio", "loss", "grad", "lam")}
    base = str(bases / case["model"])
    model = load_body(Base(base), dtype="float32").to(dtype)
    adapters = {Path(path).name: read_adapter(GOLDEN / path) for path in case["adapters"]}
    shapes = linear_shapes(model)
    matches = {task: resolve(task, adapter.factors, shapes) for task, adapter in adapters.items()}
    _, whole = split_saved(adapters, matches, body_of(Base(base, model)), [])
    stack = stack_adapters(adapters, matches, shapes, dense_stacks(Base(base), whole))
    # the manifest names modules as transformers 5 does
    here = resolve("golden", case["modules"], shapes)
    case = case | {key: [here[name] for name in case[key]] for key in ("modules", "targets", "untrained_modules")}
    data = np.load(GOLDEN / case["inputs"])
    if "pixel_values_0" in data and "input_ids_0" in data:
        batch = read_prompts(data, len(adapters), model, dtype)
    elif "pixel_values_0" in data:
        batch = read_images(data, len(adapters), model, case["targets"], dtype)
    else:
        batch = read_tokens(data, len(adapters), padding_counts, dtype)
    return case, values, model, stack, batch


def read_images(data, tasks: int, model: torch.nn.Module, targets: list[str], dtype: torch.dtype) -> Batch:
    """All tasks' images in one batch."""
    pixels = [torch.from_numpy(data[f"pixel_values_{k}"]).to(dtype) for k in range(tasks)]
    whose = [k for k, images in enumerate(pixels) for _ in images]
    return collate_images(list(torch.cat(pixels)), whose, tokens_seen(model, targets, pixels[0][0]))


def read_prompts(data, tasks: int, model: torch.nn.Module, dtype: torch.dtype) -> Batch:
    """All tasks' prompts in one right-padded batch, their images as features of the frozen tower."""
    batch = read_tokens(data, tasks, True, dtype)
    pixels = torch.cat([torch.from_numpy(data[f"pixel_values_{k}"]) for k in range(tasks)]).to(dtype)
    features = ImageTower(model).features(pixels)[:, 1:]
    place = places(batch.inputs["input_ids"] == model.image_token)
    return replace(batch, inputs={**batch.inputs, "features": features[:, None], "place": place})


def read_tokens(data, tasks: int, padding_counts: bool, dtype: torch.dtype) -> Batch:
    """All tasks' sequences in one right-padded batch; only a task's own positions can have weight."""
    shapes = [data[f"input_ids_{k}"].shape for k in range(tasks)]
    rows, length = sum(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    ids, mask, task = (torch.zeros(rows, length, dtype=torch.int64) for _ in range(3))
    weight = torch.zeros(rows, length, dtype=dtype)
    start = 0
    for k, (count, own) in enumerate(shapes):
        here = slice(start, start := start + count)
        ids[here, :own] = torch.from_numpy(data[f"input_ids_{k}"])
        mask[here, :own] = torch.from_numpy(data[f"attention_mask_{k}"])
        task[here] = k
        counted = torch.ones(count, own) if padding_counts else mask[here, :own]
        weight[here, :own] = counted / counted.sum()
    return Batch({"input_ids": ids, "attention_mask": mask}, task, weight)


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    """The manifest's. In float64, by its note, HF's RMSNorm stays in float32 and costs 1e-7 in the ratio."""
    suggested = MANIFEST["suggested_tolerances"]
    if dtype == torch.float32:
        return suggested["float32"]
    return suggested["float64_vs_ref64"] | {"ratio": 1e-7, "loss": 1e-7, "lam_after_1": 2e-7}


@pytest.mark.parametrize("prepare", [whitened, lambda stack: stack], ids=["whitened", "gram"])
def test_ratio_loss_and_gradient_at_the_first_step(golden, prepare):
    case, expected, model, stack, batch = golden
    tolerance = tolerances(batch.weight.dtype)
    assert list(stack.tasks) == case["tasks"] and stack.names == case["modules"]
    kinds = {name.rsplit(".", 1)[-1] for name in case["targets"]}
    targets = choose_targets(model, stack.names, sorted(kinds))
    assert targets == case["targets"]
    lam = torch.full((len(stack.names), len(stack.tasks)), MANIFEST["optimiser"]["lam0"], dtype=batch.weight.dtype)
    loss, gradient = initial_gradient(model, prepare(stack), targets, batch, lam)
    with merged_layers(model, prepare(stack), lam) as layers:
        ratios = NullSpaceObjective(model, layers, prepare(stack), targets).ratios(batch)
    assert ratios.numpy() == pytest.approx(expected["ratio"][0], abs=tolerance["ratio"])
    assert loss.item() == pytest.approx(expected["loss"][0], abs=tolerance["loss"])
    assert gradient.numpy() == pytest.approx(expected["grad"][0], abs=tolerance["grad_abs"])


@pytest.mark.parametrize("prepare", [whitened, lambda stack: stack], ids=["whitened", "gram"])
def test_coefficients_after_1_and_20_steps(golden, prepare):
    case, expected, model, stack, batch = golden
    tolerance, optimiser = tolerances(batch.weight.dtype), MANIFEST["optimiser"]
    for steps in (1, 20):
        config = MergeConfig(steps=steps, lr=optimiser["lr"], weight_decay=optimiser["weight_decay"])
        learned = learn(model, prepare(stack), case["targets"], lambda step: [batch], config, progress=False)
        bound = tolerance[f"lam_after_{steps}"]
        assert learned.coefficients.numpy() == pytest.approx(expected["lam"][steps - 1], abs=bound)
        assert learned.losses == pytest.approx(list(expected["loss"][:steps]), abs=tolerance["loss"])
    untrained = [name for name, frozen in zip(stack.names, learned.frozen, strict=True) if frozen.all()]
    assert untrained == case["untrained_modules"]
    assert (learned.coefficients[learned.frozen] == optimiser["lam0"]).all()
