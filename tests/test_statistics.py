"""BatchNorm's statistics against BatchNorm itself, and what a client gives away that sends its buffers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import observe, tiny_model
from torch import nn

from attacks.gradinversion import GradInversion
from fltoolkit import audit
from fltoolkit.commands.audit import AuditOptions, run_audit
from fltoolkit.data import Dataset
from fltoolkit.errors import InputError
from fltoolkit.inversion.diagnosis import diagnose
from fltoolkit.inversion.keep import fingerprint
from fltoolkit.inversion.statistics import BatchNormStatistics
from fltoolkit.loss import cross_entropy
from fltoolkit.outside import UpdateSpec, update
from fltoolkit.training.buffers import after_one_step
from fltoolkit.types import Examples, Layout, LocalSpec


def normed(seed=0, training=False):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(4, 4),
    )  # fmt: skip
    return model.train(training)


def batch(count=6, seed=0):
    return Examples(
        torch.rand(count, 1, 5, 5, generator=torch.Generator().manual_seed(seed)), torch.arange(count) % 4
    )


@pytest.mark.parametrize("training", [False, True])
def test_statistics_are_those_that_batch_norm_takes(training):
    """With momentum 1, a layer in training mode stores the batch's mean and (unbiased) variance."""
    model, data = normed(training=training), batch()
    seen = observe(model, data, auxiliary=data)
    prior = BatchNormStatistics([seen], "estimated")
    probe = normed(training=True)
    if not training:
        probe[1].eval()
    for layer in (probe[1], probe[4]):
        layer.momentum = 1.0
    probe(data.x)
    means = prior.targets[0].split([3, 3, 4, 4])
    torch.testing.assert_close(means[2], probe[4].running_mean, rtol=1e-4, atol=1e-6)
    count = 6
    torch.testing.assert_close(means[3] * count / (count - 1), probe[4].running_var, rtol=1e-4, atol=1e-6)
    row = Layout.of(model).row(model)[None]
    assert prior(data.x[None], row, torch.tensor([0])).item() < 1e-4
    assert prior(1 - data.x[None], row, torch.tensor([0])).item() > 0.01


def test_running_statistics_are_each_victims_own():
    models = [normed(0), normed(1)]
    models[1][1].running_mean += 5.0
    prior = BatchNormStatistics([observe(m, batch()) for m in models], "running")
    rows = torch.stack([Layout.of(m).row(m) for m in models])
    x = batch().x.expand(2, -1, -1, -1, -1).clone().requires_grad_()
    found = prior(x, rows, torch.tensor([0, 1]))
    assert found[1] > found[0] + 3
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert slope.abs().sum() > 0
    assert torch.equal(models[0][1].running_mean, torch.zeros(3))


def test_statistics_that_are_not_there():
    with pytest.raises(InputError, match="statistics must be none for a model without BatchNorm2d"):
        BatchNormStatistics([observe(tiny_model(), batch())], "running")
    with pytest.raises(InputError, match="must have public auxiliary data"):
        BatchNormStatistics([observe(normed(), batch())], "estimated")
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(25, 4))
    for source in ("running", "sent"):
        with pytest.raises(InputError, match=f"must not be {source} where a BatchNorm2d layer keeps none"):
            BatchNormStatistics([observe(model, batch())], source)


def trained(model, data, lr=0.5):
    """A client's model after one step of plain PyTorch from `model`."""
    client = deepcopy(model)
    cross_entropy(client(data.x), data.y).mean().backward()
    torch.optim.SGD(client.parameters(), lr=lr).step()
    return client


def sent(model, data, **changes):
    """What a server sees of a client that sends its buffers along."""
    seen = observe(model, data, **changes)
    return replace(seen, buffers=after_one_step(model, seen.params, data.x))


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_buffers_are_those_of_a_client_that_trained(momentum):
    model, data = normed(training=True), batch()
    model[1].momentum = model[4].momentum = momentum
    before = {n: b.clone() for n, b in model.named_buffers()}
    found = after_one_step(model, Layout.of(model).row(model), data.x)
    assert found.keys() == before.keys()
    for name, buffer in trained(model, data).named_buffers():
        torch.testing.assert_close(found[name], buffer)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_buffers_are_taken_at_the_rounds_parameters_and_frozen_layers_keep_theirs():
    model, other, data = normed(0, training=True), normed(1, training=True), batch()
    model[1].eval(), other[1].eval()
    found = after_one_step(model, Layout.of(other).row(other), data.x)
    for name, buffer in trained(other, data).named_buffers():
        torch.testing.assert_close(found[name], buffer)
    assert found["1.running_mean"].tolist() == [0.0] * 3


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_sent_buffers_give_the_statistics_of_the_batch(momentum):
    model, data = normed(training=True), batch()
    for layer in (model[1], model[4]):
        layer.momentum = momentum
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
        layer.num_batches_tracked.fill_(3)
    found = BatchNormStatistics([sent(model, data)], "sent").targets
    exact = BatchNormStatistics([observe(model, data, auxiliary=data)], "estimated").targets
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_a_frozen_layer_sends_its_running_statistics():
    model, data = normed(training=True), batch()
    model[1].eval()
    model[1].running_mean.fill_(7.0)
    prior = BatchNormStatistics([sent(model, data)], "sent")
    mean, variance, *_ = prior.targets[0].split([3, 3, 4, 4])
    assert mean.tolist() == [7.0] * 3
    assert variance.tolist() == [1.0] * 3


