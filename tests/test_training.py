"""The ratio in other people's training: every way of it beside the same training without, loss for loss.

docs/training.md: in one's own layer, on a PEFT model, as a term of the loss, in a Trainer.
"""

import json

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from nsc.tracking import NullSpaceCallback, WatchedLinear, track
from tests.test_docs import snippets
from tests.test_tracking import BATCH, MASK, Q0, defined, lora_As, make, trainable


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """accelerate and the Trainer keep the precision of a training for the whole process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def fit(model, call=None, accelerator=None):
    """Losses of three steps of AdamW, and the adapter that came of them."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    if accelerator:
        call, optimizer = accelerator.prepare(model, optimizer)
    call = model if call is None else call
    torch.manual_seed(2)  # dropout
    losses = []
    for _ in range(3):
        loss = call(**BATCH).loss
        (accelerator.backward if accelerator else torch.Tensor.backward)(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in trainable(model).items()}


def float32(model):
    """A way to train: what it does to the model, and what ``fit`` is called with beside it."""
    return {}


def bfloat16(model):
    model.bfloat16()
    return {}


def accelerated(model):
    return {"accelerator": Accelerator(mixed_precision="bf16", cpu=True)}


def checkpointed(model, use_reentrant=False):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return {}


def reentrant(model):
    return checkpointed(model, True)


def compiled(model):
    torch._dynamo.reset()
    return {"call": torch.compile(model, backend="aot_eager")}


def compiled_whole(model):
    torch._dynamo.reset()  # the base: older PEFT wraps its forward in a context manager that Dynamo cannot follow
    return {"call": torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)}


def compiled_and_checkpointed(model):
    return checkpointed(model) | compiled(model)


def exact_ratios(way, **lora):
    """Of the last of three steps, by definition, of the untracked model."""
    model, exact = make(**lora), {}

    def remember(layer, z):
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else layer.weight.dtype
        exact[id(layer)] = defined(layer.weight.to(dtype), z[0].to(dtype), MASK).item()

    for layer in lora_As(model):
        layer.register_forward_pre_hook(lambda m, z: torch.no_grad()(remember)(m, z))
    fit(model, **way(model))
    return list(exact.values())


FLAG = "skip_fwd_side_effects_in_bwd_under_checkpoint"
EAGER = [float32, bfloat16, accelerated, reentrant, checkpointed]
WAYS = [(way, differentiable) for way in EAGER for differentiable in (False, True)]
WAYS += [(compiled, False), (compiled_whole, True)]
WAYS += [pytest.param(compiled_and_checkpointed, True, marks=pytest.mark.slow)]
WAYS.remove((reentrant, True))  # refused: test_tracking


@pytest.mark.parametrize(("way", "differentiable"), WAYS)
def test_training_is_that_of_the_untracked_model(way, differentiable):
    settings = {"lora_dropout": 0.1} if way in EAGER else {"blocks": 1}
    plain, model = make(**settings), make(**settings)
    losses, adapter = fit(plain, **way(plain))
    with track(model.get_base_model() if way is compiled_whole else model, differentiable=differentiable) as tracker:
        mine, my_adapter = fit(model, **way(model))
    rounding = 0 if way in EAGER else 1e-6  # other graphs, other fusions
    assert mine == pytest.approx(losses, rel=rounding) and len(set(losses)) == 3
    torch.testing.assert_close(my_adapter, adapter, rtol=0, atol=rounding)
    exact = exact_ratios(way if way in EAGER else float32, **settings)
    tolerance = 5e-4 if way in (bfloat16, accelerated) else 1e-6
    assert [x.item() for x in tracker.ratios.values()] == pytest.approx(exact, abs=tolerance)
    assert all(x.requires_grad is differentiable for x in tracker.ratios.values())
    assert len(tracker.read()) == len(exact) == len(lora_As(model))


@pytest.mark.slow
def test_inductor_trains_the_same():
    torch._dynamo.reset()
    plain, model = make(blocks=1), make(blocks=1)
    losses, _ = fit(plain, torch.compile(plain))
    with track(model, differentiable=True) as tracker:
        mine, _ = fit(model, torch.compile(model))
    assert mine == pytest.approx(losses, rel=1e-5)
    assert [x.item() for x in tracker.ratios.values()] == pytest.approx(exact_ratios(float32, blocks=1), abs=1e-5)


@pytest.mark.parametrize("way", [float32, checkpointed, compiled_and_checkpointed])
def test_the_regulariser_has_the_whole_gradient(way):
    if hasattr(torch._dynamo.config, FLAG):  # docs/training.md: the blocks are compiled, too
        torch._dynamo.config.patch({FLAG: True})(whole_gradient)(way)
    else:
        whole_gradient(way)


def whole_gradient(way):
    blocks = 1 if way is compiled_and_checkpointed else 4
    model, twin = make(blocks).double(), make(blocks).double()
    call = way(model).get("call", model)
    with track(model, differentiable=True) as tracker:
        loss = call(**BATCH).loss + tracker.mean()
        loss.backward()
        assert all(layer.seen is None for layer in tracker.layers.values())  # also after a checkpointed block ran again
    terms = []
    for layer in lora_As(twin):
        layer.register_forward_pre_hook(lambda layer, z: terms.append(defined(layer.weight, z[0], MASK)))
    exact = twin(**BATCH).loss + torch.stack(terms).mean()
    exact.backward()
    torch.testing.assert_close(loss, exact)
    gradients, exact_gradients = ({name: p.grad for name, p in trainable(m).items()} for m in (model, twin))
    torch.testing.assert_close(gradients, exact_gradients, rtol=1e-6, atol=1e-9)


