"""Soteria and PRECODE: what they promise, against closed forms and slow references."""

from __future__ import annotations

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import observe, tiny_examples, tiny_model
from torch import nn
from torch.func import functional_call, grad, vmap

from defenses import soteria
from defenses.precode import Bottleneck, Precode, divergence
from defenses.soteria import Soteria
from fltoolkit import models
from fltoolkit.defense import DefenseStack, Local, RoundContext
from fltoolkit.errors import InputError
from fltoolkit.inversion.checks import check_searchable, stackable
from fltoolkit.loss import cross_entropy
from fltoolkit.models import evaluating
from fltoolkit.rng import torch_stream
from fltoolkit.training.engines import ENGINES, choose
from fltoolkit.training.engines.base import draws, in_visiting_order
from fltoolkit.types import Examples, Layout, LocalSpec


def context(model, data, clients=None):
    """What a client-side defense knows in round 1; `data` by client."""
    layout, members = Layout.of(model), tuple(data) if clients is None else clients
    local = Local(model, layout.row(model), cross_entropy, layout, data)
    weights = torch.full((len(members),), 1 / len(members))
    return RoundContext(5, 1, members, weights, name="soteria", local=local)


def random_rows(model, count, seed=0):
    return torch.randn(count, Layout.of(model).size, generator=torch.Generator().manual_seed(seed))


def changed_columns(model, before, after, layer):
    """Which columns of a layer's weight became zero, and whether nothing else has changed."""
    layout = Layout.of(model)
    old, new = layout.unflatten(before), layout.unflatten(after)
    weight, kept = new.pop(f"{layer}.weight"), old.pop(f"{layer}.weight")
    zero = (weight == 0).all(0)
    rest = all(torch.equal(old[n], new[n]) for n in old)
    return zero, rest and torch.equal(weight[:, ~zero], kept[:, ~zero])


def slow_scores(head, x):
    """|r_i| / ‖∇_X r_i‖₂, one example and one entry at a time, by ordinary autograd."""
    total = []
    for example in x:
        v = example[None].clone().requires_grad_()
        r, scores = head(v)[0], []
        for entry in r:
            (slope,) = torch.autograd.grad(entry, v, retain_graph=True)
            scores.append(float(entry.detach().abs() / slope.norm()) if entry != 0 else 0.0)
        total.append(scores)
    return torch.tensor(total, dtype=torch.float64).mean(0)


def convolutional():
    model = models.build("cnn", (1, 8, 8), 4, torch.Generator().manual_seed(1))
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return model, Examples(x, torch.arange(5) % 4)


NETS = {
    "tiny": lambda: (tiny_model(), tiny_examples(7), "3", slice(0, 3)),
    "tiny, first layer": lambda: (tiny_model(), tiny_examples(7), "1", slice(0, 1)),
    "cnn": lambda: (*convolutional(), "9", slice(0, 9)),
    "cnn, fully connected": lambda: (*convolutional(), "7", slice(0, 7)),
}


@pytest.mark.parametrize("net", NETS)
def test_soteria_scores_are_those_of_the_slow_loop(net, monkeypatch):
    model, data, layer, head = NETS[net]()
    local = context(model, {0: data}).local
    expected = slow_scores(model[head], data.x)
    found = soteria.mean_scores(local, layer, data.x)
    assert expected.max() > 0
    assert torch.allclose(found, expected, rtol=1e-4)
    monkeypatch.setattr(soteria, "PIECE", 2)
    monkeypatch.setattr(soteria, "CHUNK_FLOATS", 1000)
    assert torch.allclose(soteria.mean_scores(local, layer, data.x), expected, rtol=1e-4)


def test_soteria_scores_of_a_linear_representation_have_a_closed_form():
    """r = W x + b: ∇_X r_i is row i of W, so the score is |r_i| / ‖W_i‖."""
    rng = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Linear(6, 4))
    x = torch.randn(1, 9, generator=rng)
    local = context(model, {0: Examples(x, torch.tensor([0]))}).local
    w, b = model[1].weight.detach().double(), model[1].bias.detach().double()
    expected = (w @ x[0].double() + b).abs() / w.norm(dim=1)
    assert torch.allclose(soteria.mean_scores(local, "2", x), expected, rtol=1e-5)


