"""LLaVA on generated positions and by its entropy, and each modality: what is answered, what counts, in float64."""

import pytest
import torch
import transformers

import nsc
from nsc.adapters.surgery import merged_layers
from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.bases.heads import load_generating_head
from nsc.bases.image_tower import ImageTower
from nsc.bases.llava import places
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.data.image_text import Prompts, Sample, read_prompts
from nsc.data.images import as_image
from nsc.data.modalities import feed_of
from nsc.data.prompt_writer import Writer, image_features
from nsc.errors import DataError, NSCError
from nsc.learning.entropy import entropy_of
from nsc.learning.generation import continue_prompts, generator
from tests.learning.test_exactness import START
from tests.merging.test_llava_merges import IMAGE, OLD, PATCHES, stock_inputs
from tests.plain_options import Plain, plain_learning, plain_loss
from tests.tiny import rewrite, save_llava_base

LAYOUTS = {  # of a checkpoint's keys, before and after 4.52
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_": "model.multi_modal_",
}
ALL = {"target_modules": ("v_proj",), "target_blocks": "half"}


def to_new_layout(tensors) -> None:
    for key in list(tensors):
        old = next(prefix for prefix in LAYOUTS if key.startswith(prefix))
        tensors[LAYOUTS[old] + key.removeprefix(old)] = tensors.pop(key)


@pytest.mark.parametrize("layout", ["old"] if OLD else ["old", "new"])
@pytest.mark.parametrize("tied", [False, True])
def test_answers_are_those_of_transformers(tmp_path, questions, tied, layout):
    base = save_llava_base(tmp_path / "base", tie_word_embeddings=tied)
    if layout == "new":
        rewrite(base / "model.safetensors", to_new_layout)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(base).eval()
    body = loading.load_body(Base(str(base)), device="cpu")
    head = load_generating_head(Base(str(base), body))
    torch.testing.assert_close(head.weight, whole.get_output_embeddings().weight)
    processor = loading.load_processor(Base(str(base)))
    prompts = [prompt for file in questions.values() for prompt in read_prompts(file)]
    ids = [Writer(processor, IMAGE, PATCHES, 100).ids(prompt) for prompt in prompts]
    features = image_features(body, processor)
    answers = continue_prompts(body, head, ids, 6, {2}, lambda i: features(prompts[i].image))
    for prompt, answer in zip(prompts, answers, strict=True):
        own = stock_inputs(base, prompt)
        said = whole.generate(**own, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert said[0, own["input_ids"].shape[1] :].tolist() == answer
    assert len({tuple(answer) for answer in answers}) > 3  # images and questions are seen


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    base = save_llava_base(tmp_path / "base")
    body = loading.load_body(Base(str(base)))
    rewrite(base / "model.safetensors", lambda t: t.pop("language_model.lm_head.weight"))
    with pytest.raises(NSCError, match="lm_head in its checkpoint, so it generates no tokens"):
        load_generating_head(Base(str(base), body))


SHARED = [
    ("prompt", "null-space", "text"),
    ("prompt", "null-space", "image"),
    ("prompt", "null-space", "both"),
    ("last", "null-space", "both"),
    ("full", "null-space", "text"),
    ("prompt", "both", "both"),
    ("full", "both", "both"),
    ("last", "entropy", "both"),
]
BUCKETS = [("prompt", "null-space", "text"), ("prompt", "null-space", "image"), ("full", "null-space", "both")]
CASES = [(*case, True) for case in SHARED] + [(*case, False) for case in BUCKETS]


@pytest.mark.parametrize(("positions", "objective", "modality", "shares_rows"), CASES)
def test_a_merge_is_the_plain_computation(
    llava, llava_adapters, questions, monkeypatch, positions, objective, modality, shares_rows
):
    """The samples of a merge, one a row, through the plain loop in float64."""
    if not shares_rows:
        monkeypatch.setattr("nsc.data.modalities.can_share_rows", lambda model: False)
    settings = dict(
        positions=positions,
        max_new_tokens=4,
        modality=modality,
        steps=3,
        lr=1e-2,
        batch_size=3,
        evaluation_samples=2,
        dtype="float64",
        objective=objective,
        **ALL,
    )
    result = nsc.merge(llava, llava_adapters, questions, max_drift=None, progress=False, **settings)
    model, base, config = result.model, str(llava), MergeConfig(**settings)
    prompts = {task: read_prompts(file) for task, file in questions.items()}
    continues = (
        [generator(Base(base, model), result.stack, config.start, config.max_new_tokens)]
        if positions != "prompt"
        else []
    )
    batches, _ = feed_of(Base(base)).batches(Base(base, model), result.record.targets, prompts, config, *continues)
    assert batches.shares_rows == shares_rows and (len(batches(0)) == 1) == shares_rows
    tasks, start = list(prompts), torch.full(result.stack.owned.shape, START, dtype=torch.float64)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(llava).double().eval()
    answers = {}

    def row(task: str, i: int) -> tuple[list[int], slice, torch.Tensor]:
        """Its ids, which of them count, the features of its image."""
        own = stock_inputs(llava, prompts[task][i])
        own["pixel_values"] = own["pixel_values"].double()
        ids = own["input_ids"][0].tolist()
        features = ImageTower(model).features(own["pixel_values"])[0, 1:]
        if positions == "prompt":
            return ids, slice(0, len(ids)), features
        if (task, i) not in answers:
            with merged_layers(whole if OLD else whole.model, result.stack, start):
                said = whole.generate(**own, max_new_tokens=4, do_sample=False, pad_token_id=0)
            answers[task, i] = said[0, :-1].tolist()
        filled = answers[task, i]
        return filled, slice(len(ids) - 1 if positions == "full" else len(filled) - 1, len(filled)), features

    def alone(picks) -> Batch:
        rows = [row(task, i) for task, i in picks]
        shape = len(rows), max(len(ids) for ids, _, _ in rows)
        ids, weight = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.float64)
        image = torch.zeros(shape, dtype=torch.bool)
        for r, (tokens, counted, _) in enumerate(rows):
            ids[r, : len(tokens)] = torch.tensor(tokens)
            image[r, tokens.index(IMAGE) : tokens.index(IMAGE) + PATCHES] = True
            weight[r, counted] = 1
        weight *= {"both": 1, "text": ~image, "image": image}[modality]
        task = torch.tensor([tasks.index(task) for task, _ in picks])[:, None].expand(shape)
        features = torch.stack([features for _, _, features in rows])[:, None]
        return Batch({"input_ids": ids, "features": features, "place": places(image)}, task, weight)

    head = load_generating_head(Base(base, model))[0].double()
    thirds, ones = (0 if objective == "entropy" else 1 / 3,) * 3, None if objective == "null-space" else (1.0,) * 3
    how = Plain(thirds, entropies=ones, heads=[(head, None)] * 3, all_rows=positions != "prompt")
    steps = iter(range(3))

    def loss(lam):
        picks = [(task, i) for task, some in batches.drawn(next(steps)).items() for i in some]
        return plain_loss(model, result.stack, lam, alone(picks), result.record.targets, how)

    first, _, expected = plain_learning(loss, result.stack, START, 1e-2, 3, 3)
    assert result.report.losses[0] == pytest.approx(first.item(), rel=1e-5)
    torch.testing.assert_close(result.coefficients, expected, rtol=0, atol=1e-6)  # its RMSNorm is in float32
    assert (expected[:, :2] - START).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [dict(positions="full"), dict(positions="full", objective="both")], ids=str)
