"""Reading PEFT checkpoints: scales against PEFT itself, and a refusal for everything that is not plain LoRA."""

import json
import math
import shutil
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from nsc.adapters.lora import read_adapter
from nsc.adapters.peft_folder import TOKENIZER_FILES
from nsc.adapters.unsupported import REFUSED_FIELDS, UNDERSTOOD, unsupported
from nsc.errors import AdapterError, UnsupportedAdapter
from tests.tiny import peft_adapter, random_factors, tiny_llama, write_adapter

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def rewrite(path: Path, change) -> Path:
    """Apply ``change`` to the tensors of an adapter on disk."""
    file = path / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "mnli", random_factors([Q, V]))


def test_factors_are_read_as_stored(tmp_path):
    factors = random_factors([Q, V], r=4)
    half = {name: (A.bfloat16(), B.bfloat16()) for name, (A, B) in factors.items()}
    adapter = read_adapter(write_adapter(tmp_path / "mnli", half, r=4, alpha=8))
    assert (adapter.name, adapter.base, adapter.ranks) == ("mnli", "tiny", {Q: 4, V: 4})
    for name, (A, B) in half.items():
        assert torch.equal(adapter.factors[name].A, A) and torch.equal(adapter.factors[name].B, B)
        assert adapter.factors[name].A.dtype == torch.bfloat16 and adapter.factors[name].scale == 2
    assert len(adapter.sha256) == 64 and adapter.saved == {}


@pytest.mark.parametrize(
    "lora",
    [
        dict(r=4, lora_alpha=4),
        dict(r=4, lora_alpha=8),
        dict(r=4, lora_alpha=8, use_rslora=True),
        dict(r=4, lora_alpha=8, rank_pattern={"q_proj": 2, r".*\.1\.self_attn\.v_proj": 6}),
        dict(r=4, alpha_pattern={"^model.layers.2.self_attn.q_proj": 3, r"layers\.(0|1)\..*": 5}, use_rslora=True),
        dict(r=4, rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 8}, alpha_pattern={"proj": 7, "v_proj": 3}),
        dict(r=4, init_lora_weights="gaussian"),
        pytest.param(
            dict(r=4, init_lora_weights="orthogonal"),
            marks=pytest.mark.skipif(peft.__version__.startswith("0.15"), reason="PEFT 0.15 does not know it yet"),
        ),
    ],
    ids=lambda lora: "-".join(lora),
)
def test_scales_are_those_of_peft(tmp_path, lora):
    model = tiny_llama("AutoModelForCausalLM")
    adapter = read_adapter(peft_adapter(tmp_path / "a", model, target_modules=["q_proj", "v_proj"], **lora))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert adapter.factors.keys() == layers.keys()
    for name, layer in layers.items():
        f = adapter.factors[name]
        assert (f.scale, f.rank) == (pytest.approx(layer.scaling["default"], rel=1e-15), layer.r["default"])
        torch.testing.assert_close(f.scale * f.B @ f.A, layer.get_delta_weight("default"))


def test_every_setting_of_this_peft_is_known():
    known = UNDERSTOOD | REFUSED_FIELDS.keys()
    assert {field.name for field in fields(peft.LoraConfig)} <= known


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("infix", ["", ".default", ".mnli"])
def test_key_forms(tmp_path, prefix, infix):
    A, B = torch.randn(4, 32), torch.randn(32, 4)
    keys = {f"{prefix}{Q}.lora_A{infix}.weight": A, f"{prefix}{Q}.lora_B{infix}.weight": B}
    assert read_adapter(write_adapter(tmp_path / "a", {}, extra=keys)).ranks == {Q: 4}


def test_saved_modules(tmp_path):
    model = tiny_llama("AutoModelForSequenceClassification", num_labels=3)
    adapter = read_adapter(peft_adapter(tmp_path / "a", model, target_modules=["q_proj"], task_type="SEQ_CLS"))
    assert adapter.saved.keys() == {"score.weight"}
    assert torch.equal(adapter.saved["score.weight"], model.score.modules_to_save["default"].weight)


def test_saved_modules_of_raw_state_dicts_and_old_configs(tmp_path):
    weight, old = torch.randn(3, 32), torch.zeros(3, 32)
    extra = {
        "base_model.model.classifier.modules_to_save.default.dense.weight": weight,
        "base_model.model.classifier.original_module.dense.weight": old,
    }
    path = write_adapter(tmp_path / "a", random_factors([Q]), extra=extra, task_type="TOKEN_CLS")
    saved = read_adapter(path).saved
    assert saved.keys() == {"classifier.dense.weight"} and torch.equal(saved["classifier.dense.weight"], weight)


A_KEY, B_KEY = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
FACTORS = {"A": A_KEY, "B": B_KEY}


