"""What programs that serve an adapter take of it: written so, or refused by name; and the command that serves it."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import nsc
from nsc.bases.base_model import Base
from nsc.cli import app
from nsc.errors import NSCError
from nsc.export.programs import PROGRAMS, Place, commands
from nsc.export.served import read_programs, served_prefix
from tests.tiny import (
    llava_prefixes,
    peft_adapter,
    random_factors,
    save_image_base,
    tiny_llama,
    tiny_vit,
    write_adapter,
)

ALL = tuple(PROGRAMS)
LAYERS = [f"model.layers.{i}.self_attn.{kind}" for i in range(4) for kind in ("q_proj", "v_proj")]


def factors(names=LAYERS, r=4):
    return {name: random_factors([name], r=r, m=16 if "v_proj" in name else 32)[name] for name in names}


def merge(base, *adapters, **settings) -> nsc.MergeResult:
    named = {f"t{i}": adapter for i, adapter in enumerate(adapters)}
    return nsc.merge(base, named, method="task-arithmetic", progress=False, **settings)


def run(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def text_adapter(tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("text") / "a", factors())


def test_an_adapter_is_named_for_the_wrapper_that_serves_it(llava, tmp_path):
    """vLLM builds the class of the base's config, and passes over names of another without a word."""
    text, _ = llava_prefixes()
    names = [name.replace("model.layers", "language_model.layers") for name in LAYERS]
    adapter = write_adapter(tmp_path / "a", factors(names), target_modules=names)
    merge(llava, adapter).save(tmp_path / "bare")
    assert all("model.language" not in key[16:] for key in load_file(tmp_path / "bare/adapter_model.safetensors"))
    merge(llava, adapter).save(tmp_path / "out", programs=["vllm", "llama.cpp"])
    keys = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "out/adapter_model.safetensors")}
    assert keys == {f"{n.replace('model.layers', text)}.lora_{side}.weight" for n in LAYERS for side in "AB"}
    model = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(llava), tmp_path / "out")
    moved = [m for _, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(moved) == len(LAYERS) and all(m.lora_B["default"].weight.any() for m in moved)
    nsc.apply(tmp_path / "out").save(tmp_path / "again")
    assert load_file(tmp_path / "again/adapter_model.safetensors").keys() == {f"base_model.model.{key}" for key in keys}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], LAYERS], ids=["kinds", "names"])
def test_an_adapter_of_the_language_model_by_itself_is_named_for_its_wrapper(llava, tmp_path, targets):
    """Under the wrapper its own names are a silent no-op: vLLM and PEFT find no such layers."""
    adapter = write_adapter(tmp_path / "a", factors(), target_modules=targets)
    merge(llava, adapter).save(tmp_path / "out", programs=["vllm"])
    keys = load_file(tmp_path / "out/adapter_model.safetensors").keys()
    text, _ = llava_prefixes()
    assert {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in keys} == {
        name.replace("model.layers", text) for name in LAYERS
    }
    if targets is not LAYERS:
        short = write_adapter(tmp_path / "short", factors(LAYERS[2:]), target_modules=targets)
        with pytest.raises(NSCError, match=r"targets 'language_model\.layers\.0.*has no factors for it"):
            merge(llava, short)


def test_layers_beside_the_language_model_are_refused(llava, llava_adapters, tmp_path):
    body = Base(str(llava)).model
    towers = [name for name, _ in body.named_modules() if re.search(r"vision_tower.*self_attn\.q_proj$", name)]
    for program in ("vllm", "sglang", "llama.cpp"):
        with pytest.raises(NSCError, match=r"takes LoRA on the language model of Llava.* alone, and vision_tower"):
            served_prefix([program], Base(str(llava)), towers, "")
    assert served_prefix(["peft"], Base(str(llava)), towers, "own.") == "own."
    with pytest.raises(NSCError, match=r"vLLM .* takes no .*projector.* from modules_to_save: write the"):
        merge(llava, llava_adapters["count"]).save(tmp_path / "projector", programs=["vllm"])
    assert not (tmp_path / "projector").exists()


@pytest.mark.parametrize("program", ALL)
def test_what_is_written_for_a_program_has_the_prefix_and_one_rank(base, tmp_path, program):
    """An adapter of the bare body gets the names of the causal model, but for PEFT, which asks which class it is."""
    body = peft_adapter(tmp_path / "a", tiny_llama(), r=4, target_modules=["q_proj", "v_proj"])
    wide = peft_adapter(tmp_path / "b", tiny_llama(), r=2, target_modules=["q_proj", "v_proj", "o_proj"])
    merge(base, body, wide).save(tmp_path / "out", programs=[program])
    keys = load_file(tmp_path / "out/adapter_model.safetensors").keys()
    start = "base_model.model.layers" if program == "peft" else "base_model.model.model.layers"
    assert all(key.startswith(start) for key in keys)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["rank_pattern"] == {}


