"""Python code that a base brings is never run, nor asked about: one sentence says so and names the remedy."""

import json
import shutil
from pathlib import Path

import pytest

import nsc
from nsc.bases.base_model import Base
from nsc.bases.loading import load_body, load_image_processor, load_processor, load_tokenizer
from nsc.errors import NSCError
from tests.tiny import random_factors, write_adapter


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    """Whoever asks for consent, gets it."""
    monkeypatch.setattr("builtins.input", lambda *args: "yes")


def bring(folder: Path, file: str, key: str, ran: Path, **fields) -> Path:
    """Let a file of a base ask for a class in code beside it, which leaves a mark when it runs."""
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own:\n    pass\n")
    path = folder / file
    told = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(told | {"auto_map": {key: "own.Own"}} | fields))
    return folder


UNKNOWN = dict(model_type="own_model", architectures=["Own"])
PLACES = {
    "config": ("config.json", "AutoConfig", UNKNOWN, lambda base: base.config),
    "body": ("config.json", "AutoConfig", UNKNOWN, load_body),
    "tokenizer": ("tokenizer_config.json", "AutoTokenizer", {"tokenizer_class": "Own"}, load_tokenizer),
    "image processor": (
        "preprocessor_config.json",
        "AutoImageProcessor",
        {"image_processor_type": "Own"},
        load_image_processor,
    ),
    "processor": ("processor_config.json", "AutoProcessor", {"processor_class": "Own"}, load_processor),
}


@pytest.mark.parametrize("place", PLACES)
def test_code_of_a_base_is_refused(tmp_path, base, place):
    file, key, fields, use = PLACES[place]
    value = ["own.Own", None] if place == "tokenizer" else "own.Own"
    source = bring(shutil.copytree(base, tmp_path / "base"), file, key, tmp_path / "ran", **fields)
    told = json.loads((source / file).read_text())
    (source / file).write_text(json.dumps(told | {"auto_map": {key: value}}))
    with pytest.raises(NSCError, match=r"Python code of its own \(auto_map\), which nsc never runs: give a base"):
        use(Base(str(source)))
    assert not (tmp_path / "ran").exists()


def test_a_base_whose_class_transformers_has_is_merged_without_its_code(tmp_path, base):
    source = bring(shutil.copytree(base, tmp_path / "base"), "config.json", "AutoModel", tmp_path / "ran")
    q = "model.layers.3.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "a", random_factors([q]), target_modules=[q])
    nsc.merge(source, {"a": adapter}, method="task-arithmetic", progress=False).save(tmp_path / "out", full=True)
    assert not (tmp_path / "ran").exists()
