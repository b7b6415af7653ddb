"""What bytes and FLOPs allow a whole step, of nsc and of the per-task loop, from the shapes of a case alone.

nsc: the work that ``nsc.costs`` counts: base, attention, adapters, ratios. The loop: the same base once for each task,
the layers of PEFT and the ratio kernel by kernel as eager torch runs them, and the image tower in every step. In
neither: norms, activations and sums between the linears, launches, the host, what a rate falls short of on real shapes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import predict
from models import LLAMA3_70B, QV, RANK, Case
from predict import BF16, Gpu
from shapes import Shape

from nsc.bases.roles import choose_targets
from nsc.performance.costs import Memory, Step, Work
from nsc.performance.linears import linears_in_order
from nsc.performance.plan import meta_body

LARGEST = Case("LLaMA-3-70B", LLAMA3_70B, 6, 2, 96)


@lru_cache(maxsize=16)
def plan(case: Case) -> Step:
    """Return the step of a case, as ``nsc plan`` sees it."""
    model, _, _ = meta_body(case.config)
    linears = linears_in_order(model)
    names = [x.name for x in linears if x.name.endswith(QV)]
    targets = choose_targets(model, names, [name for name in QV if "v" in name])
    ranks = dict.fromkeys(names, case.tasks * RANK)
    return Step(model, linears, ranks, targets, case.tasks, case.tasks * case.samples, case.tokens, BF16.itemsize)


def seconds(case: Case, gpu: Gpu) -> float:
    """Return the seconds of a step of nsc, in all its passes."""
    return case.passes * sum(work.seconds(gpu.rate, gpu.bandwidth) for work in one_pass(case).work())


def one_pass(case: Case) -> Step:
    """Return the largest of the passes in which nsc takes the step."""
    step = plan(case)
    return replace(step, samples=math.ceil(step.samples / case.passes))


def floor(case: Case, gpu: Gpu) -> float:
    """Return the seconds of the frozen base alone, with its attention."""
    return sum(work.seconds(gpu.rate, gpu.bandwidth) for work in plan(case).work()[:3])


def loop(case: Case, gpu: Gpu) -> float:
    """Return the seconds of a step of the per-task loop."""
    step = replace(plan(case), samples=case.samples)
    base = sum(work.seconds(gpu.rate, gpu.bandwidth) for work in step.work()[:3])
    behind = [x for x in step.linears if x not in step.forward]  # the loop runs its forward to the end
    tail = sum(x.parameters for x in behind)
    base += Work("tail", 2 * step.rows * tail, BF16.itemsize * tail).seconds(gpu.rate, gpu.bandwidth)
    carried = Counter((x.d, x.m) for x in step.linears if x.name in step.ranks)
    for (d, m), count in carried.items():
        shape = Shape("", "", step.rows, d, m, (RANK,) * case.tasks)
        layer, bare = predict.of_peft_layer(shape), predict.of_bare_layer(shape)
        base += count * (predict.seconds(layer, gpu) - predict.seconds(bare, gpu))
    width = next(x.d for x in step.linears if x.name in step.targets)
    ratio = predict.of_usual_ratio(Shape("", "", step.rows, width, width, (RANK,)))
    return case.tasks * (base + len(step.targets) * predict.seconds(ratio, gpu) + _tower(case, gpu))


def beyond_weights(case: Case) -> float:
    """Return the bytes of a pass, without the base's weights."""
    memory = one_pass(case).memory()
    return memory.total - memory.weights


def in_8_bits() -> Memory:
    """Return the memory of a step on LLaMA-3-70B, its linears in 8 bits."""
    return plan(LARGEST).memory().in_8_bits(BF16.itemsize)


def _tower(case: Case, gpu: Gpu) -> float:
    """Return the seconds of the image tower once forward, on the images of one task."""
    if not case.tower:
        return 0.0
    parameters = sum(p.numel() for p in meta_body(case.tower)[0].parameters())
    tokens = case.samples * ((case.tower.image_size // case.tower.patch_size) ** 2 + 1)
    return Work("tower", 2 * tokens * parameters, BF16.itemsize * parameters).seconds(gpu.rate, gpu.bandwidth)
