"""Attacks on secure sums: they get the target's update exactly where nothing stops them, and nothing else."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_examples, tiny_model
from torch import nn

from attacks.difference import Difference
from attacks.disaggregation import Disaggregation
from attacks.inconsistency import Inconsistency, suppressed
from attacks.isolation import Isolation
from fltoolkit.audit import Scene, Stage, run
from fltoolkit.data import Dataset
from fltoolkit.errors import InputError
from fltoolkit.loss import cross_entropy
from fltoolkit.threat import Public
from fltoolkit.types import Layout, LocalSpec

DATA = Dataset("few", tiny_examples(40), None, 4)
IDLG = "idlg:restarts=2"


def test_a_target_that_dropped_out_is_not_taken_for_another():
    """Client 0 is the target, the first of those who are left is not."""
    for seed in range(20):
        stage = Stage(
            scene("inconsistency", 4, "secagg:dropout=0.5,bind=false,threshold=0.1", relu_model(), seed=seed)
        )
        look = stage.look(0)
        if look.observation is None:
            assert "target dropped out" in look.stopped
            assert torch.equal(look.truth.x, stage.private(0)[0].x)
            return
        assert torch.equal(look.truth.x, stage.private(0)[0].x)
    pytest.fail("nobody ever dropped out")


def relu_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(25, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )


def scene(attack, clients=6, defense="secagg", model=None, **changes):
    return Scene(
        attack=attack,
        data=DATA,
        model=model or tiny_model(),
        clients=clients,
        defenses=(defense,) if defense else (),
        **changes,
    )


def honest(stage):
    """The target's own update, by a round without defenses or mischief."""
    plain = Stage(Scene(data=DATA, model=stage.scene.model, clients=stage.clients, local=stage.scene.local))
    transcript, _ = plain.round(0)
    return transcript.updates.delta[0]


def exposed(attack, **changes):
    stage = Stage(scene(attack, **changes))
    look = stage.look(0)
    if look.observation is None:
        return None, look.stopped, stage
    found, words = attack.expose(look.observation)
    return found, words, stage


# --- isolation ------------------------------------------------------------------------------------------


def test_isolation_gets_the_update_of_one_where_the_threshold_lets_it():
    found, _, stage = exposed(Isolation(), defense="secagg:threshold=0.1")
    assert found.clients == 1
    assert (found.update - honest(stage)).abs().max() < 1e-6


def test_isolation_is_stopped_by_the_threshold():
    found, reason, _ = exposed(Isolation())
    assert found is None
    assert "had its round given up: clients that answered in round 'masked input'" in reason


def test_isolation_recovers_the_image_or_guesses_grey():
    weak = run(scene(Isolation(inner=IDLG, steps=200), defense="secagg:threshold=0.1"))
    assert weak.report["metrics"]["psnr_db"]["mean"] > 40
    assert weak.report["threat"] == "isolating"
    strong = run(scene(Isolation(inner=IDLG, steps=200)))
    assert strong.report["metrics"]["psnr_gain_db"]["mean"] <= 0
    assert strong.report["notes"][0].startswith("stopped: client")


# --- inconsistency --------------------------------------------------------------------------------------


def public_of(model):
    return Public(model, cross_entropy, Layout.of(model), (1, 5, 5), (0.0, 1.0), 4, ())


@pytest.mark.parametrize("make", [relu_model, tiny_model])
def test_crafted_parameters_leave_silent_coordinates_alone_whatever_the_data(make):
    model = make()
    layout = Layout.of(model)
    crafted, silent = suppressed(layout.row(model), public_of(model))
    assert silent.double().mean() > (0.9 if make is relu_model else 0.5)
    for seed in range(20):
        data = tiny_examples(6, 50 + seed)
        row = crafted.clone().requires_grad_()
        logits = torch.func.functional_call(model, layout.unflatten(row), (data.x,))
        gradient = torch.autograd.grad(cross_entropy(logits, data.y).mean(), row)[0]
        assert not gradient[silent].any()
        assert gradient[~silent].any()


