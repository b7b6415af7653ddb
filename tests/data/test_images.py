"""Unlabeled images in, seeded batches out; ViT adapters merged from folder to proof, by the command line too."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import nsc
from nsc.bases.base_model import Base
from nsc.bases.loading import load_body, load_image_processor
from nsc.cli import app
from nsc.data.images import Image, ImageBatches, collate_images, pixels_by, read_images, tokens_seen
from nsc.data.modalities import feed_of
from nsc.errors import DataError, NSCError, TargetError
from tests.tiny import linears, random_factors, save_image_base, tiny_vit, write_adapter

SIZES = [(20, 30), (8, 8), (33, 9), (16, 16), (12, 40)]


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8))


def encoded(image: PIL.Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def same(images: list[Image], pictures: list[PIL.Image.Image]) -> bool:
    pairs = zip(images, pictures, strict=True)
    return all(np.array_equal(np.asarray(a.decode()), np.asarray(b.convert("RGB"))) for a, b in pairs)


@pytest.fixture
def pictures() -> list[PIL.Image.Image]:
    return [picture(i, size) for i, size in enumerate(SIZES)]


@pytest.fixture
def folder(tmp_path, pictures) -> Path:
    """Three PNGs and a JPEG, some in a folder below, in the order of their names; and a file that is no image."""
    (tmp_path / "b").mkdir()
    for name, image in zip(("a.png", "b/0.PNG", "b/1.png"), pictures, strict=False):
        image.save(tmp_path / name)
    pictures[3].save(tmp_path / "c.jpeg")
    (tmp_path / "labels.csv").write_text("a,b\n")
    return tmp_path


def test_a_folder(folder, pictures):
    images = read_images(folder)
    assert [Path(image.name).relative_to(folder).as_posix() for image in images] == [
        "a.png",
        "b/0.PNG",
        "b/1.png",
        "c.jpeg",
    ]
    assert same(images[:3], pictures[:3]) and images[3].decode().size == (16, 16)
    assert read_images(str(folder)) == images and len(set(images)) == 4


def test_images_of_every_mode_come_as_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        picture(0).convert(mode).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    assert {image.decode().mode for image in read_images(tmp_path)} == {"RGB"}


def test_images_given_in_python(pictures):
    arrays = [np.asarray(image) for image in pictures]
    forms = [
        pictures,
        arrays,
        [torch.from_numpy(a.copy()).movedim(-1, 0) for a in arrays],
        [encoded(p) for p in pictures],
    ]
    assert all(same(read_images(form), pictures) for form in forms)
    assert read_images(pictures) == read_images(arrays) and len(set(read_images(pictures))) == len(pictures)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.rand(3, 8, 8), r"image 2 is torch.float32 \(3, 8, 8\); give uint8"),
        (np.zeros((8, 8), np.uint8), r"image 2 is torch.uint8 \(8, 8\)"),
        (None, "image 2 is a NoneType, not an image"),
        ("a.png", "image 2 is a str, not an image"),
        (b"no image", "image 2 cannot be read"),
        (Path("nowhere.png"), "image 2 cannot be read .*nowhere.png"),
    ],
    ids=["float", "grey array", "None", "str", "bytes", "missing"],
)
def test_what_is_no_image_is_named(value, said):
    with pytest.raises(DataError, match=said):
        read_images([picture(0), value])


def parquet(path: Path, **columns) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.table(columns), path)
    return path


def test_parquet_as_hub_datasets_store_it(tmp_path, pictures):
    rows = [{"bytes": encoded(image), "path": f"{i}.png"} for i, image in enumerate(pictures)]
    file = parquet(tmp_path / "a.parquet", label=list(range(5)), image=rows)
    assert same(read_images(file), pictures) and read_images(file)[2].name == f"{file} row 3"
    plain = parquet(tmp_path / "b.parquet", img=[encoded(image) for image in pictures], label=[0] * 5)
    assert read_images(plain) == read_images(file)
    named = parquet(tmp_path / "c.parquet", front=rows[:1], image=rows[1:2])
    assert same(read_images(f"{named}#front"), pictures[:1])
    with pytest.raises(DataError, match=r"has the columns front, image, not one of images; name it as in FILE#column"):
        read_images(f"{named}#back")


def test_unreadable_parquet_is_named(tmp_path):
    bad = [encoded(picture(0)), encoded(picture(1))[:-30]]
    with pytest.raises(DataError, match=r"a\.parquet row 2 cannot be read"):
        read_images(parquet(tmp_path / "a.parquet", image=bad))
    with pytest.raises(DataError, match=r"b\.parquet row 1 is a NoneType"):
        read_images(parquet(tmp_path / "b.parquet", image=[None, bad[0]]))
    with pytest.raises(DataError, match=r"c\.parquet has the columns label"):
        read_images(parquet(tmp_path / "c.parquet", label=[1]))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"d\.parquet cannot be read"):
        read_images(tmp_path / "d.parquet")


def test_hub(monkeypatch, pictures):
    datasets = pytest.importorskip("datasets")
    for column in (pictures, [{"bytes": encoded(image), "path": None} for image in pictures]):
        rows = datasets.Dataset.from_dict({"label": [0] * 5, "img": column})
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, rows=rows, **kwargs: rows)
        images = read_images("hub:user/set::test")
        assert same(images, pictures) and images[0].name == "hub:user/set::test row 1"


def test_missing_empty_and_foreign_sources(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist; .* from a folder"):
        read_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no image"):
        read_images(tmp_path)
    with pytest.raises(DataError, match="the given list holds no image"):
        read_images([])
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl is neither a folder nor \.parquet"):
        read_images(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("module", "extra"), [("PIL.Image", "PIL"), ("pyarrow.parquet", "pyarrow")])
def test_a_missing_extra_is_named(tmp_path, folder, monkeypatch, module, extra):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"this source needs {extra}: pip install 'nsc-merging\[images\]'"):
        read_images(tmp_path / "a.parquet" if extra == "pyarrow" else folder)


def test_damaged_files_are_named(folder):
    whole = (folder / "b/1.png").read_bytes()
    for damage in (whole[:-20], whole[:60] + b"??" + whole[62:], b"", b"text"):
        (folder / "b/1.png").write_bytes(damage)
        with pytest.raises(DataError, match=r"b/1\.png cannot be read .*mend or remove it"):
            read_images(folder)
    (folder / "b/1.png").write_bytes(whole)
    short = folder / "c.jpeg"
    short.write_bytes(short.read_bytes()[:-100])  # a JPEG does not tell its length: found when it is decoded
    with pytest.raises(DataError, match=r"c\.jpeg cannot be read"):
        read_images(folder)[3].decode()


def numbered(task: int, count: int) -> list[Image]:
    return [Image(f"{task}/{i}", None, f"{task}/{i}") for i in range(count)]


def batches(**options) -> ImageBatches:
    """The pixels of image i of task k are all 10 k + i."""

    def pixels(image: Image) -> torch.Tensor:
        task, i = map(int, image.name.split("/"))
        return torch.full((3, 2, 2), 10.0 * task + i)

    images = {"a": numbered(0, 5), "b": numbered(1, 3)}
    return ImageBatches(images, pixels, **({"tokens": 5, "batch_size": 2} | options))


def drawn(batches: ImageBatches, step: int) -> list[float]:
    (batch,) = batches(step)
    return batch.inputs["pixel_values"][:, 0, 0, 0].tolist()


def test_batches_are_a_function_of_seed_and_step():
    backwards = [drawn(batches(), step) for step in reversed(range(15))]
    assert [drawn(batches(), step) for step in range(15)] == backwards[::-1]
    assert [drawn(batches(seed=1), step) for step in range(15)] != backwards[::-1]
    seen = sorted(x for step in range(15) for x in drawn(batches(), step))
    assert seen == sorted([0.0, 1, 2, 3, 4] * 6 + [10.0, 11, 12] * 10)


def test_a_batch_of_images_and_its_weights():
    batch = collate_images([torch.zeros(3, 4, 4)] * 3, [0, 0, 2], tokens=5)
    assert batch.inputs["pixel_values"].shape == (3, 3, 4, 4) and batch.tokens == 15
    assert batch.task.tolist() == [[0] * 5, [0] * 5, [2] * 5]
    torch.testing.assert_close(batch.weight, torch.tensor([[0.1] * 5, [0.1] * 5, [0.2] * 5]))
    parts = batch.within(10)
    assert [part.inputs["pixel_values"].shape[0] for part in parts] == [2, 1]
    with pytest.raises(DataError, match="differ in size"):
        collate_images([torch.zeros(3, 4, 4), torch.zeros(3, 4, 8)], [0, 1], tokens=5)


BODIES = {
    "ViT": (lambda t: t.ViTConfig, {}, 5),
    "CLIP": (lambda t: t.CLIPVisionConfig, {}, 5),
    "SigLIP, no class token": (lambda t: t.SiglipVisionConfig, {}, 4),
    "DINOv2": (lambda t: t.Dinov2Config, {}, 5),
    "DINOv2, registers": (lambda t: t.Dinov2WithRegistersConfig, {"num_register_tokens": 3}, 8),
}


def body(make, more) -> torch.nn.Module:
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4)
    config = make(transformers)(
        **small, **({} if "Dino" in str(make(transformers)) else {"intermediate_size": 48}), **more
    )
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config).eval()


def in_blocks(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in linears(model).items() if any(part.isdigit() for part in name.split("."))}


@pytest.mark.parametrize(("make", "more", "tokens"), BODIES.values(), ids=list(BODIES))
def test_tokens_are_counted_in_the_model(make, more, tokens):
    model = body(make, more)
    assert tokens_seen(model, list(in_blocks(model)), torch.zeros(3, 8, 8)) == tokens
    assert model.main_input_name == "pixel_values"


@pytest.mark.parametrize(("make", "more", "tokens"), BODIES.values(), ids=list(BODIES))
def test_every_kind_of_body_from_images_to_proof(make, more, tokens, photos, tmp_path):
    model = body(make, more)
    model.save_pretrained(tmp_path / "base")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")
    adapters = {}
    for seed, task in enumerate(photos):
        factors = {n: random_factors([n], d=d, m=m, seed=seed)[n] for n, (m, d) in in_blocks(model).items()}
        adapters[task] = write_adapter(tmp_path / task, factors, alpha=0.2, target_modules=sorted(factors))
    result = nsc.merge(tmp_path / "base", adapters, photos, steps=2, lr=0.02, progress=False)
    assert (result.coefficients != 0.4).any() and result.batch.task.shape == (4, tokens)
    assert result.save(tmp_path / "out").outputs < 1e-4
    assert result.save(tmp_path / "full", full=True).outputs < 1e-4


def test_a_target_that_sees_other_tokens_is_refused():
    model = tiny_vit()
    pooler = next(name for name in linears(model) if "pooler" in name)
    with pytest.raises(TargetError, match="must see the same tokens"):
        tokens_seen(model, [next(iter(linears(model))), pooler], torch.zeros(3, 8, 8))


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return save_image_base(tmp_path_factory.mktemp("vit") / "base")


@pytest.fixture(scope="module")
def vit_adapters(tmp_path_factory) -> dict[str, Path]:
    """Of two ranks, trained in a classifier, on the attention's linears."""
    square = [name for name, shape in linears(tiny_vit()).items() if shape == (32, 32) and "pooler" not in name]
    made = {}
    for seed, (task, rank) in enumerate((("cars", 4), ("birds", 2))):
        factors = {f"vit.{name}": random_factors([name], r=rank, seed=9 * seed)[name] for name in square}
        path = tmp_path_factory.mktemp("adapters") / task
        made[task] = write_adapter(path, factors, r=rank, alpha=0.2, target_modules=sorted(factors))
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for k, task in enumerate(("cars", "birds")):
        folders[task] = tmp_path_factory.mktemp(task)
        for i, size in enumerate(SIZES):
            picture(10 * k + i, size).save(folders[task] / f"{i}.png")
    return folders