def test_all_that_a_program_cannot_take_is_refused_by_name(base, text_adapter, tmp_path):
    layer = ["model.layers.0.self_attn.v_proj"]
    wide = write_adapter(tmp_path / "wide", factors(layer, r=600), r=600, target_modules=layer)
    whole = merge(base, wide)
    with pytest.raises(NSCError, match=r"vLLM 0\.32 takes ranks to 512, and this adapter has 600: write it by --rank"):
        whole.save(tmp_path / "out", programs=["vllm"])
    whole.save(tmp_path / "smaller", programs=["vllm"], rank=16)
    with pytest.raises(NSCError, match=r"SGLang .* takes LoRA on v_proj only beside LoRA on q_proj, which mod"):
        whole.save(tmp_path / "out", programs=["sglang"])
    plain = merge(base, text_adapter)
    for program in ("sglang", "llama.cpp"):
        with pytest.raises(NSCError, match="reads one rank and one alpha for all modules: leave out --ragged"):
            plain.save(tmp_path / "out", programs=[program], ragged=True)
    with pytest.raises(NSCError, match=r"vLLM 0\.32 takes ranks to 512, not 600: give a smaller --rank"):
        plain.save(tmp_path / "out", programs=["vllm"], rank=600)
    with pytest.raises(NSCError, match=r"--for ollama: nsc knows what peft, vllm, sglang, llama\.cpp take"):
        plain.save(tmp_path / "out", programs=["ollama"])
    assert not (tmp_path / "out").exists()
    plain.save(tmp_path / "out", programs=ALL, full=True)


def test_images_are_refused_where_language_is_served(tmp_path):
    base = save_image_base(tmp_path / "vit")
    adapter = peft_adapter(tmp_path / "a", tiny_vit(), r=4, target_modules=["q_proj", "query"])
    with pytest.raises(NSCError, match=r"llama\.cpp .* takes LoRA on language models, and .* of images alone"):
        merge(base, adapter).save(tmp_path / "out", programs=["llama.cpp"])
    merge(base, adapter).save(tmp_path / "out", programs=["peft"])


def test_a_class_that_nobody_has_is_named(base, text_adapter, tmp_path):
    other = tmp_path / "base"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["OwnForCausalLM"]}))
    with pytest.raises(NSCError, match=r"names in architectures, OwnForCausalLM, which transformers does not have"):
        merge(other, text_adapter).save(tmp_path / "out", programs=["vllm"])


def test_the_commands(tmp_path, base):
    (tmp_path / "my model").mkdir()
    adapter = Place(tmp_path / "out", str(tmp_path / "my model"), 22)
    told = commands(ALL, adapter)
    assert (
        f"vllm serve '{tmp_path}/my model' --enable-lora --lora-modules out={tmp_path}/out --max-lora-rank 32" in told
    )
    assert f"--enable-lora --lora-paths out={tmp_path}/out --max-lora-rank 22" in told
    assert f"convert_lora_to_gguf.py --base '{tmp_path}/my model' --outfile out.gguf {tmp_path}/out" in told
    assert "FROM ./BASE.gguf\nADAPTER ./out.gguf" in told and "PeftModel.from_pretrained(" in told
    assert "--base-model-id org/model" in commands(["llama.cpp"], Place(tmp_path / "out", "org/model", 8))
    model = commands(ALL, Place(tmp_path / "out"))
    assert f"vllm serve {tmp_path}/out\n" in model and "convert_hf_to_gguf.py --outfile out.gguf" in model
    assert read_programs(["vllm,peft", "vllm"]) == ("vllm", "peft")


def test_the_command_line_writes_for_programs_and_says_what_serves_it(base, text_adapter, tmp_path):
    flags = ["--base", base, "--adapter", f"a={text_adapter}", "--method", "task-arithmetic"]
    made = run("merge", *flags, "--out", tmp_path / "out", "--for", "vllm", "--for", "sglang")
    assert made.exit_code == 0, made.output
    assert f"vllm serve {base} --enable-lora --lora-modules out={tmp_path / 'out'} --max-lora-rank 8" in made.stdout
    again = run("apply", tmp_path / "out", "--out", tmp_path / "again", "--for", "llama.cpp")
    assert again.exit_code == 0 and f"convert_lora_to_gguf.py --base {base}" in again.stdout
    early = run("merge", *flags, "--out", tmp_path / "x", "--for", "sglang", "--ragged")
    assert early.exit_code == 1 and "leave out --ragged" in early.stderr and not list(tmp_path.glob("x*"))


STRANGERS = {
    "rank_pattern": (dict(rank_pattern={"v_proj": 4}), {"sglang", "llama.cpp"}, "one rank and one alpha"),
    "rslora": (dict(use_rslora=True), {"sglang", "llama.cpp"}, r"alpha / sqrt\(r\)"),
    "dora": (dict(use_dora=True), {"vllm", "sglang", "llama.cpp"}, "use_dora is set"),
    "head": (dict(modules_to_save=["score"]), {"sglang", "llama.cpp"}, "no score from modules_to_save"),
    "embeddings": (dict(modules_to_save=["lm_head"]), {"vllm", "sglang", "llama.cpp"}, "no lm_head from"),
    "plain": ({}, set(), ""),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_what_is_said_of_a_strangers_adapter(tmp_path, case):
    config, refusing, said = STRANGERS[case]
    saved = {f"{name}.weight": torch.ones(3, 32) for name in config.get("modules_to_save", ())}
    adapter = write_adapter(tmp_path / "a", factors(), saved=saved or None, **config)
    for program in ALL:
        told = run("inspect", adapter, "--for", program)
        assert (told.exit_code == 1) == (program in refusing), told.output
        if program in refusing:
            assert re.search(said, told.stderr) and PROGRAMS[program].title in told.stderr
    rows = json.loads(run("inspect", adapter, "--json", "--for", ",".join(ALL)).stdout)
    assert {name for name, row in rows[0]["for"].items() if row["problems"]} == refusing
