"""How attacks read the public defenses, and what they say when they fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import observe, protect, tiny_examples, tiny_model
from torch import nn

from fltoolkit import audit, registry
from fltoolkit.defense import RoundContext
from fltoolkit.inversion.adaptation import adapt
from fltoolkit.inversion.diagnosis import diagnose
from fltoolkit.inversion.distance import (
    First,
    Masked,
    Parts,
    Projected,
    Signs,
    Times,
    aligned,
    cosine,
    relative,
    scaled,
    squared,
)
from fltoolkit.inversion.labels.layer import labels_hidden
from fltoolkit.inversion.noise_level import noise_std
from fltoolkit.types import Examples, LocalSpec

CLIP = {"name": "clip", "norm": 0.5}
NOISE = {"name": "gaussian", "noise_multiplier": 2.0, "placement": "client"}
SERVER = NOISE | {"placement": "server"}
TOPK = {"name": "topk"}


def seen(*defenses, model=None, **changes):
    return observe(model or tiny_model(), tiny_examples(4), defenses=defenses, **changes)


def test_without_defenses_nothing_changes():
    fitted = adapt(seen(), cosine, 0.1)
    assert (fitted.distance, fitted.tv, fitted.strength, fitted.about) == (cosine, 0.1, 1.0, "")
    wide = adapt(seen(CLIP, NOISE, input_range=(-1.0, 1.0)), cosine, 0.1, known=False)
    assert (wide.distance, wide.tv, wide.about) == (cosine, 0.05, "")


@pytest.mark.parametrize("name", ["normalise", "soft-clip", "adaptive-clip"])
def test_what_scales_rows_makes_distances_blind_to_scale(name):
    assert adapt(seen({"name": name, "norm": 0.5}), squared, 0.0).distance is scaled


def test_layers_that_were_scaled_apart_are_compared_apart():
    o = seen({"name": "clip-layers", "norm": 0.5})
    distance = adapt(o, squared, 0.0).distance
    assert distance == Parts(scaled, o.layout.sizes)
    t = torch.randn(2, o.layout.size)
    factors = torch.cat([torch.full((s,), float(i + 1)) for i, s in enumerate(o.layout.sizes)])
    assert distance(t * factors, t).tolist() == pytest.approx([0, 0], abs=1e-9)
    assert squared((t * factors).clone(), t).min() > 1
    assert distance(torch.randn_like(t), t).min() > 1


def test_gradients_that_a_bottleneck_drew_are_left_out():
    from defenses.precode import Precode

    defense = Precode(size=3)
    model = defense.model(tiny_model(), (1, 5, 5))
    distance = adapt(seen(defense.public(), model=model), squared, 0.0).distance
    assert distance == First(squared, 25 * 12 + 12)
    g, t = torch.randn(2, 500), torch.randn(2, 500)
    apart = (g - t)[:, :312].square().sum(1)
    d = distance(g, t)
    assert d.tolist() == pytest.approx(apart.tolist(), rel=1e-5)
    assert (g[:, 312:] == 0).all()


def test_noise_of_local_steps_is_known_to_its_last_factor():
    """u steps of mean gradients with noise σ C / B each, divided by u: σ C / (B √u)."""
    defenses = (
        {"name": "clip", "norm": 0.5, "level": "example"},
        NOISE | {"placement": "server", "level": "example"},
    )
    std = noise_std(seen(*defenses, local=LocalSpec(2, 2, 0.1)))
    assert std == pytest.approx(2.0 * 0.5 / 2 / 4**0.5)


def test_noise_of_local_steps_is_what_training_adds():
    """Measured: the spread of updates over seeds around their mean, at 40 clients with the same data."""
    from defenses.clip import Clip
    from defenses.gaussian import Gaussian
    from fltoolkit.defense import DefenseStack
    from fltoolkit.loss import cross_entropy
    from fltoolkit.training.round import run_round
    from fltoolkit.training.task import Task

    stack = DefenseStack([Clip(norm=1e-6, level="example"), Gaussian(noise_multiplier=1e4, level="example")])
    local = LocalSpec(2, None, 0.1)
    t = Task(tiny_model(), cross_entropy, local, stack, 0)
    rows = run_round(t, t.layout.row(t.model), range(40), [tiny_examples(4)] * 40, 1).transcript.messages
    found = noise_std(seen(*stack.public(), local=local)) * 0.1 * 2
    assert rows.std(0).mean().item() == pytest.approx(found, rel=0.03)


def test_unknown_defenses_change_nothing():
    assert adapt(seen({"name": "theirs"}), cosine, 0.1).distance is cosine


@pytest.mark.parametrize(
    ("defenses", "changes", "std"),
    [
        ((CLIP, NOISE), {}, 1.0),
        ((CLIP, NOISE), {"clients": 4}, 0.5),
        ((CLIP, SERVER), {"clients": 4}, 0.25),
        ((CLIP, NOISE), {"local": LocalSpec(2, 2, 0.1)}, 1.0 / (0.1 * 4)),
        ((CLIP, CLIP | {"norm": 3.0}, NOISE), {}, 1.0),
        ((CLIP, NOISE, NOISE), {}, 2**0.5),
        ((CLIP, {"name": "skellam", "noise_multiplier": 2.0, "clients": 16}), {}, 1 / 4),
        ((CLIP, {"name": "skellam", "noise_multiplier": 2.0, "clients": 16}), {"clients": 4}, 1 / 8),
        ((CLIP, {"name": "skellam", "noise_multiplier": 2.0, "clients": None}), {"clients": 4}, 1 / 4),
        ((CLIP,), {}, 0.0),
    ],
)
def test_noise_is_known_to_its_last_factor(defenses, changes, std):
    assert noise_std(seen(*defenses, **changes)) == pytest.approx(std)


def test_noise_std_is_what_the_pipeline_adds():
    """Measured: the spread of a noised update around the clipped one, in units of the gradient."""
    from defenses.clip import Clip
    from defenses.gaussian import Gaussian
    from fltoolkit.defense import DefenseStack, RoundContext

    rows, ctx = torch.randn(4, 20000), RoundContext(0, 1, (0, 1, 2, 3), torch.full((4,), 0.25))
    clipped = protect(DefenseStack([Clip(0.5)]), rows, ctx)
    for placement, stage in (("client", "total"), ("server", "aggregate")):
        stack = DefenseStack([Clip(0.5), Gaussian(2.0, placement)])
        spread = (getattr(protect(stack, rows, ctx), stage) - getattr(clipped, stage)).std().item()
        assert noise_std(seen(*stack.public(), clients=4)) == pytest.approx(spread, rel=0.02)


def test_each_defense_has_its_distance():
    assert adapt(seen(CLIP), cosine, 0.1).distance is cosine
    noisy = adapt(seen(CLIP, NOISE), cosine, 0.1)
    assert noisy.distance == Times(scaled, 0.5)
    assert noisy.tv == pytest.approx(4 * 25 / 0.05)
    assert adapt(seen(TOPK), cosine, 0.1).distance == Masked(cosine)
    assert adapt(seen(CLIP, TOPK, NOISE), cosine, 0.1).distance == Times(Masked(scaled), 0.5)
    assert noisy.strength == pytest.approx(noisy.tv / 0.1)
    without = adapt(seen(CLIP, NOISE), cosine, 0.0)
    assert (without.tv, without.strength) == (noisy.tv, 1.0)
    stretched = adapt(seen(CLIP, NOISE, input_range=(0.0, 2.0)), cosine, 0.1)
    assert stretched.tv == pytest.approx(noisy.tv / 2)
    assert isinstance(adapt(seen({"name": "sign"}), cosine, 0.1).distance, Signs)
    assert "4 inputs of 2 clients" in adapt(seen(clients=2), cosine, 0.1).about


NOISES = {
    "discrete-gaussian": ("clip:norm=0.5", "discrete-gaussian:noise_multiplier=2"),
    "skellam": ("clip:norm=0.5", "skellam:noise_multiplier=2"),
    "correlated": ("clip:norm=0.5", "correlated:noise_multiplier=0.3,rounds=8"),
    "correlated by a tree": ("clip:norm=0.5", "correlated:noise_multiplier=0.3,rounds=8,kind=tree"),
    "quantise": ("clip:norm=0.5", "quantise:levels=4"),
    "quantise in buckets": ("clip:norm=0.5", "quantise:levels=2,bucket=64"),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_of_each_mechanism_is_what_the_pipeline_adds(name):
    """Measured over 20,000 coordinates: how far the mean of four clients is off that of the clipped rows."""
    stack = registry.make_stack(NOISES[name], 4)
    o = seen(*stack.public(), clients=4, round=5)
    rows = torch.randn(4, 20_000) + 3
    same = {"clients": (0, 1, 2, 3), "weights": torch.full((4,), 0.25)}
    ctx = RoundContext(seed=0, round=5, **same)
    aggregate = protect(stack, rows, ctx).aggregate
    off = aggregate - (rows * 0.5 / rows.norm(dim=1, keepdim=True)).mean(0)
    o = replace(o, update=aggregate)
    if "quantise" in name:
        assert off.std().item() <= noise_std(o) < o.update.square().mean().sqrt(), "a bound, of a mean"
    else:
        assert noise_std(o) == pytest.approx(off.std().item(), rel=0.03)


def test_correlated_noise_is_that_of_the_round():
    stack = registry.make_stack(NOISES["correlated by a tree"], 4)
    (_, defense) = stack.defenses
    found = [noise_std(seen(*stack.public(), clients=4, round=n)) for n in range(1, 9)]
    spread = np.linalg.norm(defense.factorisation.noise, axis=1)
    assert max(spread) > 1.2 * min(spread)
    assert found == pytest.approx((0.3 * defense.sensitivity(8) * 0.5 / 4 * spread).tolist())


@pytest.mark.parametrize("spec", ["quantise:levels=4", "quantise:levels=1", "quantise:levels=2,bucket=64"])
def test_noise_of_a_quantised_message_is_read_off_it(spec):
    stack = registry.make_stack([spec])
    row = torch.randn(1, 20_000) / 7
    sent = stack.clients(row, RoundContext(0, 1, (0,), torch.ones(1)))
    o = seen(*stack.public(), update=sent[0])
    assert noise_std(o) == pytest.approx((sent - row).std().item(), rel=0.03)
    assert noise_std(seen(*stack.public(), update=torch.zeros(640))) == 0


@pytest.mark.parametrize("kind", ["mask", "rotate"])
def test_a_public_subspace_is_that_of_the_round(kind):
    spec = f"subspace:fraction=0.2,kind={kind},seed=3"
    (public,) = registry.make_stack([spec]).public()
    o = seen(public, round=6)
    fitted = adapt(o, cosine, 0.0)
    rows = torch.randn(2, o.layout.size)
    ctx = RoundContext(0, 6, (0, 1), torch.full((2,), 0.5))
    sent = registry.make_stack([spec]).clients(rows, ctx)
    assert fitted.distance(rows.clone(), sent).max() < 1e-6
    assert adapt(replace(o, round=7), cosine, 0.0).distance(rows.clone(), sent).min() > 0.1
    noisy = adapt(seen(CLIP, public, NOISE), cosine, 0.0).distance
    assert isinstance(noisy.inner, Projected), noisy
    assert noisy.inner.inner is scaled


def test_victims_of_different_subspaces_are_searched_apart():
    """The strength of the attack on every victim, not only on the first, whose round it is."""
    model, data = tiny_model(), [tiny_examples(1, seed=s) for s in range(3)]
    spec = "subspace:fraction=0.5,kind=rotate"
    (public,) = registry.make_stack([spec]).public()
    seen_by_round = []
    for number, d in enumerate(data, 1):
        o = observe(model, d, defenses=(public,), round=number, labels=d.y)
        ctx = RoundContext(0, number, (0,), torch.ones(1))
        seen_by_round.append(replace(o, update=registry.make_stack([spec]).clients(o.update[None], ctx)[0]))
    attack = registry.make_attack("idlg:adapt=true,steps=300")
    found = attack.many(seen_by_round, [torch.Generator().manual_seed(i) for i in range(3)])
    for f, d in zip(found, data, strict=True):
        assert (f.x - d.x).square().mean() < 1e-3


def test_labels_that_were_not_sent_are_searched():
    data, model = replace(tiny_examples(1), y=torch.tensor([2])), tiny_model()
    whole = observe(model, data, defenses=(TOPK,))
    update = whole.update.clone()
    assert not labels_hidden(whole)
    without_another = whole.update.clone()
    without_another[-4] = 0.0
    assert not labels_hidden(replace(whole, update=without_another)), "the label's own entry is there"
    update[[-4, -2]] = 0.0  # of the last bias: those of classes 0 and 2
    hidden = replace(whole, update=update)
    assert labels_hidden(hidden)
    assert not labels_hidden(replace(hidden, defenses=()))
    attack = registry.make_attack("idlg:adapt=true,steps=400,restarts=8")
    (found,) = attack.many([hidden], [torch.Generator()])
    assert found.y.tolist() == data.y.tolist()
    assert "labels, which the defense hides" in found.adaptation
    (wrong,) = registry.make_attack("idlg:steps=5").many([hidden], [torch.Generator()])
    assert wrong.y.tolist() != data.y.tolist()


def test_mixtures_have_label_distributions():
    """Half and half of two images of two classes: the mixture comes back where its label is searched."""
    two = tiny_examples(2, seed=3)
    assert two.y[0] != two.y[1]
    x, y = two.x.mean(0, keepdim=True), nn.functional.one_hot(two.y, 4).float().mean(0, keepdim=True)
    model = tiny_model()
    o = observe(model, Examples(x, y), defenses=({"name": "mixup", "alpha": 1.0},))
    (found,) = registry.make_attack("idlg:adapt=true,steps=400").many([o], [torch.Generator()])
    assert (found.x - x).square().mean() < 1e-3
    assert "mixtures" in found.adaptation
    (blind,) = registry.make_attack("idlg:steps=400").many([o], [torch.Generator()])
    assert (blind.x - x).square().mean() > 1e-2


def said(observation, loss=0.0):
    return " | ".join(diagnose(observation, loss, 1.0))


def test_a_matched_update_of_a_healthy_model_needs_no_word():
    assert said(seen()) == ""


@pytest.mark.parametrize(
    ("observation", "loss", "words"),
    [
        (seen(), float("inf"), "diverged"),
        (seen(), 0.12, "12.0% of a zero update's distance is left"),
        (seen(CLIP, NOISE), 0.0, "noise of norm"),
        (seen(local=None), 0.0, "local training is unknown"),
        (observe(tiny_model(), tiny_examples(13)), 0.0, "batch of 13 is larger than the rank 12"),
    ],
)
def test_reasons(observation, loss, words):
    assert words in said(observation, loss)


def test_noise_is_not_taken_for_a_failed_search():
    assert "not matched" not in said(seen(CLIP, NOISE), 0.5)


def test_dead_units_and_batch_norm():
    model = tiny_model()
    with torch.no_grad():
        model[1].bias[:6] = -1000.0
    assert "50% of the first layer's units are dead" in said(seen(model=model))
    normed = nn.Sequential(nn.Flatten(), nn.Linear(25, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    assert "BatchNorm uses the statistics of the batch" in said(seen(model=normed))
    assert said(seen(model=normed.eval())) == ""


@pytest.mark.parametrize(
    ("distance", "blind"),
    [(squared, scaled), (relative, aligned), (Masked(squared), Masked(scaled)), (max, cosine)],
)
def test_a_clip_that_acted_takes_the_scale_away(distance, blind):
    short = observe(tiny_model(), tiny_examples(4), defenses=(CLIP | {"norm": 0.01},))
    clipped = replace(short, update=0.01 * short.update / short.update.norm())
    assert adapt(clipped, distance, 0.1).distance == blind
    untouched = adapt(replace(clipped, defenses=(CLIP,)), distance, 0.1)
    assert (untouched.distance, untouched.about) == (distance, "the clip did not act")
    thinned = adapt(replace(clipped, defenses=(CLIP, TOPK)), distance, 0.1)
    assert thinned.distance == Masked(blind), "shorter, and clipped"
    of_many = adapt(replace(clipped, defenses=(CLIP,), clients=2), distance, 0.1)
    assert of_many.distance == blind


def test_public_images_say_how_much_neighbours_differ():
    rough = tiny_examples(50, 3)
    down, right = rough.x.diff(dim=2).abs().mean(), rough.x.diff(dim=3).abs().mean()
    expected = float(down + right) / 2
    known = adapt(seen(CLIP, NOISE, auxiliary=rough), cosine, 0.1)
    assert known.tv == pytest.approx(4 * 25 / expected, rel=1e-5)
    assert expected > 0.2


def test_noise_of_the_server_is_not_on_a_message_and_attacks_know():
    """A message that is attacked as if the server's noise were on it looks safe and is not."""
    defenses = ("clip:norm=0.5", "gaussian:noise_multiplier=1,placement=server")
    attack = "idlg:adapt=true,steps=150,restarts=2"
    scene = {"data": "digits", "model": "softmax", "victims": 2, "defenses": defenses, "attack": attack}
    stages = {t: audit.Stage(audit.Scene(**scene, threat=t)) for t in ("server", "aggregate")}
    assert noise_std(stages["server"].look(0).observation) == 0
    assert noise_std(stages["aggregate"].look(0).observation) == pytest.approx(0.5)
    assert audit.run(audit.Scene(**scene)).report["metrics"]["psnr_db"]["mean"] > 40