def test_from_answers_to_proof(llava, llava_adapters, questions, tmp_path, settings):
    result = nsc.merge(
        llava, llava_adapters, questions, steps=5, lr=1e-3, batch_size=4, max_new_tokens=4, progress=False, **settings
    )
    assert result.report.losses[-1] < result.report.losses[0]
    proof = result.save(tmp_path / "out")
    assert proof.outputs < 1e-5 < 1e-3 < proof.effect
    assert nsc.apply(tmp_path / "out").record.settings["positions"] == "full"


def test_a_projector_that_a_task_keeps_is_no_head(llava, llava_adapters, questions):
    some = {task: llava_adapters[task] for task in ("count", "color")}
    kept = nsc.merge(
        llava,
        some,
        {task: questions[task] for task in some},
        objective="entropy",
        steps=0,
        batch_size=4,
        keep_modules=["linear_1"],
        progress=False,
    )
    assert all(adapter.saved for adapter in kept.adapters.values())
    body = loading.load_body(Base(str(llava)))
    own = load_generating_head(Base(str(llava), body))[0]
    for head in entropy_of(Base(str(llava), body), kept.adapters, "prompt").heads:
        assert torch.equal(head.weight, own)


def test_an_answer_is_text_even_a_placeholder_in_it():
    image = as_image(torch.zeros(8, 8, 3, dtype=torch.uint8), "black")
    made = Prompts(lambda image: torch.zeros(2, 3), IMAGE, 0, "both", {"causal": True, "shares_rows": True})
    sample = Sample([5, IMAGE, IMAGE, 6, 7, IMAGE, 8], image, 4, slice(3, 7))
    (batch,) = made.batches([sample, sample._replace(ids=[IMAGE, IMAGE, 9], prompt=3, counted=slice(2, 3))], [0, 1])
    ids = batch.inputs["input_ids"].flatten().tolist()
    for tokens, place, weight in (
        (sample.ids, [-1, 0, 1, -1, -1, -1, -1], [0, 0, 0, 0.25, 0.25, 0.25, 0.25]),
        ([IMAGE, IMAGE, 9], [0, 1, -1], [0, 0, 1]),
    ):
        at = next(i for i in range(len(ids)) if ids[i : i + len(tokens)] == tokens)
        here = slice(at, at + len(tokens))
        found = batch.inputs["place"].flatten()[here]
        assert torch.where(found < 0, -1, found % 2).tolist() == place
        assert batch.weight.flatten()[here].tolist() == weight


def test_of_what_nothing_counts_is_refused(llava, llava_adapters, questions):
    with pytest.raises(NSCError, match="answers are text, so with positions full no image token counts"):
        MergeConfig(positions="full", modality="image")
    bare = questions["count"].parent / "0.png"
    with pytest.raises(DataError, match=r"with modality text none of its tokens counts"):
        Prompts(None, IMAGE, 0, "text", {}).count(Sample([IMAGE] * 3, as_image(bare, "0.png"), 3, slice(0, 3)))
    body, prompts = loading.load_body(Base(str(llava))), {"count": read_prompts(questions["count"])}
    with pytest.raises(NSCError, match="positions last need a model that generates"):
        feed_of(Base(str(llava))).batches(Base(str(llava), body), [], prompts, MergeConfig(positions="last"))