def test_sent_statistics_come_first_where_they_are_there_and_of_one_step():
    model, data = normed(training=True), batch()
    seen = sent(model, data, auxiliary=data)
    assert GradInversion().source(seen) == "sent"
    assert GradInversion().source(replace(seen, local=LocalSpec(2))) == "estimated"
    assert GradInversion().source(replace(seen, buffers=None)) == "estimated"
    with pytest.raises(InputError, match="statistics=sent must have clients that send their buffers"):
        BatchNormStatistics([observe(model, data)], "sent")
    with pytest.raises(InputError, match="statistics=sent must have clients of one local step, got 2"):
        BatchNormStatistics([replace(seen, local=LocalSpec(2))], "sent")


def test_what_is_hidden_is_said_only_where_it_is():
    seen = sent(normed(training=True), batch())
    hidden = "BatchNorm uses the statistics of the batch"
    assert not any(hidden in line for line in diagnose(seen, 1.0, 1.0))
    assert any(hidden in line for line in diagnose(replace(seen, buffers=None), 1.0, 1.0))


def test_searches_on_other_buffers_are_kept_apart():
    one, other = {"a": torch.zeros(2000)}, {"a": torch.zeros(2000)}
    assert fingerprint(one) == fingerprint(other)
    other["a"][1000] = 1.0
    assert fingerprint(one) != fingerprint(other)


def photographs(count=24):
    x = torch.rand(count, 1, 5, 5, generator=torch.Generator().manual_seed(3))
    examples = Examples(x, torch.arange(count) % 4)
    return Dataset("tiny", examples, examples, 4)


def test_an_audit_hands_the_buffers_on():
    model = normed(training=True)
    scene = audit.Scene(data=photographs(), model=model, batch=6, victims=2, sends_buffers=True)
    look = audit.Stage(scene).look(1)
    seen = look.observation
    for name, buffer in trained(model, look.truth).named_buffers():
        torch.testing.assert_close(seen.buffers[name], buffer)
    assert audit.Stage(replace(scene, sends_buffers=False)).look(1).observation.buffers is None
    report = audit.run(replace(scene, victims=1, attack="gradinversion:steps=2,restarts=1")).report
    assert report["sends_buffers"] is True


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clients": 2}, "2 clients"),
        ({"local": LocalSpec(epochs=2)}, "2 local steps"),
        ({"defenses": ["clip:norm=1"]}, "defenses"),
        ({"frozen_norm": True}, "a model without BatchNorm in training mode"),
        ({"model": tiny_model()}, "a model without BatchNorm in training mode"),
    ],
)
def test_scenes_whose_buffers_say_nothing_are_refused(changes, reason):
    scene = audit.Scene(data=photographs(), model=normed(training=True), batch=6, sends_buffers=True)
    audit.Stage(scene)
    with pytest.raises(InputError, match=f"sends_buffers must be off but for .*, got {reason}"):
        audit.Stage(replace(scene, **changes))


def test_the_flag_of_the_command_line_reaches_the_scene(tmp_path):
    asked = AuditOptions(data="digits", model="mlp", sends_buffers=True, out=str(tmp_path))
    with pytest.raises(InputError, match="sends_buffers must be off but for"):
        run_audit("gradinversion", asked)


class Seen:
    """An attack that only looks."""

    name = "seen"

    def many(self, observations, rngs, progress):
        return observations


def test_a_whole_state_dict_brings_its_buffers_along():
    model, data = normed(training=True), batch()
    state = trained(model, data).state_dict()
    spec = UpdateSpec(6, (1, 5, 5), 4, kind="weights", local=LocalSpec(lr=0.5), attack=Seen())
    seen = update(model, cross_entropy, state, spec)
    found = BatchNormStatistics([seen], "sent").targets
    exact = BatchNormStatistics([observe(model, data, auxiliary=data)], "estimated").targets
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    parts = {n: t for n, t in state.items() if "running" not in n}
    assert update(model, cross_entropy, parts, spec).buffers is None
    assert update(model, cross_entropy, state, replace(spec, kind="delta")).buffers is None
    assert update(normed(), cross_entropy, state, spec).buffers is None
