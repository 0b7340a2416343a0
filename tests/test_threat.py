"""What each adversary holds, and that nothing of it is private."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

import pytest
import torch
from conftest import tiny_examples, tiny_model
from torch import nn

from defenses.clip import Clip
from defenses.gaussian import Gaussian
from defenses.mpc import MPC
from defenses.secagg import SecAgg
from fltoolkit.defense import DefenseStack
from fltoolkit.loss import cross_entropy
from fltoolkit.threat import THREATS, AggregateOnly, CuriousServer, Public
from fltoolkit.training.round import run_round
from fltoolkit.training.task import Task
from fltoolkit.types import Layout, LocalSpec


def play(defenses=(), clients=3):
    task = Task(tiny_model(), cross_entropy, LocalSpec(1, None, 0.5), DefenseStack(defenses, clients), 7)
    data = [tiny_examples(2 + k, 10 + k) for k in range(clients)]
    layout = Layout.of(task.model)
    transcript = run_round(task, layout.row(task.model), range(clients), data, 1).transcript
    public = Public(task.model, task.loss, layout, (1, 5, 5), (0.0, 1.0), 4, task.stack.public())
    return transcript, public


def tensors_in(value, path="observation", seen=None):
    """Every tensor reachable from a value: fields, mappings, sequences, modules, closures, attributes."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (str, int, float, bool, type, types.ModuleType)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, nn.Module):
        for name, t in [*value.named_parameters(), *value.named_buffers()]:
            yield f"{path}.{name}", t
            if t.grad is not None:
                yield f"{path}.{name}.grad", t.grad
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from tensors_in(getattr(value, f.name), f"{path}.{f.name}", seen)
    elif isinstance(value, Mapping):
        for k, v in value.items():
            yield from tensors_in(v, f"{path}[{k!r}]", seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for i, v in enumerate(value):
            yield from tensors_in(v, f"{path}[{i}]", seen)
    elif callable(value):
        for cell in getattr(value, "__closure__", None) or ():
            yield from tensors_in(cell.cell_contents, f"{path}.closure", seen)
        yield from tensors_in(vars(value) if hasattr(value, "__dict__") else None, f"{path}.__dict__", seen)
        yield from tensors_in(getattr(value, "__self__", None), f"{path}.__self__", seen)


def leaks(observation, transcript):
    """Paths of tensors that equal, contain or alias something private: data, labels, plain updates."""
    secret = [t for d in transcript.truth for t in (d.x, d.y)]
    secret += [*(x for d in transcript.truth for x in d.x), transcript.updates.delta]
    found = []
    for path, tensor in tensors_in(observation):
        for s in secret:
            alias = tensor.untyped_storage().data_ptr() == s.untyped_storage().data_ptr()
            equal = tensor.numel() == s.numel() and torch.equal(
                tensor.flatten().double(), s.flatten().double()
            )
            if alias or equal:
                found.append(path)
    return found


STACKS = {
    "none": [],
    "clip": [Clip(norm=0.01)],
    "central": [Clip(norm=0.5), Gaussian(noise_multiplier=1.0)],
    "local": [Clip(norm=0.5), Gaussian(noise_multiplier=1.0, placement="client")],
    "secagg": [SecAgg(cohort=3)],
    "mpc": [MPC(servers=3)],
}


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("stack", STACKS)
def test_observation_holds_nothing_private(threat, stack):
    transcript, public = play(STACKS[stack])
    observation = THREATS[threat]().observe(transcript, 1, public)
    assert len(list(tensors_in(observation))) >= 6
    assert leaks(observation, transcript) == []
    assert observation.labels is None


def test_the_walk_finds_what_is_planted():
    """The test above can fail: a batch hidden in a field, a closure, a gradient or a view is found."""
    transcript, public = play()
    seen = CuriousServer().observe(transcript, 1, public)
    secret = transcript.truth[1]

    def leaky_loss(logits, y, kept=None):
        return (logits, y, secret)

    model = tiny_model()
    model[1].weight.grad = transcript.truth[0].x[:1].expand(12, 1, 5, 5).reshape(12, 25)
    model.register_buffer("kept", secret.x.clone())
    for planted in (
        dataclasses.replace(seen, auxiliary=secret),
        dataclasses.replace(seen, labels=secret.y.clone()),
        dataclasses.replace(seen, loss=leaky_loss),
        dataclasses.replace(seen, defenses=({"name": "x", "hint": [secret.x[0]]},)),
        dataclasses.replace(seen, update=transcript.updates.delta[1]),
        dataclasses.replace(seen, model=model),
    ):
        assert leaks(planted, transcript)


def test_server_sees_the_message_and_aggregate_only_the_sum():
    transcript, public = play([Clip(norm=0.1), Gaussian(noise_multiplier=1.0)])
    server = CuriousServer().observe(transcript, 1, public)
    outside = AggregateOnly().observe(transcript, 1, public)
    assert torch.equal(server.update, transcript.messages[1])
    assert (server.clients, server.num_examples) == (1, 3)
    assert torch.equal(outside.update, transcript.aggregate)
    assert (outside.clients, outside.num_examples) == (3, 9)
    assert not torch.equal(transcript.aggregate, transcript.total)


def test_under_a_secure_sum_the_server_sees_the_sum_before_its_own_noise():
    transcript, public = play([Clip(norm=0.1), SecAgg(cohort=3), Gaussian(noise_multiplier=1.0)])
    server = CuriousServer().observe(transcript, 1, public)
    assert torch.equal(server.update, transcript.total)
    assert (server.clients, server.num_examples) == (3, 9)
    outside = AggregateOnly().observe(transcript, 1, public)
    assert torch.equal(outside.update, transcript.aggregate)


def test_gradient_undoes_rate_and_steps():
    transcript, public = play()
    seen = CuriousServer().observe(transcript, 0, public)
    torch.testing.assert_close(seen.gradient, -transcript.messages[0] / 0.5)
    slower = dataclasses.replace(seen, local=LocalSpec(3, 1, 0.1))
    torch.testing.assert_close(slower.gradient, -transcript.messages[0] / (0.1 * 6))
    torch.testing.assert_close(dataclasses.replace(seen, local=None).gradient, -transcript.messages[0])