def set_to(key: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({key: tensor})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(B_KEY), [Q, "no lora_B"]),
        (lambda t: t.pop(A_KEY), [Q, "no lora_A"]),
        (set_to(A_KEY, torch.randn(32)), [A_KEY, "(32,)", "2-D"]),
        (set_to(A_KEY, torch.randn(5, 32)), [Q, "(5, 32)", "(32, 4)"]),
        (set_to(A_KEY, torch.full((4, 32), math.nan)), [A_KEY, "NaN"]),
        (set_to(B_KEY, torch.full((32, 4), math.inf)), [B_KEY, "infinity"]),
        (set_to(A_KEY, torch.ones(4, 32, dtype=torch.int8)), [A_KEY, "int8", "float16"]),
        (set_to(A_KEY, torch.ones(4, 32).to(torch.float8_e4m3fn)), [A_KEY, "float8"]),
        (lambda t: [t[k].zero_() for k in t if "lora_B" in k], ["every module is zero", "trained"]),
        (lambda t: [t.pop(k) for k in list(t)], ["no lora_A / lora_B"]),
        (set_to(f"base_model.model.{Q}.lora_A.other.weight", torch.randn(4, 32)), ["two adapter names"]),
        (lambda t: t.update({A_KEY: torch.randn(6, 32), B_KEY: torch.randn(32, 6)}), [Q, "rank 6", "says 4", "scale"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_broken_tensors(plain, change, said):
    with pytest.raises(AdapterError) as error:
        read_adapter(rewrite(plain, change))
    assert all(text in str(error.value) for text in ["'mnli'", *said])


def test_one_zero_module_is_fine(plain):
    adapter = read_adapter(rewrite(plain, lambda t: t[B_KEY].zero_()))
    assert adapter.factors[Q].is_zero and not adapter.factors[V].is_zero


def test_saved_tensors_must_be_finite(tmp_path):
    saved = {"score.weight": torch.tensor([[math.nan]])}
    with pytest.raises(AdapterError, match=r"score\.weight.*NaN"):
        read_adapter(write_adapter(tmp_path / "a", random_factors([Q]), saved=saved))


@pytest.mark.parametrize(
    "settings",
    [
        dict(rank_pattern={"(": 4}),
        dict(alpha_pattern=["q_proj"]),
        dict(alpha_pattern={"layers.0.*": 4, "q_proj": 8}),
        dict(r=None),
        dict(lora_alpha=None),
        dict(lora_alpha="8"),
    ],
    ids=str,
)
def test_unusable_scale(tmp_path, settings):
    field = next(iter(settings))
    with pytest.raises(AdapterError, match=f"no usable rank and scale|{field} must be a"):
        read_adapter(write_adapter(tmp_path / "a", random_factors([Q]), **settings))


def test_missing_folder_and_files(tmp_path, plain):
    with pytest.raises(AdapterError, match=r"does not exist"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"is a file"):
        read_adapter(plain / "adapter_config.json")
    (plain / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        read_adapter(plain)
    (plain / "adapter_model.bin").touch()
    with pytest.raises(AdapterError, match=r"pickle.*save_pretrained"):
        read_adapter(plain)
    (plain / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        read_adapter(plain)


def test_hub(monkeypatch, plain, tmp_path):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kw: asked.append((repo, kw)) or plain)
    assert read_adapter("someone/lora-mnli").name == "lora-mnli"
    weights = ["adapter_config.json", "adapter_model.safetensors"]
    assert asked == [("someone/lora-mnli", {"allow_patterns": [*weights, *TOKENIZER_FILES]})]

    def offline(repo: str, **kw: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(AdapterError, match=r"someone/lora-mnli.*no local folder.*no network"):
        read_adapter("someone/lora-mnli")


@pytest.mark.parametrize("keep", [4, 100, -10])
def test_truncated_safetensors(plain, keep):
    file = plain / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(AdapterError, match="truncated or corrupt"):
        read_adapter(plain)


def test_a_pointer_of_git_lfs_is_told_from_weights(plain):
    (plain / "adapter_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(AdapterError, match=r"'mnli'.*Git LFS pointer.*git lfs pull"):
        read_adapter(plain)


def test_an_adapter_that_peft_saved_by_a_name_lies_in_a_sub_folder(plain, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(plain, out / "legal")
    assert read_adapter(out, "a").path == out / "legal" and read_adapter(out).factors.keys() == {Q, V}
    shutil.copytree(plain, out / "medical")
    with pytest.raises(AdapterError, match=r"'a'.*several adapters: give the folder of one, of legal, medical"):
        read_adapter(out, "a")


def test_checkpoints_of_a_trainer_are_named_with_the_last(plain, tmp_path):
    for steps in (500, 1000):
        shutil.copytree(plain, tmp_path / f"run/checkpoint-{steps}")
    with pytest.raises(AdapterError, match=r"checkpoints of a Trainer: give one of them, .*run/checkpoint-1000"):
        read_adapter(tmp_path / "run")
    assert read_adapter(tmp_path / "run/checkpoint-500").name == "checkpoint-500"


@pytest.mark.parametrize("text", ["{", "[]", "\xff\xfe"])
def test_invalid_config(plain, text):
    (plain / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match="JSON"):
        read_adapter(plain)


REFUSED_SETTINGS = [
    (dict(peft_type="IA3"), "IA3"),
    (dict(peft_type=None), "peft_type"),
    (dict(use_dora=True), "DoRA"),
    (dict(lora_bias=True), "lora_bias"),
    (dict(bias="all"), "trained bias"),
    (dict(bias="lora_only"), "trained bias"),
    (dict(trainable_token_indices=[1]), "trainable tokens"),
    (dict(alora_invocation_tokens=[1, 2]), "aLoRA"),
    (dict(layer_replication=[[0, 2], [1, 4]]), "layer_replication"),
    (dict(use_qalora=True), "QALoRA"),
    (dict(use_bdlora={"nblocks": 2}), "BD-LoRA"),
    (dict(arrow_config={"top_k": 3}), "Arrow"),
    (dict(kasa_config={"beta": 1e-4}), "KaSA"),
    (dict(velora_config={"num_groups": 64}), "VeLoRA"),
    (dict(monteclora_config={"num_samples": 8}), "MonteCLoRA"),
    (dict(megatron_config={"a": 1}), "megatron"),
    (dict(ensure_weight_tying=True), "tied embeddings"),
    *[
        (dict(init_lora_weights=init), init)
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
    ],
    (dict(init_lora_weights="tomorrow"), "unknown to this version"),
    (dict(use_lora_of_tomorrow=True), "use_lora_of_tomorrow"),
]


@pytest.mark.parametrize(("settings", "feature"), REFUSED_SETTINGS, ids=lambda value: str(value))
def test_refused_settings(tmp_path, settings, feature):
    with pytest.raises(UnsupportedAdapter) as error:
        read_adapter(write_adapter(tmp_path / "mnli", random_factors([Q]), **settings))
    assert feature in str(error.value) and "'mnli'" in str(error.value)


REFUSED_TENSORS = [
    (f"{Q}.lora_magnitude_vector", (32,), "DoRA"),
    (f"{Q}.lora_magnitude_vector.default.weight", (32,), "DoRA"),
    (f"{Q}.lora_B.bias", (32,), "lora_bias"),
    (f"{Q}.lora_B.default.bias", (32,), "lora_bias"),
    (f"{Q}.bias", (32,), "trained bias"),
    (f"{Q}.base_layer.bias", (32,), "trained bias"),
    ("model.embed_tokens.lora_embedding_A", (4, 64), "embedding LoRA"),
    ("model.embed_tokens.token_adapter.trainable_tokens_delta", (2, 32), "trainable tokens"),
    ("model.embed_tokens.weight", (64, 32), "embeddings saved outside modules_to_save"),
    ("model.layers.0.mlp.experts.base_layer.lora_A.weight", (8, 32), "expert"),
    ("model.layers.0.mlp.experts.lora_A.weight", (2, 4, 32), "3-D"),
    ("model.conv.lora_A.weight", (4, 3, 2, 2), "4-D"),
    (f"{Q}.lora_diag", (4,), "KaSA"),
    (f"{Q}.lora_monteclora_sampler.default.std", (4,), "MonteCLoRA"),
    (f"{Q}.lora_down.weight", (4, 32), "unknown kind"),
    ("model.norm.weight", (32,), "unknown kind"),
]


@pytest.mark.parametrize(("key", "shape", "feature"), REFUSED_TENSORS, ids=lambda value: str(value))
def test_refused_tensors(plain, key, shape, feature):
    key = f"base_model.model.{key}"
    with pytest.raises(UnsupportedAdapter) as error:
        read_adapter(rewrite(plain, set_to(key, torch.ones(shape))))
    assert feature in str(error.value) and key in str(error.value)


def test_lora_on_a_saved_module_is_refused(tmp_path):
    saved = {f"{Q}.weight": torch.randn(32, 32)}
    with pytest.raises(UnsupportedAdapter, match=rf"{Q}.*modules_to_save"):
        read_adapter(write_adapter(tmp_path / "a", random_factors([Q]), saved=saved))


def test_all_features_are_listed_at_once(tmp_path):
    config = dict(use_dora=True, bias="all", layer_replication=[[0, 1]])
    path = write_adapter(tmp_path / "a", random_factors([Q]), extra={"strange": torch.ones(1)}, **config)
    with pytest.raises(UnsupportedAdapter) as error:
        read_adapter(path)
    assert all(word in str(error.value) for word in ("DoRA", "trained bias", "layer_replication", "strange"))
    stored = json.loads((path / "adapter_config.json").read_text())
    assert len(unsupported(stored, load_file(path / "adapter_model.safetensors"))) == 4


@pytest.mark.parametrize(
    "lora",
    [dict(use_dora=True), dict(lora_bias=True), dict(bias="lora_only"), dict(init_lora_weights="olora")],
    ids=str,
)
def test_what_peft_itself_saves_is_refused(tmp_path, lora):
    path = peft_adapter(tmp_path / "a", tiny_llama(), target_modules=["q_proj"], **lora)
    with pytest.raises(UnsupportedAdapter):
        read_adapter(path)
