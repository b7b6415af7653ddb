"""Replayed steps equal eager ones bit for bit, on a tape that repeats operators as a CUDA graph would."""

import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nsc.runtime.cuda_graphs as graphs
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.data.text import TextBatches
from nsc.learning.loop import learn
from nsc.learning.passes import Passes
from nsc.runtime.cuda_graphs import Graphs
from tests.stacks import random_stack, random_tokens
from tests.tape import TapeRecorder
from tests.tiny import linears, tiny_llama, tiny_vit

TARGETS = ["layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj"]
CONFIG = MergeConfig(steps=16, lr=1e-2)
LENGTHS = {"a": (4, 17, 4), "b": (9, 2, 2), "c": (11,)}


@pytest.fixture(scope="module", params=["float32", "float64"])
def setting(request, tmp_path_factory):
    """(model, stack, batches), where the shapes of steps recur and samples share rows."""
    model = tiny_llama("AutoModel", num_hidden_layers=2).to(getattr(torch, request.param)).requires_grad_(False).eval()
    names = [n for n in linears(model) if n.endswith(("q_proj", "v_proj"))]
    batches = TextBatches(random_tokens(LENGTHS), batch_size=2, pad_id=0, shares_rows=True, few_shapes=True)
    return model, random_stack(model, names, LENGTHS, tmp_path_factory.mktemp("adapters")), batches


@pytest.fixture
def taped(monkeypatch):
    """Record steps on tapes instead of CUDA graphs; the list of the recorders that were made."""
    made = []

    def recorder(device):
        made.append(TapeRecorder(device))
        return made[-1]

    monkeypatch.setattr(graphs, "CudaRecorder", recorder)
    monkeypatch.setattr(graphs, "obstacle", lambda model: None)
    return made


def run(setting, config=CONFIG, batches=None, targets=None, **options):
    model, stack, own = setting
    with Traced():
        return learn(model, stack, targets or TARGETS, batches or own, config, progress=False, **options)