@pytest.mark.parametrize("pruned", [1, 2, 3, 4])
def test_soteria_prunes_what_the_paper_maximises(pruned):
    """Where f is invertible and linear, ‖f⁻¹(r) − f⁻¹(r')‖ of every set of entries, by trying all of them."""
    rng = torch.Generator().manual_seed(pruned)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=rng))
    matrix = torch.rand(6, 1, generator=rng).add(0.1) * basis
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.copy_(matrix)
    x = torch.randn(1, 6, generator=rng)
    ctx = context(model, {0: Examples(x, torch.tensor([0]))})
    before = random_rows(model, 1)
    after = Soteria(ratio=pruned / 6).clients(before, ctx)
    zero, untouched = changed_columns(model, before[0], after[0], "1")
    r, inverse = matrix @ x[0], torch.linalg.inv(matrix)

    def error(entries):
        kept = r.clone()
        kept[list(entries)] = 0
        return float((inverse @ (r - kept)).norm())

    best = max(combinations(range(6), pruned), key=error)
    assert set(zero.nonzero()[:, 0].tolist()) == set(best)
    assert untouched


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 0.99])
@pytest.mark.parametrize(("layer", "d"), [(None, 512), ("7", 256)])
def test_soteria_zeroes_exactly_its_share_of_columns(layer, d, ratio):
    model, data = convolutional()
    ctx = context(model, {3: data.take(slice(0, 2)), 8: data.take(slice(2, 5))})
    before, state = random_rows(model, 2), copy.deepcopy(model.state_dict())
    given = before.clone()
    defense = Soteria(ratio=ratio, layer=layer)
    after = defense.clients(given, ctx)
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    sets = []
    for client, row in ((3, 0), (8, 1)):
        zero, untouched = changed_columns(model, before[row], after[row], layer or "9")
        scores = soteria.mean_scores(ctx.local, layer or "9", ctx.local.data[client].x)
        assert int(zero.sum()) == round(ratio * d)
        assert untouched
        if zero.any():
            assert scores[zero].min() >= scores[~zero].max()
        sets.append(zero)
    assert ratio in (0.0, 0.99) or not torch.equal(*sets)
    assert torch.equal(given, before)
    assert torch.equal(defense.clients(before, ctx), after)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_soteria_scores_at_the_broadcast_not_at_the_weights_the_model_holds():
    model, data = tiny_model(), tiny_examples(3)
    ctx = context(model, {0: data})
    expected = soteria.mean_scores(ctx.local, "3", data.x)
    with torch.no_grad():
        model[1].weight.mul_(-3)
    assert torch.equal(soteria.mean_scores(ctx.local, "3", data.x), expected)


def test_soteria_draws_nothing_and_leaves_running_statistics_alone():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(27, 4)
    )
    before, state = torch.random.get_rng_state(), copy.deepcopy(model.state_dict())
    data = tiny_examples(4)
    row = torch.ones(1, Layout.of(model).size)
    Soteria(0.5).clients(row, context(model, {0: data}))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


