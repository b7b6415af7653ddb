"""A tower that runs once a sample: the store is exact and stays within its budget, the stand-in changes no bit."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from nsc.bases.image_tower import ImageTower, find_tower
from nsc.data.feature_store import FeatureStore
from nsc.errors import NSCError
from tests.tiny import LLAMA, tiny_llama, tiny_llava, tiny_vit

IMAGE_TOKEN, PATCHES = 60, 4
KINDS = ["AutoModelForImageTextToText"] + ["AutoModel"] * (int(transformers.__version__.split(".")[0]) > 4)
LAYERS = {"one layer": {}, "two layers": {"vision_feature_layer": [-2, 1]}, "the last": {"vision_feature_layer": -1}}


def llava(kind: str, **config) -> nn.Module:
    index = {"image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN}
    return tiny_llava(kind, **({"initializer_range": 0.2} | index | config)).requires_grad_(False)


def rows(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids with one image's places in each row, and the images."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE_TOKEN, (count, 12), generator=generator)
    ids[:, 2 : 2 + PATCHES] = IMAGE_TOKEN
    return {"input_ids": ids, "pixel_values": torch.randn(count, 3, 8, 8, generator=generator)}


class Counted:
    """The features of numbered images by a tower, and how often each was asked for."""

    def __init__(self, tower: ImageTower, images: torch.Tensor) -> None:
        self.tower, self.images, self.runs = tower, images, Counter()

    def __call__(self, sample: int) -> torch.Tensor:
        self.runs[sample] += 1
        return self.tower.features(self.images[sample][None])[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", LAYERS.values(), ids=list(LAYERS))
def test_the_stand_in_changes_no_bit(kind, dtype, config):
    model = llava(kind, **config).to(dtype)
    tower = ImageTower(model)
    inputs = rows(3)
    pixels = inputs["pixel_values"].to(dtype)
    features = tower.features(pixels)
    assert features.shape == (3, PATCHES + 1, 32 * (2 if config.get("vision_feature_layer") == [-2, 1] else 1))
    with torch.no_grad():
        expected = model(input_ids=inputs["input_ids"], pixel_values=pixels)[0]
        with tower.replaced():
            found = model(input_ids=inputs["input_ids"], pixel_values=features)[0]
            other = model(input_ids=inputs["input_ids"], pixel_values=features.flip(0))[0]
    assert torch.equal(found, expected) and not torch.equal(other, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tower_runs_under_the_stand_in_and_it_comes_back(kind):
    model = llava(kind)
    name = find_tower(model)
    assert name.rsplit(".", 1)[-1] == "vision_tower"
    stock, tower, inputs, ran = model.get_submodule(name), ImageTower(model), rows(1), []
    features = tower.features(inputs["pixel_values"])
    hook = stock.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(RuntimeError, match="on purpose"), tower.replaced():
        model(**inputs | {"pixel_values": features})
        assert not ran and all("vision_tower" not in name for name, _ in model.named_parameters())
        raise RuntimeError("on purpose")
    hook.remove()
    assert model.get_submodule(name) is stock


def test_a_gradient_reaches_the_projector_through_the_features():
    model = llava(KINDS[-1])
    tower, inputs = ImageTower(model), rows(2)
    features = tower.features(inputs["pixel_values"])
    weights = [p for name, p in model.named_parameters() if "multi_modal_projector.linear_1.weight" in name]
    weights[0].requires_grad_()

    def gradient(pixels: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(model(**inputs | {"pixel_values": pixels})[0].square().sum(), weights)[0]

    expected = gradient(inputs["pixel_values"])
    with tower.replaced():
        assert torch.equal(gradient(features), expected) and expected.abs().max() > 0


@pytest.mark.parametrize("make", [tiny_llama, tiny_vit], ids=["text", "image"])
def test_a_model_without_a_tower_is_refused(make):
    with pytest.raises(NSCError, match="has no image tower"):
        ImageTower(make())


def test_tiles_are_refused():
    text, vision = transformers.LlamaConfig(**LLAMA), dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    vision = transformers.CLIPVisionConfig(**vision, intermediate_size=48, image_size=8, patch_size=4)
    config = transformers.LlavaNextConfig(text_config=text, vision_config=vision)
    with pytest.raises(NSCError, match="tiles"):
        ImageTower(transformers.AutoModelForImageTextToText.from_config(config))


@pytest.mark.parametrize("kept", [0, 2, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tower_runs_once_a_sample_and_the_rest_is_on_disk(kept, dtype):
    """Five images over three epochs, in other orders; the budget holds ``kept`` of them."""
    tower = ImageTower(llava(KINDS[-1]).to(dtype))
    images = rows(5)["pixel_values"].to(dtype)
    expected = [tower.features(image[None])[0] for image in images]
    size = expected[0].nbytes
    compute = Counted(tower, images)
    with FeatureStore(compute, budget=kept * size + size // 2) as store:
        for epoch in range(3):
            for i in torch.randperm(5, generator=torch.Generator().manual_seed(epoch)).tolist():
                features = store(i)
                assert torch.equal(features, expected[i]) and features.dtype == dtype and features.device.type == "cpu"
                assert store.in_memory <= store.budget
        assert compute.runs == dict.fromkeys(range(5), 1) and store.in_memory == min(kept, 5) * size
        folder = Path(store._folder.name) if store._folder else None
        assert len(list(folder.iterdir()) if folder else []) == max(0, 5 - kept)
    assert folder is None or not folder.exists()


def test_the_folder_goes_with_the_store_and_after_an_error():
    store = FeatureStore(lambda i: torch.full((3,), float(i)), budget=0)
    store(1)
    folder = Path(store._folder.name)
    assert folder.exists()
    del store
    assert not folder.exists()
    with pytest.raises(RuntimeError), FeatureStore(lambda i: torch.ones(2), budget=0) as store:
        store(1)
        folder = Path(store._folder.name)
        raise RuntimeError
    assert not folder.exists()


def test_hidden_states_from_the_store_are_those_of_the_tower():
    """Sample by sample the same bits; in a batch, where the tower may round otherwise, the same numbers."""
    model, inputs = llava(KINDS[-1]).double(), rows(4)
    pixels, tower = inputs["pixel_values"].double(), ImageTower(model)
    with torch.no_grad(), FeatureStore(lambda i: tower.features(pixels[i : i + 1])[0], budget=0) as store:
        whole = model(input_ids=inputs["input_ids"], pixel_values=pixels)[0]
        alone = [model(input_ids=inputs["input_ids"][i : i + 1], pixel_values=pixels[i : i + 1])[0] for i in range(4)]
        with tower.replaced():
            for i in range(4):
                mine = {"input_ids": inputs["input_ids"][i : i + 1], "pixel_values": store(i)[None]}
                assert torch.equal(model(**mine)[0], alone[i])
            together = model(input_ids=inputs["input_ids"], pixel_values=torch.stack([store(i) for i in range(4)]))[0]
    torch.testing.assert_close(together, whole, rtol=0, atol=1e-6)  # RMSNorm computes in float32