class Traced(TorchDispatchMode):
    """An idle mode: torch takes another path under any mode, which changes the last bit of a float32 gradient."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def assert_same_bits(one, other):
    assert torch.equal(one.coefficients, other.coefficients) and one.losses == other.losses
    assert torch.equal(one.bounded, other.bounded) and torch.equal(one.frozen, other.frozen)


eager = partial(replace, graphs=False)


@pytest.mark.parametrize(
    ("changes", "options"),
    [({}, {}), ({"tokens_per_pass": 20, "weight_decay": 0.1}, {}), ({"layers": "weights"}, {"shares_rows": False})],
    ids=["packed", "cut", "apart"],
)
def test_recorded_steps_are_the_eager_ones(setting, taped, changes, options):
    config, batches = replace(CONFIG, **changes), replace(setting[2], **options)
    recorded = run(setting, config, batches)
    (recorder,) = taped
    assert len(recorder.tapes) >= 3  # the update and at least two shapes
    assert_same_bits(recorded, run(setting, eager(config), batches))


def test_at_the_bound_and_through_resume(setting, taped, tmp_path):
    config = replace(CONFIG, steps=20, max_drift=0.05)
    whole = run(setting, eager(config))
    assert whole.bounded.any()

    def interrupting(step):
        if step == 11:
            signal.raise_signal(signal.SIGTERM)
        return setting[2](step)

    checkpoint = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        run(setting, config, interrupting, checkpoint=checkpoint)
    assert_same_bits(run(setting, config, checkpoint=checkpoint, resume=True), whole)
    assert len(taped) == 2 and all(recorder.tapes for recorder in taped)


def test_images_are_recorded_too(taped, tmp_path):
    model = tiny_vit("AutoModel").requires_grad_(False).eval()
    names = [n for n in linears(model) if "attention" in n]
    stack = random_stack(model, names, LENGTHS, tmp_path)
    targets = [n for n in names if ".2." in n][:1]
    generator = torch.Generator().manual_seed(0)

    def images(step):
        pixels = torch.randn(3, 3, 8, 8, generator=generator.manual_seed(step))
        task = torch.arange(3)[:, None].expand(3, 5).contiguous()  # four patches and the class token
        return [Batch({"pixel_values": pixels}, task, torch.full((3, 5), 0.2))]

    setting = model, stack, images
    assert_same_bits(run(setting, targets=targets), run(setting, eager(CONFIG), targets=targets))
    assert len(taped[0].tapes) == 2


def test_what_the_host_works_out_would_be_recorded():
    """The tape does detect such values: one that the host changes stays as it was in the recording."""
    total, calls = torch.zeros(()), []

    def work():
        calls.append(None)
        total.add_(len(calls))

    graphs = Graphs(TapeRecorder(total.device))
    for _ in range(5):
        graphs(work)
    assert total.item() == 1 + 2 + 3 * 3 and graphs.replayed == 3  # three times the recorded 3, not 3 + 4 + 5


def test_a_learning_rate_that_the_host_changes_is_found(setting, taped, monkeypatch):
    """The same in learning: a learning rate that a schedule gives AdamW is lost in the graph, and results differ."""
    step = torch.optim.AdamW.step

    def scheduled(self):
        self.param_groups[0]["lr"] *= 0.9
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", scheduled)
    assert not torch.equal(run(setting).coefficients, run(setting, eager(CONFIG)).coefficients)


def test_a_tensor_kept_from_a_recording_is_found():
    """Memory that another graph would have overwritten is poisoned."""
    x, kept = torch.ones(3), {}

    def work():
        kept.setdefault("twice", 2 * x) if torch.utils._python_dispatch._len_torch_dispatch_stack() else None
        x.mul_(kept.get("twice", x))

    graphs = Graphs(TapeRecorder(x.device))
    for _ in range(4):
        graphs(work)
    graphs(lambda: None)
    assert kept["twice"].isnan().all()


@pytest.mark.parametrize("failing", [1, 2])
def test_what_cannot_be_recorded_runs_as_usual_and_says_why_once(setting, taped, monkeypatch, capsys, failing):
    """The first recording fails, or a later one; the results are the eager ones."""
    record, calls = TapeRecorder.record, []

    def fails(self, work):
        calls.append(None)
        if len(calls) == failing:
            return record(self, lambda: (work(), torch.ones(()).item()))
        return record(self, work)

    monkeypatch.setattr(TapeRecorder, "record", fails)
    model, stack, batches = setting
    with Traced():
        recorded = learn(model, stack, TARGETS, batches, CONFIG)
    told = capsys.readouterr().err
    assert told.count("no CUDA graphs, since a step could not be recorded (operation not permitted") == 1
    assert len(calls) == failing
    assert_same_bits(recorded, run(setting, eager(CONFIG)))


def test_without_cuda_that_is_said(setting, capsys):
    model, stack, batches = setting
    learn(model, stack, TARGETS, batches, replace(CONFIG, steps=1))
    assert capsys.readouterr().err.count("no CUDA graphs: the base is on cpu") == 1
    learn(model, stack, TARGETS, batches, replace(CONFIG, steps=1, graphs=False))
    assert "CUDA" not in capsys.readouterr().err
    offloaded = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    assert graphs.obstacle(offloaded) == "the base's weights lie on cpu, meta"


def test_memory_that_runs_out_in_a_recording_halves_the_pass(setting, taped, monkeypatch):
    """An error that ends the recording hides the cause, as CUDA's does; the step is repeated without any graph."""
    record, one_pass, sizes, warmed = TapeRecorder.record, Passes._pass, [], []

    def noted(self, batch):
        sizes.append(batch.tokens)
        one_pass(self, batch)

    def warm_up(self, work):
        before = len(sizes)
        work()
        warmed[:] = sizes[before:]  # nothing for an update

    def scarce(self, work):
        if warmed and warmed[0] > 30:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        return record(self, work)

    monkeypatch.setattr(TapeRecorder, "warm_up", warm_up)
    monkeypatch.setattr(TapeRecorder, "record", scarce)
    monkeypatch.setattr(Passes, "_pass", noted)
    recorded = run(setting)
    assert max(sizes) > 30 >= sizes[-1] and taped[0].tapes
    torch.testing.assert_close(recorded.coefficients, run(setting, eager(CONFIG)).coefficients, rtol=0, atol=1e-4)


def test_few_graphs_live(setting, taped, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    recorded = run(setting)
    assert len(taped[0].tapes) == 2
    assert_same_bits(recorded, run(setting, eager(CONFIG)))