def test_soteria_scores_entries_that_are_zero_last_and_constants_first():
    """Entry 0 is a dead ReLU, entry 1 a constant 2 that does not depend on the input."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([-9.0, 2.0, 1.0]))
    data = Examples(torch.rand(4, 2), torch.zeros(4, dtype=torch.long))
    scores = soteria.mean_scores(context(model, {0: data}).local, "2", data.x)
    assert scores[0] == 0
    assert scores[1] == float("inf")
    assert 1 <= scores[2] <= 2


def test_soteria_says_what_it_needs():
    model, data = tiny_model(), tiny_examples(2)
    rows, ctx = random_rows(model, 2), context(model, {0: data}, clients=(0, 1))
    with pytest.raises(InputError, match=r"whose `local` holds the model.* got none for clients \[1\]"):
        Soteria().clients(rows, ctx)
    with pytest.raises(InputError, match=r"got none for clients \[0\]"):
        Soteria().clients(rows[:1], RoundContext(5, 1, (0,), torch.ones(1)))
    with pytest.raises(
        InputError, match=r"layer must be one of the model's linear layers \['1', '3'\], got '2'"
    ):
        Soteria(layer="2").clients(rows[:1], context(model, {0: data}))
    with pytest.raises(InputError, match=r"ratio must be at least 0 and below 1, got 1\.0"):
        Soteria(ratio=1.0)
    model[1].weight.requires_grad_(False)
    with pytest.raises(
        InputError, match=r"soteria must have a linear layer that is trained, got '1' of \['3'\]"
    ):
        Soteria(layer="1").clients(random_rows(model, 1), context(model, {0: data}))
    lines = Examples(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(InputError, match="inputs of soteria must be real numbers"):
        Soteria().clients(random_rows(tiny_model(), 1), context(tiny_model(), {0: lines}))


def protected(size=5, beta=0.1, seed=0, classes=4):
    return Precode(size=size, beta=beta).model(tiny_model(seed, classes), (1, 5, 5))


def by_hand(model, params, x, noise):
    """Logits and KL of a protected `tiny_model`, from its parameters as the paper writes them."""
    p = dict(params)
    h = torch.sigmoid(x.flatten(1) @ p["1.weight"].t() + p["1.bias"])
    out = h @ p["3.encoder.weight"].t() + p["3.encoder.bias"]
    size = out.shape[1] // 2
    mean, std = out[:, :size], torch.log(1 + torch.exp(out[:, size:]))
    back = (mean + std * noise) @ p["3.decoder.weight"].t() + p["3.decoder.bias"]
    logits = back @ p["3.last.weight"].t() + p["3.last.bias"]
    normal = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), normal).sum(1)
    return logits, kl


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_precode_puts_a_bottleneck_before_the_last_layer_of_a_copy():
    before = tiny_model()
    state = copy.deepcopy(before.state_dict())
    model = Precode(size=5).model(before, (1, 5, 5))
    names = ["1.weight", "1.bias"]
    names += [f"3.{part}.{kind}" for part in ("encoder", "decoder", "last") for kind in ("weight", "bias")]
    assert list(Layout.of(model).names) == names
    assert dict(zip(names, Layout.of(model).shapes, strict=True))["3.encoder.weight"] == (10, 12)
    assert torch.equal(model[3].last.weight, before[3].weight)
    assert model[3].last.weight is not before[3].weight
    assert list(before.state_dict()) == list(state)
    assert all(torch.equal(v, state[n]) for n, v in before.state_dict().items())
    assert draws(model)
    models.check_fits(model, (1, 5, 5), 4)
    alone = Precode(size=2).model(nn.Linear(3, 4), (3,))
    assert isinstance(alone, Bottleneck)


def test_precode_starts_from_its_own_stream_within_the_usual_bounds():
    tiny = tiny_model()
    state = torch.random.get_rng_state()
    model, again = (Precode(size=256).model(tiny, (1, 5, 5)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(Layout.of(model).row(model), Layout.of(again).row(again))
    first = torch.empty(512, 12).uniform_(-(12**-0.5), 12**-0.5, generator=torch_stream(0, "precode"))
    assert torch.equal(model[3].encoder.weight, first)
    for layer in (model[3].encoder, model[3].decoder):
        bound = layer.in_features**-0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert 0.5 * bound < layer.bias.abs().max() <= bound


def test_precode_training_output_is_a_draw_from_the_bottleneck():
    """The paper's equations with the same noise; and 4,000 draws of z have the mean μ and deviation σ."""
    model, x = protected(), tiny_examples(6).x
    torch.manual_seed(11)
    logits = model(x)
    torch.manual_seed(11)
    expected, kl = by_hand(model, model.named_parameters(), x, torch.randn(6, 5))
    assert torch.allclose(logits, expected, atol=1e-6)
    assert torch.allclose(logits.penalty, 0.1 * kl, rtol=1e-5)

    seen, many = [], x[:1].expand(4000, -1, -1, -1)
    model[3].decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model(many)
    out = model[3].encoder(model[:3](x[:1])).detach()[0]
    mean, std = out[:5], nn.functional.softplus(out[5:])
    assert ((seen[0].mean(0) - mean).abs() < 5 * std / 4000**0.5).all()
    assert torch.allclose(seen[0].std(0), std, rtol=0.06)


def test_precode_evaluates_at_the_mean_without_a_penalty():
    model, x = protected(), tiny_examples(6).x
    state = torch.random.get_rng_state()
    with evaluating(model):
        logits = model(x)
    assert torch.equal(torch.random.get_rng_state(), state)
    expected, _ = by_hand(model, model.named_parameters(), x, torch.zeros(6, 5))
    assert torch.allclose(logits, expected, atol=1e-6)
    assert not hasattr(logits, "penalty")


def test_precode_divergence_is_the_closed_form_and_zero_for_a_standard_normal():
    mean, std = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, np.e]])
    assert divergence(mean, std)[0] == 0
    assert float(divergence(mean, std)[1]) == pytest.approx(2 + 0.5 * (np.e**2 - 1 - 2), rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_precode_trains_under_the_mean_loss_plus_beta_times_the_mean_kl(beta):
    """One step of the training engine, for clients of different sizes, against the gradient of the paper's
    loss with the same noise."""
    model, lr = protected(beta=beta), 0.3
    layout, data = Layout.of(model), [tiny_examples(n, seed=n) for n in (6, 3)]
    params = layout.row(model)
    engine = choose(model, cross_entropy, (1, 5, 5))
    assert engine.name == "looped"
    rows = engine(params, data, LocalSpec(1, None, lr), [np.random.default_rng(k) for k in range(2)])
    for k, row in enumerate(rows):
        rng = np.random.default_rng(k)
        noise = drawn((len(data[k]), 5), int(rng.spawn(1)[0].integers(2**62)))
        seen = in_visiting_order(data[k], LocalSpec(1, None, lr), rng)
        weights = {n: v.clone().requires_grad_() for n, v in layout.unflatten(params).items()}
        logits, kl = by_hand(model, weights, seen.x, noise)
        loss = nn.functional.cross_entropy(logits, seen.y) + beta * kl.mean()
        expected = -lr * layout.flatten(
            dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))
        )
        assert expected.abs().max() > 1e-2
        assert (row - expected).abs().max() < 1e-5 * max(1, float(expected.abs().max()))


