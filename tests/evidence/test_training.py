"""One run: what it trains and what it leaves alone, what it repeats, and its result."""

import pytest
import torch

from mmdcn.errors import InputError
from mmdcn.evidence import training
from mmdcn.evidence.training import Run

from . import examples

DIGITS = examples.digits(250)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(training, "BATCH", 50)


def weights(run, folder):
    return training.read_weights(training.weights_file(run, folder))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the run that frozen arms start from."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "BATCH", 50)
        training.train(Run("upright", "plain", 1, 0), DIGITS, folder)
    return folder


def test_a_run_repeats_and_is_told_of(tmp_path):
    run = Run("scratch", "dcn", 2, 0)
    told = []
    first = training.train(run, DIGITS, tmp_path, told.append)
    assert told == sorted(told) and told[-1] == 1
    again = training.train(run, DIGITS, tmp_path)
    assert {**first, "training_seconds": 0} == {**again, "training_seconds": 0}
    assert first["accuracy"].keys() == {"upright", *training.KINDS, training.ALL}
    assert first["curve"][-1]["epoch"] == 2
    assert first["run"] == run.settings()
    network = training.trained(run, tmp_path)
    assert network.convs[1].conv_offset.weight.any()


@pytest.mark.parametrize("arm", ["dcn", "dcnv2", "branch", "transformer"])
def test_frozen_kernels_stay_and_what_is_added_learns(arm, base):
    run = Run("frozen", arm, 1, 0)
    result = training.train(run, DIGITS, base)
    before, after = weights(run.base, base), weights(run, base)
    learned = {name for name, p in training.build(run, base).named_parameters() if p.requires_grad}
    assert result["learned_parameters"] == sum(after[name].numel() for name in learned)
    kept = {
        name.removeprefix("network.").replace(".conv.weight", ".weight"): name for name in after
    }
    assert before.keys() <= kept.keys()
    for name, value in before.items():
        moved = not torch.equal(value, after[kept[name]])
        assert moved == ("running" in name or "num_batches" in name), name
    start = training.build(run, base).state_dict()
    assert any(not torch.equal(start[name], after[name]) for name in learned)


def test_norm_statistics_alone_learn_nothing(base):
    run = Run("frozen", "norm", 1, 0)
    assert training.train(run, DIGITS, base)["learned_parameters"] == 0
    before, after = weights(run.base, base), weights(run, base)
    assert not torch.equal(before["norms.0.running_mean"], after["norms.0.running_mean"])
    assert torch.equal(before["convs.0.weight"], after["convs.0.weight"])


def test_without_the_base_the_error_says_so(tmp_path):
    with pytest.raises(InputError, match=r"no weights in .*upright_plain_1-epochs_seed-0.pt: run"):
        training.train(Run("frozen", "dcn", 1, 0), DIGITS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_offsets_learn_more_slowly():
    network = training.ARMS["dcn"].build()
    optimizer, _ = training._optimizer(network, Run("scratch", "dcn", 1, 0), 10)
    rates = sorted(group["initial_lr"] for group in optimizer.param_groups)
    assert rates == pytest.approx([3e-4, 3e-3])