def test_the_command_line_merges_vit_adapters_from_folders(vit, vit_adapters, photos, tmp_path):
    words = ["merge", "--base", str(vit), "--steps", "5", "--lr", "0.02", "--out", str(tmp_path / "out")]
    for task in vit_adapters:
        words += ["--adapter", f"{task}={vit_adapters[task]}", "--data", f"{task}={photos[task]}"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert "proof: adapter: 12 modules reloaded" in done.stdout and "hidden states to" in done.stdout
    assert "5 unlabeled samples" in done.stderr and "one sample a row" in done.stderr
    learned = load_file(tmp_path / "out/coefficients.safetensors")["coefficients"]
    same = nsc.merge(vit, vit_adapters, photos, steps=5, lr=0.02, progress=False)
    assert torch.equal(same.coefficients, learned) and (learned - 0.4).abs().max() > 0.05
    assert json.loads((tmp_path / "out/report.json").read_text())["ratio_after"]

    again = CliRunner().invoke(app, ["apply", str(tmp_path / "out"), "--out", str(tmp_path / "full"), "--full"])
    assert again.exit_code == 0 and "full model" in again.stdout, again.stderr


def test_passes_and_forms_of_the_same_images_find_the_same(vit, vit_adapters, photos):
    settings = dict(steps=5, lr=0.02, dtype="float64", progress=False)
    expected = nsc.merge(vit, vit_adapters, photos, **settings).coefficients
    listed = {task: [PIL.Image.open(file) for file in sorted(folder.iterdir())] for task, folder in photos.items()}
    for data, more in ((listed, {}), (photos, {"tokens_per_pass": 5}), (photos, {"layers": "weights"})):
        found = nsc.merge(vit, vit_adapters, data, **settings, **more).coefficients
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_other_images_are_another_merge(vit, vit_adapters, photos, tmp_path):
    checkpoint = tmp_path / "state.pt"
    options = dict(checkpoint=checkpoint, progress=False)
    nsc.merge(vit, vit_adapters, photos, steps=2, **options)
    done = nsc.merge(vit, vit_adapters, photos, steps=3, resume=True, **options)
    assert torch.equal(done.coefficients, nsc.merge(vit, vit_adapters, photos, steps=3, progress=False).coefficients)
    changed = Path(shutil.copytree(photos["cars"], tmp_path / "cars"))
    picture(99).save(changed / "4.png")
    with pytest.raises(NSCError, match="made with other adapters, data or settings"):
        nsc.merge(vit, vit_adapters, photos | {"cars": changed}, steps=3, resume=True, **options)


def test_pixels_are_the_processors_own_in_the_bases_dtype(vit):
    processor = load_image_processor(Base(str(vit)))
    (image,) = read_images([picture(0)])
    expected = processor(images=picture(0), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels_by(processor, torch.float32)(image), expected) and expected.shape == (3, 8, 8)
    assert pixels_by(processor, torch.bfloat16)(image).dtype == torch.bfloat16
    assert load_body(Base(str(vit)), "bfloat16")(pixels_by(processor, torch.bfloat16)(image)[None])[0].shape == (
        1,
        5,
        32,
    )


def test_a_base_without_an_image_processor(vit, vit_adapters, photos, tmp_path):
    bare = Path(shutil.copytree(vit, tmp_path / "base"))
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(NSCError, match=r"has no image processor .*preprocessor_config\.json"):
        nsc.merge(bare, vit_adapters, photos, progress=False)


def test_what_a_base_takes_is_read_from_its_config(vit, base, tmp_path):
    assert Base(str(vit)).takes == "pixel_values" and Base(str(base)).takes == "input_ids"
    transformers.WhisperConfig().save_pretrained(tmp_path / "audio")
    with pytest.raises(NSCError, match="takes input_features; nsc feeds bodies that take input_ids or pixel_values"):
        feed_of(Base(str(tmp_path / "audio")))
    with pytest.raises(NSCError, match="cannot be loaded"):
        _ = Base(str(tmp_path / "nowhere")).takes
