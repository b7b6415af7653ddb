"""Coefficients learned on generated positions: what is generated, which places count, and the same step in float64."""

import pytest
import torch
import transformers
from torch import nn

import nsc
from nsc.adapters.surgery import merged_layers
from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.bases.heads import load_generating_head
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.data.modalities import feed_of
from nsc.data.text import with_answer
from nsc.errors import NSCError
from nsc.learning.generation import continue_prompts, generator
from tests.learning.test_exactness import START
from tests.plain_options import Plain, plain_learning, plain_loss
from tests.tiny import save_base, save_image_base

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12], [13]]


@pytest.mark.parametrize("tied", [False, True])
def test_answers_are_those_of_transformers(tmp_path, tied):
    base = save_base(tmp_path / "base", tie_word_embeddings=tied)
    whole = transformers.AutoModelForCausalLM.from_pretrained(base)
    body = loading.load_body(Base(str(base)), device="cpu")
    head = load_generating_head(Base(str(base), body))
    torch.testing.assert_close(head.weight, whole.lm_head.weight)
    answers = continue_prompts(body, head, PROMPTS, 6, ends={2})
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        said = whole.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert said[0, len(prompt) :].tolist() == answer
    stop = answers[0][2]
    assert continue_prompts(body, head, PROMPTS[:1], 6, ends={stop})[0] == answers[0][: answers[0].index(stop) + 1]


def test_nothing_is_computed_when_every_row_of_one_length_has_ended(base):
    body = loading.load_body(Base(str(base)), device="cpu")
    head, prompts = load_generating_head(Base(str(base), body)), [[5, 6], [8, 9], [10, 11]]
    full = continue_prompts(body, head, prompts, 8)
    ends = {answer[place] for answer, place in zip(full, (1, 4, 2), strict=True)}
    expected = [answer[: 1 + next(i for i, token in enumerate(answer) if token in ends)] for answer in full]
    calls: list[nn.Module] = []
    body.register_forward_hook(lambda module, inputs, output: calls.append(module))
    assert continue_prompts(body, head, prompts, 8, ends) == expected
    assert len(calls) == max(map(len, expected)) < 8 and len(set(map(len, expected))) > 1


def test_the_places_that_computed_the_answer_count():
    assert with_answer([5, 6, 7], [8], "full") == with_answer([5, 6, 7], [8], "last") == ([5, 6, 7], slice(2, 3))
    assert with_answer([5, 6, 7], [8, 9, 2], "full") == ([5, 6, 7, 8, 9], slice(2, 5))
    assert with_answer([5, 6, 7], [8, 9, 2], "last") == ([5, 6, 7, 8, 9], slice(4, 5))


@pytest.mark.parametrize("positions", ["last", "full"])
@pytest.mark.parametrize("objective", ["null-space", "entropy"])
def test_a_merge_on_generated_positions_is_the_plain_computation(base, adapters, texts, positions, objective):
    """The batches of a merge, of one sample a row, through the plain loop in float64."""
    some = {task: adapters[task] for task in ("plain", "pattern")}
    settings = dict(positions=positions, max_new_tokens=4, steps=3, lr=1e-2, batch_size=3, evaluation_samples=2)
    result = nsc.merge(
        base,
        some,
        {t: texts[t] for t in some},
        objective=objective,
        dtype="float64",
        max_drift=None,
        progress=False,
        **settings,
    )
    model, config = result.model, MergeConfig(**settings, dtype="float64")
    targets = result.record.targets
    tokens = {t: feed_tokens(base, texts[t]) for t in some}
    head = load_generating_head(Base(str(base), model))
    continues = generator(Base(str(base), model), result.stack, config.start, config.max_new_tokens)
    data = {task: texts[task] for task in some}
    batches, _ = feed_of(Base(str(base))).batches(Base(str(base), model), targets, data, config, continues)
    whole = transformers.AutoModelForCausalLM.from_pretrained(base).double()
    start = torch.full((len(result.modules), 2), START, dtype=torch.float64)
    for task, rows in batches.tokens.items():
        for ids, part, prompt in zip(rows, batches.counted[task], tokens[task], strict=True):
            said = merged_answer(whole, result.stack, start, prompt)
            assert ids == [*prompt, *said[:-1]]
            assert part == slice(len(prompt) - 1 if positions == "full" else len(ids) - 1, len(ids))
    if objective == "null-space":
        how = Plain((0.5, 0.5))
    else:
        how = Plain((0, 0), entropies=(1, 1), heads=[(head.weight.double(), None)] * 2, all_rows=True)

    steps = iter(range(3))

    def loss(lam):
        drawn = batches.drawn(next(steps))
        picks = [(task, i) for task, row in drawn.items() for i in row]
        return plain_loss(model, result.stack, lam, alone(batches, picks), targets, how)

    _, _, expected = plain_learning(loss, result.stack, START, 1e-2, 3, 2)
    torch.testing.assert_close(result.coefficients, expected, rtol=0, atol=1e-6)  # its RMSNorm is in float32


def feed_tokens(base, rows):
    return transformers.AutoTokenizer.from_pretrained(base)(rows)["input_ids"]


def merged_answer(whole: nn.Module, stack, start, prompt) -> list[int]:
    with merged_layers(whole.model, stack, start):
        said = whole.generate(
            torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False
        )
    return said[0, len(prompt) :].tolist()


def alone(batches, picks):
    """One sample a row, with weights to the last bit of float64."""
    rows = [batches.tokens[task][i] for task, i in picks]
    tasks = [list(batches.tokens).index(task) for task, _ in picks]
    width = max(map(len, rows))
    ids, weight = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.float64)
    for r, (row, (task, i)) in enumerate(zip(rows, picks, strict=True)):
        part = batches.counted[task][i]
        ids[r, : len(row)] = torch.tensor(row)
        weight[r, part] = 1 / (part.stop - part.start) / tasks.count(tasks[r])
    task = torch.tensor(tasks)[:, None].expand(-1, width)
    return Batch({"input_ids": ids}, task, weight)


def test_what_does_not_generate_is_refused(tmp_path, base, adapters, texts):
    classifier = save_base(tmp_path / "classifier", "AutoModelForSequenceClassification")
    body = loading.load_body(Base(str(classifier)), device="cpu")
    with pytest.raises(NSCError, match=r"no lm_head in its checkpoint, so it generates no tokens"):
        load_generating_head(Base(str(classifier), body))
    images = save_image_base(tmp_path / "images")
    with pytest.raises(NSCError, match="its attention is not causal"):
        load_generating_head(Base(str(images), loading.load_body(Base(str(images)), device="cpu")))
    model, config = loading.load_body(Base(str(base)), device="cpu"), MergeConfig(positions="last")
    with pytest.raises(NSCError, match="positions last need a model that generates"):
        feed_of(Base(str(base))).batches(Base(str(base), model), [], texts, config)
