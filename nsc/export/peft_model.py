"""What stock PEFT makes of a written adapter: its layers, factors and updates, on a class of transformers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from nsc.adapters.target_parameters import INNER, unpacked
from nsc.bases.base_model import Base
from nsc.bases.experts import FusedExperts, layer_of
from nsc.bases.structure import replace_module
from nsc.bases.wrappers import wrapper_of
from nsc.errors import ProofError
from nsc.export.expected_merge import Merge


def factors_by_peft(layers: Mapping[str, LoraLayer]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return the factors of every layer as PEFT loaded them.

    Args:
        layers: name in the body -> PEFT's layer.

    Returns:
        Name as ``read_adapter`` has it -> A, B and scale.
    """
    found = {}
    for name, layer in layers.items():
        A, B = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
        holder, scale = name.replace(INNER, ""), layer.scaling["default"]
        parameter = getattr(layer, "parameter_name", "weight")
        if parameter == "weight" and getattr(layer, "num_experts", 1) == 1:
            found[holder] = A, B, scale
            continue
        for expert, (a, b) in enumerate(unpacked(A, B, layer.r["default"])):
            found[layer_of(f"{holder}.{parameter}", expert)] = a, b, scale
    return found


def layers_of(name: str, layer: LoraLayer, fused: Mapping[str, FusedExperts]) -> list[str]:
    """Return the layers that one of PEFT's carries.

    Args:
        name: its name in the body.
        layer: PEFT's layer.
        fused: parameter -> experts of the base.

    Returns:
        Itself, or all experts of the parameter that it wraps.
    """
    parameter = f"{name.replace(INNER, '')}.{getattr(layer, 'parameter_name', '')}"
    experts = fused.get(parameter)
    return [layer_of(parameter, e) for e in range(experts.count)] if experts else [name.replace(INNER, "")]


def updates_of(
    layers: Mapping[str, LoraLayer], held: Mapping[str, list[str]], fused: Mapping[str, FusedExperts]
) -> Iterator[tuple[str, Tensor]]:
    """Compute every update as PEFT does.

    Args:
        layers: name in the body -> PEFT's layer.
        held: the same name -> what ``layers_of`` finds it to carry.
        fused: parameter -> experts of the base.

    Yields:
        Name of a layer, and its update (out, in).
    """
    for name, layer in layers.items():
        update = _delta(layer)
        experts = fused.get(held[name][0].rpartition("[")[0])
        parts = [update] if experts is None else (update.mT if experts.transposed else update).unbind(0)
        yield from zip(held[name], parts, strict=True)


def _delta(layer: LoraLayer) -> Tensor:
    """(m, d), also of a layer that stores its weight transposed."""
    delta = layer.get_delta_weight("default")
    return delta.T if layer.fan_in_fan_out else delta


@contextmanager
def loaded_by_peft(folder: Path, merge: Merge, base: Base) -> Iterator[tuple[dict[str, LoraLayer], dict[str, Tensor]]]:
    """Load an adapter by stock PEFT, and leave the base as it was afterwards.

    It is put on a class of transformers whose layers have the merge's prefix, around the body itself where that is
    loaded.

    Args:
        folder: folder the adapter was written to.
        merge: what should be there.
        base: its weights need not be loaded.

    Yields:
        PEFT's own LoRA layers, and the parameters it put in whole, by name in the body.

    Raises:
        ProofError: if no class of transformers has layers of these names.
    """
    prefix, body = merge.prefix, base.loaded
    known = dict(base.model.named_modules())
    originals = {name: known[name] for name in merge.merged.whole if name in known}
    behind = set(merge.merged.whole) - originals.keys()  # such as lm_head
    shell = _shell(merge, base, behind)
    config = PeftConfig.from_pretrained(folder)
    config.task_type = None  # PEFT's class for a task asks more of a model than that it has these layers
    peft_model = PeftModel.from_pretrained(shell, folder, config=config, torch_device="cpu")
    layers = {name: module for name, module in shell.named_modules() if isinstance(module, LoraLayer)}
    saved = {name: m for name, m in shell.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    active = {name: m.modules_to_save[m.active_adapter] for name, m in saved.items()}
    whole = {f"{name}.{key}": x for name, m in active.items() for key, x in m.named_parameters()}
    try:
        yield (
            {name.removeprefix(prefix): m for name, m in layers.items()},
            {name.removeprefix(prefix): x for name, x in whole.items()},
        )
    finally:
        peft_model.unload()
        for name, original in originals.items():  # PEFT leaves its own there
            replace_module(base.model, name, original)
        for name in behind if shell is body else ():
            delattr(shell, name)


def _shell(merge: Merge, base: Base, behind: Collection[str]) -> Any:
    """The body itself where nothing stands before its names, else a class of transformers around it.

    Without weights, it has parameters of one zero each, since PEFT puts adapters where their layers are. Layers that
    are loaded whole are copied into, so they get memory of their own.
    """
    prefix, body = merge.prefix, base.loaded
    if body is not None and not prefix:
        for name in behind:
            m, d = merge.whole[f"{name}.weight"].shape
            body.add_module(name, nn.Linear(d, m, bias=f"{name}.bias" in merge.whole))
        return body
    inside = [name for name in merge.names if name not in behind]
    shell = wrapper_of(base, prefix, inside, behind)
    if shell is None:
        raise ProofError(
            f"the merged adapter names its layers '{prefix}{inside[0]}', as no class of transformers for"
            f" {base.config.model_type} does: it fits no model"
        )
    whole = {name if name in behind else prefix + name for name in merge.merged.whole}
    for name, parameter in list(shell.named_parameters()):
        home, _, last = name.rpartition(".")
        zeros = torch.zeros(parameter.shape) if home in whole else torch.zeros(()).expand(parameter.shape)
        setattr(shell.get_submodule(home), last, nn.Parameter(zeros, requires_grad=False))
    if body is not None:
        replace_module(shell, prefix.rstrip("."), body)
    return shell
