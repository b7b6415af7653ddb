"""Several processes match the experts: each row is asked about once, and all learn what one process does."""

import pytest
import torch

import nsc
from nsc.learning.teachers import Experts
from nsc.runtime.distributed import join
from tests.learning.test_match import NEW, Setting, problem_of, setting  # noqa: F401
from tests.runtime.ranks import together

SETTINGS = dict(steps=6, lr=0.01, tokens_per_pass=20)
CLOSE = {"rtol": 0, "atol": 1e-9}


def outcomes_of(tmp_path, size, work, environment=False):
    outcomes = together(tmp_path, size, work, environment)
    for outcome in outcomes:
        assert not isinstance(outcome, BaseException), outcome
    return outcomes


def asked(problem) -> dict:
    """What the experts say about each sample, and what is made of it."""
    said = {
        pick: (o.values.tolist(), o.ids is not None and o.ids.tolist()) for pick, o in problem.batches.outputs.items()
    }
    return {"said": said, "tokens": problem.batches.tokens, "scales": problem.output.scales.tolist()}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.usefixtures("one_thread")
def test_experts_are_asked_once_with_the_same_bits(setting, tmp_path, monkeypatch, size):  # noqa: F811
    """Each pass of an expert runs in one process alone."""
    ran, said = [], Experts._said

    def counted(self, part):
        ran.append(part.tokens)
        return said(self, part)

    monkeypatch.setattr(Experts, "_said", counted)
    expected, alone = asked(problem_of(setting, **SETTINGS)), ran.copy()
    ran.clear()
    outcomes = outcomes_of(tmp_path, size, lambda rank: (asked(problem_of(setting, join(), **SETTINGS)), ran))
    assert all(found == expected for found, _ in outcomes)
    assert sorted(n for _, mine in outcomes for n in mine) == sorted(alone)
    assert max(sum(mine) for _, mine in outcomes) < 1.8 * sum(alone) / size


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("granularity", ["rank", "factors"])
def test_processes_learn_what_one_does(setting, tmp_path, granularity, size):  # noqa: F811
    settings = SETTINGS | dict(granularity=granularity)
    alone = problem_of(setting, **settings).learn(progress=False)
    outcomes = outcomes_of(
        tmp_path, size, lambda rank: problem_of(setting, join(), **settings).learn(progress=False, team=join())
    )
    for one in outcomes:
        assert torch.equal(one.coefficients, outcomes[0].coefficients) and one.curve == outcomes[0].curve
        assert one.kept == alone.kept
        torch.testing.assert_close(one.coefficients, alone.coefficients, **CLOSE)
        torch.testing.assert_close(one.losses, alone.losses, **CLOSE)
        for step, distances in alone.curve.items():
            torch.testing.assert_close(one.curve[step], distances, **CLOSE)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("granularity", ["rank", "factors"])
def test_whole_merges(setting, tmp_path, granularity, shard):  # noqa: F811
    """RMSNorm of transformers computes in float32."""
    given = setting.base, setting.adapters, setting.texts
    settings = dict(method="match", granularity=granularity, steps=4, max_new_tokens=NEW, dtype="float64")

    def work(rank=0, **more):
        result = nsc.merge(*given, **settings, **more, progress=False)
        updates = {name: result.merged.update(name) for name in result.modules}
        return {name: (u.B @ u.A).double().numpy() for name, u in updates.items()}, result.report.to_dict()

    expected, told = work()
    for updates, report in outcomes_of(tmp_path, 2, lambda rank: work(shard=shard), environment=True):
        for name, update in expected.items():
            torch.testing.assert_close(updates[name], update, rtol=0, atol=1e-5)
        for key in ("losses", "distances", "ratio_before", "ratio_after"):
            assert_near(report[key], told[key])


def assert_near(one, other) -> None:
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=1e-5, equal_nan=True)


def test_a_scale_is_searched_together(setting, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("nsc.learning.preparation.TOKENS", 20)
    given = setting.base, setting.adapters, setting.texts
    settings = dict(method="task-arithmetic", search="match", progress=False)

    def work(rank=0):
        return nsc.merge(*given, **settings).report.searched["curve"]

    expected = work()
    curves = outcomes_of(tmp_path, 2, work, environment=True)
    assert curves[0] == curves[1]
    assert_near(curves[0], expected)