def distance_slope(model, x, y, noise_seed, gradient):
    """∂/∂x of ‖g(x)‖² for the parameters' gradient g, which passes the model backwards twice."""
    v = x.clone().requires_grad_()
    torch.manual_seed(noise_seed)
    found = gradient(v, y)
    (slope,) = torch.autograd.grad(sum(g.square().sum() for g in found), v)
    return slope


@pytest.mark.parametrize("way", ["autograd", "torch.func"])
def test_precode_is_right_when_differentiated_twice(way):
    """A penalty added to gradients on the way back would be added again in the second backward pass."""
    model, data = protected(beta=0.5), tiny_examples(3)
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}

    def loss(params, x, y):
        return cross_entropy(functional_call(model, params, (x,)), y).mean()

    def reference(params, x, y):
        logits, kl = by_hand(model, params, x, drawn((3, 5), 7))
        return nn.functional.cross_entropy(logits, y) + 0.5 * kl.mean()

    def eager(loss):
        return lambda x, y: torch.autograd.grad(loss(params, x, y), [*params.values()], create_graph=True)

    def functional(x, y):
        return grad(loss)(params, x, y).values()

    def stacked(x, y):
        return vmap(grad(loss), (None, 0, 0), randomness="same")(params, x[None], y[None]).values()

    expected = distance_slope(model, data.x, data.y, 7, eager(reference))
    found = [eager(loss)] if way == "autograd" else [functional, stacked]
    for gradient in found:
        slope = distance_slope(model, data.x, data.y, 7, gradient)
        assert expected.abs().max() > 1e-3
        assert torch.allclose(slope, expected, atol=1e-6 * float(expected.abs().max()) + 1e-7, rtol=1e-4)


def test_attacks_can_search_through_precode():
    """In training mode guess by guess, since draws cannot be stacked; in evaluation mode stacked."""
    model, data = protected(), tiny_examples(2)
    check_searchable(observe(model, data))
    assert not stackable(observe(model, data))
    model.eval()
    check_searchable(observe(model, data))
    assert stackable(observe(model, data))


def test_engines_that_cannot_draw_refuse_precode():
    model = protected()
    able = {n for n, e in ENGINES.items() if e.refuses(model, cross_entropy, (1, 5, 5)) is None}
    assert able == {"looped"}


def test_precode_trained_model_learns():
    """200 steps on two well-separated classes; the bottleneck lets more than 95 % through."""
    rng = torch.Generator().manual_seed(4)
    y = torch.arange(60) % 2
    x = 0.1 * torch.rand(60, 1, 5, 5, generator=rng) + 0.8 * y[:, None, None, None]
    model = Precode(size=16).model(tiny_model(classes=2), (1, 5, 5))
    params = Layout.of(model).row(model)
    row = choose(model, cross_entropy, (1, 5, 5))(
        params, [Examples(x, y)], LocalSpec(50, 15, 0.5), [np.random.default_rng(0)]
    )[0]
    with evaluating(model), torch.no_grad():
        logits = functional_call(model, Layout.of(model).unflatten(params + row), (x,))
    assert (logits.argmax(1) == y).double().mean() > 0.95


class Squashed(nn.Module):
    """Something follows the last linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(25, 4)

    def forward(self, x):
        return self.linear(x.flatten(1)).log_softmax(1)


def test_precode_refuses_what_it_cannot_protect():
    with pytest.raises(InputError, match="model must give the output of a linear layer, called once"):
        Precode().model(Squashed(), (1, 5, 5))
    with pytest.raises(InputError, match="model must accept real inputs of shape"):
        Precode().model(models.build("charlstm", (5,), 9, torch.Generator()), (5,))
    with pytest.raises(InputError, match="size must be >= 1, got 0"):
        Precode(size=0)
    with pytest.raises(InputError, match=r"beta must be a finite number >= 0, got -1\.0"):
        Precode(beta=-1.0)


def test_neither_promises_privacy():
    model = tiny_model()
    stack = DefenseStack([Precode(size=5), Soteria(0.25)])
    assert [d["name"] for d in stack.public()] == ["precode", "soteria"]
    wrapped = stack.model(model, (1, 5, 5))
    ctx = context(wrapped, {0: tiny_examples(3)})
    before = random_rows(wrapped, 1)
    zero, untouched = changed_columns(wrapped, before[0], stack.clients(before, ctx)[0], "3.last")
    assert int(zero.sum()) == 3
    assert untouched
    assert stack.events(ctx) == ()
