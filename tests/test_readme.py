"""The README's recipes, as they are typed, in a folder where small models lie under the names of the real ones."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from nsc.cli import app
from nsc.config import PRESETS
from tests.test_docs import snippets
from tests.tiny import LLAMA, WORDS, linears, peft_adapter, save_base, save_image_base, tiny_llama, tiny_vit

README = (Path(__file__).parent.parent / "README.md").read_text()


def recipe(title: str) -> tuple[list[str], str]:
    """The words of the command and the Python of one section."""
    section = re.search(rf"^### {title}\n(.*?)^##", README, flags=re.DOTALL | re.MULTILINE)[1]
    command = re.search(r"```\n(nsc merge .*?)```", section, flags=re.DOTALL)[1]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return shlex.split(command.replace("\\\n", " "))[1:], code


def follow(title: str) -> dict:
    """What the recipe's Python leaves, after its command has run and its preset was taken."""
    words, code = recipe(title)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert "hidden states to" in done.stdout and done.stdout.endswith("written to merged\n")
    record = yaml.safe_load(Path("merged/merge.yaml").read_text())
    assert PRESETS[title.lower()].items() <= record["settings"].items()
    learned = load_file("merged/coefficients.safetensors")["coefficients"]
    assert 0.01 < (learned - 0.4).abs().max() <= record["settings"]["max_drift"] + 1e-6
    names: dict = {}
    exec(code, names)
    assert len(list(Path("merged").glob("heads/*"))) in (0, 2)
    return names | {"record": record, "learned": learned}


def added(model, name: str) -> torch.Tensor:
    """What PEFT adds to a linear's weight."""
    return model.get_base_model().get_submodule(name).get_delta_weight("default").detach().double()


def expected(folder: str, name: str, learned: torch.Tensor, row: int, tasks: list[str]) -> torch.Tensor:
    """sum_k lam_k s_k B_k A_k from the tasks' own files."""
    total = 0
    for k, task in enumerate(tasks):
        stored = load_file(f"{folder}/{task}/adapter_model.safetensors")
        config = json.loads(Path(f"{folder}/{task}/adapter_config.json").read_text())
        A, B = (stored[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        total = total + learned[row, k].double() * config["lora_alpha"] / config["r"] * B @ A
    return total


def require_added(found: dict, prefix: str, tasks: list[str]) -> None:
    """Every module carries the learned sum, under the name that it has in the model of the recipe."""
    from safetensors import safe_open

    with safe_open("merged/coefficients.safetensors", framework="pt") as file:
        modules = list(json.loads(file.metadata()["modules"]))
    for row, module in enumerate(modules):
        update = expected("adapters", prefix + module, found["learned"], row, tasks)
        torch.testing.assert_close(added(found["model"], prefix + module), update, rtol=1e-4, atol=1e-6)


def test_vit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_image_base(Path("google/vit-base-patch16-224"))
    for seed, (task, labels) in enumerate((("cars", 5), ("birds", 3))):
        model = tiny_vit("AutoModelForImageClassification", initializer_range=0.2, num_labels=labels)
        square = [n for n, s in linears(model).items() if s == (32, 32)]
        lora = dict(r=4, lora_alpha=2, target_modules=square, modules_to_save=["classifier"])
        peft_adapter(Path("adapters") / task, model, seed=seed, **lora)
        Path("photos", task).mkdir(parents=True)
        for i in range(6):
            noise = np.random.default_rng([seed, i]).integers(256, size=(12, 10, 3), dtype=np.uint8)
            PIL.Image.fromarray(noise).save(f"photos/{task}/{i}.png")
    found = follow("ViT")
    require_added(found, "vit.", ["cars", "birds"])
    assert [name.rsplit(".", 1)[-1] for name in found["record"]["targets"]] in (["o_proj"], ["dense"])
    head = found["model"].get_base_model().classifier
    assert torch.equal(head.weight, load_file("adapters/cars/adapter_model.safetensors")[
        "base_model.model.classifier.weight"
    ])  # fmt: skip
    assert found["model"](pixel_values=torch.randn(1, 3, 8, 8)).logits.shape == (1, 5)


@pytest.mark.slow
def test_llama(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base(Path("meta-llama/Llama-3.2-1B"))
    for seed, task in enumerate(("mnli", "rte")):
        model = tiny_llama("AutoModelForCausalLM")
        peft_adapter(Path("adapters") / task, model, seed=seed, r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
        rows = [{"text": " ".join(WORDS[(5 * seed + 3 * i + j) % 60] for j in range(4 + i))} for i in range(5)]
        Path(f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = follow("LLaMA")
    require_added(found, "model.", ["mnli", "rte"])
    assert found["record"]["targets"] == [f"layers.{LLAMA['num_hidden_layers'] - 1}.self_attn.v_proj"]


@pytest.mark.slow
def test_the_merge_to_try_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base(Path("meta-llama/Llama-3.2-1B"))
    for seed, task in enumerate(("mnli", "rte")):
        model = tiny_llama("AutoModelForCausalLM", initializer_range=0.2)
        peft_adapter(Path("adapters") / task, model, seed=seed, r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        rows = [{"text": " ".join(WORDS[(5 * seed + 3 * i + j) % 60] for j in range(3))} for i in range(16)]
        Path(f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words, code = recipe("The merge to try first")
    done = CliRunner().invoke(app, [*words, "--set", "max_new_tokens=2", "--steps", "40", "--lr", "0.03"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.endswith("written to merged\n")
    report = json.loads(Path("merged/report.json").read_text())
    assert report["method"] == "match" and sum(report["losses"][-9:]) < sum(report["losses"][:9])
    exec(code, names := {})
    assert names["model"].peft_config["default"].r == 8


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("nsc.data.image_text") is None, reason="nsc feeds no images with text here"
)
def test_llava(tmp_path, monkeypatch):
    from tests.tiny import save_llava_base

    monkeypatch.chdir(tmp_path)
    base = save_llava_base(Path("llava-hf/llava-1.5-7b-hf"))
    for seed, task in enumerate(("count", "color")):
        model = transformers.AutoModelForImageTextToText.from_pretrained(base)
        text = [n for n in linears(model) if "language_model" in n and n.endswith(("q_proj", "v_proj"))]
        peft_adapter(Path("adapters") / task, model, seed=seed, r=4, lora_alpha=4, target_modules=text)
        Path("photos").mkdir(exist_ok=True)
        rows = []
        for i in range(5):
            noise = np.random.default_rng([seed, i]).integers(256, size=(12, 10, 3), dtype=np.uint8)
            PIL.Image.fromarray(noise).save(f"photos/{task}{i}.png")
            rows.append({"image": f"photos/{task}{i}.png", "question": " ".join(WORDS[seed + i : seed + i + 4])})
        Path(f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = follow("LLaVA")
    prefix = "" if transformers.__version__.startswith("4.50") else "model."
    require_added(found, prefix, ["count", "color"])


@pytest.mark.slow
def test_the_python_of_the_readme(tmp_path, monkeypatch):
    (block,) = [code for code in snippets("README.md") if "nsc.merge(" in code]
    monkeypatch.chdir(tmp_path)
    save_base(Path("base"))
    for seed, task in enumerate(("mnli", "rte")):
        lora = dict(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"])
        peft_adapter(Path("path/to") / task, tiny_llama("AutoModelForCausalLM"), seed=seed, **lora)
        Path(f"{task}.jsonl").write_text(json.dumps({"text": " ".join(WORDS[:9])}) + "\n")
    exec(block, names := {})
    assert names["result"].coefficients.shape == (8, 2) and Path("merged/adapter_model.safetensors").exists()