@pytest.mark.parametrize("steps", [1, 4])
def test_the_sum_over_silent_coordinates_is_the_targets_update(steps):
    local = LocalSpec(epochs=steps, lr=0.5)
    found, _, stage = exposed(
        Inconsistency(), defense="secagg:bind=false", model=relu_model(), clients=4, local=local
    )
    seen = found.update != 0
    assert seen.double().mean() > 0.3
    assert (found.update - honest(stage))[seen].abs().max() < 1e-6
    assert found.defenses[-1]["name"] == "suppression"
    truth = stage.private(0)[0].y
    assert found.labels.tolist() == truth.tolist()


def test_inconsistency_is_stopped_where_keys_are_bound_to_the_model():
    found, reason, _ = exposed(Inconsistency(), model=relu_model())
    assert found is None
    assert "given up" in reason


def test_inconsistency_recovers_the_image_of_one_of_many():
    attack = Inconsistency(inner="inverting:tv=0", steps=1500, restarts=4)
    open_ = run(scene(attack, defense="secagg:bind=false", clients=8, model=relu_model()))
    assert open_.report["metrics"]["psnr_gain_db"]["mean"] > 10
    assert "only the target moves" in open_.report["adaptations"][0]
    bound = run(scene(attack, clients=8, model=relu_model()))
    assert bound.report["metrics"]["psnr_gain_db"]["mean"] <= 0


def test_a_model_that_cannot_be_silenced_is_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 25))

        def forward(self, x):
            return x.flatten(1) @ self.scale.T

    with pytest.raises(InputError, match="model must have a layer that can be silenced"):
        suppressed(torch.ones(100), public_of(Own()))


# --- several rounds -------------------------------------------------------------------------------------


def test_the_difference_of_two_sums_is_the_targets_update():
    found, words, stage = exposed(Difference(), clients=7)
    assert (found.update - honest(stage)).abs().max() < 1e-5
    assert (found.clients, found.num_examples) == (1, 1)
    assert words == "the target's update out of 2 sums over 7 clients, known participants"


@pytest.mark.parametrize("hidden", [False, True])
def test_many_sums_are_solved_for_the_target(hidden):
    found, words, stage = exposed(Disaggregation(hidden=hidden), clients=6)
    assert (found.update - honest(stage)).abs().max() < 1e-5
    assert ("found from their counts" in words) == hidden


def test_too_few_sums_are_not_claimed_to_be_solved():
    found, words, _ = exposed(Disaggregation(rounds=3), clients=8)
    assert found is None
    assert words == "3 sums over 8 clients, known participants: rank 3, the target is not determined"
    result = run(scene(Disaggregation(rounds=3, inner=IDLG), clients=8))
    assert result.report["metrics"]["psnr_gain_db"]["mean"] <= 0


def test_sums_tell_how_many_examples_the_target_has():
    found, _, _ = exposed(Difference(), clients=4, batch=3)
    assert found.num_examples == 3


def test_noise_on_the_sum_is_what_stops_it():
    """Each sum is noisy, and their difference more so."""
    defenses = ("clip:norm=1", "gaussian:noise_multiplier=1,placement=client", "secagg:range=64")
    stage = Stage(Scene(attack=Difference(), data=DATA, model=tiny_model(), clients=6, defenses=defenses))
    found, _ = Difference().expose(stage.look(0).observation)
    clean = honest(stage)
    cosine = torch.nn.functional.cosine_similarity(found.update, clean, dim=0)
    assert cosine < 0.5


def test_what_the_attacks_hold_names_participants_or_counts_and_never_both():
    seen = Stage(scene(Disaggregation(hidden=True))).look(0).observation.history
    assert seen.participants is None
    assert seen.counts.shape == (10, 6)
    known = Stage(scene(Disaggregation())).look(0).observation.history
    assert torch.equal(known.counts, torch.stack([known.participants[list(w)].sum(0) for w in known.windows]))
    assert known.participants[0, 0]


def test_a_threat_model_beside_an_attack_that_brings_its_own_is_refused():
    with pytest.raises(InputError, match="threat must be left out for isolation, which is 'isolating', got"):
        Stage(scene(Isolation(), threat="server"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1, got 0.0"),
        ({"window": 0}, "window must be >= 1, got 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Disaggregation(**options)
