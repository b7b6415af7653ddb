"""Score a body (a model without a head) and one task's head: accuracy, or the Pearson correlation."""

from collections.abc import Iterator, Sequence

import torch
from tasks import Row
from torch import Tensor
from torch.nn import Module
from transformers import BatchEncoding, PreTrainedTokenizerBase

MAX_TOKENS = 32


@torch.no_grad()
def score(
    model: Module,  # returns last_hidden_state, e.g. AutoModel
    tokenizer: PreTrainedTokenizerBase,
    kind: str,  # of metric: "accuracy" or "pearson"
    rows: Sequence[Row],
    head: Tensor,  # (num_labels, hidden)
    batch_size: int = 64,
    max_tokens: int = MAX_TOKENS,
) -> float:
    """The metric on ``rows``. Pearson does not depend on the unit of the labels."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    device = next(model.parameters()).device
    logits = []
    for texts, _ in batches(rows, batch_size):
        tokens = tokenize(tokenizer, texts, max_tokens).to(device)
        hidden = last_token(model(**tokens).last_hidden_state, tokens["attention_mask"])
        logits.append(hidden.float() @ head.to(device, torch.float32).T)
    return metric(kind, torch.cat(logits).cpu(), torch.tensor([label for _, label in rows]))


def metric(kind: str, logits: Tensor, labels: Tensor) -> float:
    """logits: (n, num_labels)  labels: (n,)  ->  accuracy or Pearson correlation"""
    if kind == "accuracy":
        return (logits.argmax(-1) == labels).double().mean().item()
    return torch.corrcoef(torch.stack((logits[:, 0].double(), labels.double())))[0, 1].item()


def last_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """hidden: (b, t, d)  attention_mask: (b, t), padded on the right  ->  (b, d)"""
    return hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(-1) - 1]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int = MAX_TOKENS) -> BatchEncoding:
    """Token ids and attention mask of ``texts``, padded on the right."""
    return tokenizer(
        list(texts), padding=True, padding_side="right", truncation=True, max_length=max_tokens, return_tensors="pt"
    )


def batches(rows: Sequence[Row], size: int) -> Iterator[tuple[list[str], list[float]]]:
    """Texts and labels of ``size`` consecutive rows at a time."""
    for start in range(0, len(rows), size):
        texts, labels = zip(*rows[start : start + size], strict=True)
        yield list(texts), list(labels)
