"""The pieces of examples/vision.py at a tiny scale, on random pictures."""

import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import compare
import pictures
import shares
import train_vision
import vision

from nsc.bases.base_model import Base
from nsc.bases.loading import load_image_processor

BODY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
MERGE = {"steps": 2, "lr": 0.05, "batch_size": 2, "target_modules": vision.MEASURED}


def random_images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sources() -> dict[str, vision.Source]:
    def part(count: int, seed: int) -> tuple[pictures.Pictures, ...]:
        images, kinds = random_images(count, seed), torch.arange(count) % 4
        contours = torch.rand(count, 32, 32, generator=torch.Generator().manual_seed(seed))
        return tuple(pictures.Pictures(images, labels) for labels in (kinds, kinds, contours))

    return dict(zip(("objects", "signs", "photos"), zip(part(24, 0), part(12, 1), strict=True), strict=True))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def trained(work, sources):
    return vision.train(work, sources, 2, 3, **BODY)


@pytest.fixture(scope="module")
def scorer(trained, sources) -> compare.Scorer:
    result = vision.merge(*trained, sources, **MERGE)
    return compare.Scorer(result, result.model, vision.exams_of(trained[1], sources))


def test_base_prepares_pixels_as_training_did_and_orders_patches_as_the_targets(trained):
    image = random_images(1)
    processor = load_image_processor(Base(str(trained[0])))
    prepared = processor(images=[image[0]], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(prepared, train_vision.pixels(image), rtol=0, atol=1e-6)
    projection = train_vision.load(trained[0]).embeddings.patch_embeddings.projection.double()
    convolved = projection(prepared.double()).flatten(2).mT
    by_hand = pictures.patches(prepared.double()) @ projection.weight.flatten(1).T + projection.bias
    torch.testing.assert_close(by_hand, convolved, rtol=0, atol=1e-10)


def test_what_is_trained_is_kept_apart_and_not_trained_again(trained, work, sources):
    _, adapters = trained
    assert list(adapters) == list(pictures.TASKS)
    seen = [load_file(folder / "adapter_model.safetensors") for folder in adapters.values()]
    assert all(not any("head" in key for key in tensors) and len(tensors) == 2 * 4 * 4 for tensors in seen)
    first, second = (next(v for k, v in tensors.items() if "lora_A" in k) for tensors in seen[:2])
    assert (first - second).abs().max() > 0.01  # each task has a row space of its own
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*.safetensors")}
    assert len(before) == 1 + 2 * len(adapters)
    vision.train(work, sources, 2, 3, **BODY)
    assert {file: file.stat().st_mtime_ns for file in work.rglob("*.safetensors")} == before


def test_merge_is_compared_and_its_export_scores_the_same(scorer, trained, work):
    result, exams = scorer.result, scorer.exams
    assert len(result.modules) == 16 and result.report.steps == 2
    assert all(name.endswith(vision.MEASURED) for name in result.report.targets)
    table, merged = compare.compare(scorer, vision.SCALES)
    assert "heads alone" in table and all(name in table for name in exams)
    result.save(work / "merged")
    exported = vision.scores_of_export(trained[0], work / "merged", exams)
    assert exported == pytest.approx(merged, abs=1e-4)
    one_hot = torch.eye(len(exams))[5].expand_as(result.coefficients)
    alone = vision.scores_of_export(trained[0], trained[1]["colour"], exams)["colour"]
    assert scorer.score(one_hot)["colour"] == pytest.approx(alone, abs=1e-4)
    assert scorer.alone("colour") == pytest.approx(alone, abs=1e-4)


def test_tasks_ask_what_they_say():
    plain = pictures.Pictures(random_images(4))
    fill = pictures.fill(plain)
    kept = (pictures.patches(fill.inputs.float()) == pictures.patches(plain.images.float())).all(-1)
    assert 0 < kept.sum() < 32 and (pictures.patches(fill.inputs)[~kept] == 128).all()
    whole = pictures.patches(plain.images.float()).mean(-1)
    torch.testing.assert_close(fill.targets.mean(-1), whole)  # four quarters, in the order of the patches
    colour = pictures.colour(plain)
    assert (colour.inputs[:, 0] == colour.inputs[:, 2]).all() and colour.targets.shape == (4, 16, 2)
    assert pictures.colour(pictures.Pictures(colour.inputs)).targets.abs().max() < 1e-4
    stripes = (torch.arange(32) // 4 % 2 * 255).to(torch.uint8).expand(1, 3, 32, 32)
    directions = [pictures.orientation(pictures.Pictures(x)).targets[0].argmax().item() for x in (stripes, stripes.mT)]
    assert directions == [0, pictures.BINS // 2]
    labelled = pictures.Pictures(stripes, torch.arange(32.0).expand(1, 32, 32))
    across = pictures.edges(labelled).targets[0, 4:8]  # the second row of patches
    assert across.tolist() == [[8 * i + 1.5, 8 * i + 5.5] * 2 for i in range(4)]
    unlabelled = pictures.edges(pictures.Pictures(stripes)).targets
    assert unlabelled[0, 0].tolist() == [255 / 4, 255 / 2] * 2  # seen from both sides of a stripe, but for the border


def test_tiles_and_contours_of_a_parquet_file_stay_together(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {"split": ["train", "val", "test"], "image": [], "boundary": []}
    for seed in range(3):
        grey = random_images(2, seed)[:, 0].flatten(0, 1)[:40]
        wide = torch.cat([grey, grey.flip(0)], dim=1)[None].expand(3, 40, 64)
        rows["image"].append(png(wide.movedim(0, -1)))
        rows["boundary"].append(png(wide[0]))
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    train, test = pictures.read(str(tmp_path / "a.parquet"))
    assert train.images.shape == (4, 3, 32, 32) and test.images.shape == (2, 3, 32, 32)
    for part in (train, test):
        torch.testing.assert_close(part.images[:, 1] / 255, part.labels)
    assert len({image.numpy().tobytes() for image in train.images}) == 4


def png(pixels: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG")
    return file.getvalue()


def test_scores_and_their_shares():
    true = torch.tensor([[0.0, 1], [1, 1], [2, 1]])
    assert train_vision.pearson(3 * true + 1, true) == pytest.approx(0.5)  # a constant output counts nothing
    assert train_vision.pearson(-true[:, :1], true[:, :1]) == pytest.approx(-1)
    alone, half = {"a": 0.8, "b": 0.5}, {"a": 0.4, "b": 0.5}
    assert shares.mean_share(half, alone) == pytest.approx(0.75)
    assert "0.400 (50.0%)" in shares.format_table(alone, {"NSC": half}, {"a": "accuracy", "b": "pearson"})