def test_the_ratio_alone_falls_when_it_is_the_loss():
    model = make()
    with track(model, differentiable=True) as tracker:
        optimizer = torch.optim.AdamW([layer.weight for layer in tracker.layers.values()], lr=1e-2)
        means = []
        for _ in range(5):
            model(**BATCH)
            tracker.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            means.append(tracker.mean().item())
    assert means == sorted(means, reverse=True) and means[-1] < means[0] - 0.01


def test_someone_elses_layer_learns_what_a_plain_one_does():
    names = {}
    exec(snippets("docs/training.md")[0], names)

    class Plain(names["LoRALinear"]):
        def forward(self, z):
            return self.base(z) + z @ self.lora_A.T @ self.lora_B.T * self.scale[0]

    runs = []
    for kind in (Plain, names["LoRALinear"]):
        torch.manual_seed(0)
        layer = kind(nn.Linear(32, 48), r=4, alpha=8)
        z, target = torch.randn(2, 5, 32), torch.randn(2, 5, 48)
        optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=1)
        losses = []
        for _ in range(5):
            loss = (layer(z) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-6) and runs[0][-1] < runs[0][0]
    layer(z)
    assert abs(layer.ratio.mean() - defined(layer.lora_A, z, torch.ones(2, 5))) < 1e-6


def trainer_of(model, folder, callbacks=(), **settings):
    """A Trainer of three logged steps, two micro-batches each."""
    args = dict(max_steps=6, logging_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, seed=0)
    args |= dict(use_cpu=True, report_to=[], disable_tqdm=True, save_steps=6, eval_strategy="steps", eval_steps=2)
    rows = [{key: value[i] for key, value in BATCH.items()} for i in range(4)]
    args = transformers.TrainingArguments(str(folder), **args | settings)
    return transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows[:1], callbacks=[*callbacks])


NON_REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}


class Reader(transformers.TrainerCallback):
    """Stands for TensorBoard: keeps what it is given to log."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


class Stop(transformers.TrainerCallback):
    """Stands for Ctrl-C."""

    def on_step_end(self, *args, **kwargs):
        raise KeyboardInterrupt


def is_watched(model):
    kinds = {type(layer) for layer in lora_As(model)}
    assert kinds in ({WatchedLinear}, {nn.Linear}) and bool(model._forward_hooks) is (kinds == {WatchedLinear})
    return kinds == {WatchedLinear}


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "gradient_checkpointing": True} | NON_REENTRANT])
def test_a_trainer_trains_the_same(tmp_path, settings):
    plain, model = make(task_type="CAUSAL_LM"), make(task_type="CAUSAL_LM")
    trainer, mine = trainer_of(plain, tmp_path, **settings), trainer_of(model, tmp_path, **settings)
    callback = NullSpaceCallback()
    callback.add_to(mine)
    trainer.train(), mine.train()
    losses, my_losses = ([x["loss"] for x in training_logs(t)] for t in (trainer, mine))
    assert losses == my_losses and len(set(losses)) == 3
    torch.testing.assert_close(trainable(model), trainable(plain), rtol=0, atol=0)
    assert trainer.evaluate()["eval_loss"] == mine.evaluate()["eval_loss"]
    assert callback.tracker is None and not is_watched(model)


def test_a_trainer_logs_the_ratio_of_every_layer_where_everyone_sees_it(tmp_path):
    reader, model = Reader(), make()
    trainer = trainer_of(model, tmp_path, [reader])
    NullSpaceCallback().add_to(trainer)
    trainer.train()
    entries = training_logs(trainer)
    for entry in entries:
        layers = [value for key, value in entry.items() if key.startswith("null_space_ratio/")]
        assert len(layers) == 12 and f"null_space_ratio/{Q0}" in entry
        assert entry["null_space_ratio"] == pytest.approx(sum(layers) / 12)
    assert len(entries) == 3 and sum("null_space_ratio" in x for x in trainer.state.log_history) == 3
    assert [x for x in reader.seen if "loss" in x] == [{k: v for k, v in x.items() if k != "step"} for x in entries]
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [x for x in saved if "loss" in x] == entries


def test_the_logged_ratio_is_that_of_the_training_rows_alone(tmp_path):
    model, twin = make(), make()
    trainer = trainer_of(model, tmp_path, [NullSpaceCallback()], learning_rate=0.0)
    trainer.train()
    with track(twin) as tracker:
        twin(**BATCH)
        whole = tracker.read()
    for entry in training_logs(trainer):  # of two epochs of the same rows, with an evaluation of the first row between
        logged = {name: entry[f"null_space_ratio/{name}"] for name in whole}
        assert logged == pytest.approx(whole, rel=1e-5)


def test_a_training_that_was_cut_short_can_be_started_again(tmp_path):
    model = make()
    trainer = trainer_of(model, tmp_path, [NullSpaceCallback(), Stop])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert is_watched(model)
    with pytest.raises(ValueError, match="untrack"):
        trainer_of(model, tmp_path, [NullSpaceCallback()]).train()
    trainer.remove_callback(Stop)
    trainer.train()
    assert "null_space_ratio" in training_logs(trainer)[0] and not is_watched(model)


def test_the_callback_reads_a_tracker_that_it_is_given(tmp_path):
    model = make()
    with track(model, differentiable=True) as tracker:
        trainer = trainer_of(model, tmp_path, [NullSpaceCallback(tracker)])
        trainer.train()
        assert "null_space_ratio" in training_logs(trainer)[0] and is_watched(model)
    model.disable_adapter_layers()
    trainer = trainer_of(model, tmp_path, [NullSpaceCallback()])
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match="no LoRA layer was seen to run"):
        trainer.train()
