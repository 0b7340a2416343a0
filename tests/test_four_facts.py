"""Four facts about leakage that the pipeline must reproduce, with numbers.

One face-sized photograph through the sigmoid LeNet, batch 1; DLG with few restarts, as everywhere.
"""

from __future__ import annotations

from functools import cache
from math import sqrt

import pytest

from fltoolkit.audit import Scene, run


@cache
def measure(*defenses, threat="server", clients=None, attack="idlg:restarts=2,steps=900"):
    return run(Scene(attack=attack, defenses=defenses, threat=threat, clients=clients, seed=1)).report


def psnr(report):
    return report["metrics"]["psnr_db"]["mean"]


def undefended():
    return psnr(measure())


def test_undefended_update_leaks_its_image():
    report = measure()
    assert 33 < undefended() < 60
    assert report["metrics"]["psnr_gain_db"]["mean"] > 15
    assert report["metrics"]["label_accuracy"]["mean"] == 1.0
    assert report["epsilon"]["message"] is None
    assert report["epsilon"]["aggregate"] is None


def test_clipping_hurts_plain_dlg_but_epsilon_stays_infinite():
    report = measure("clip:norm=0.5", attack="dlg:restarts=2,steps=900")
    assert psnr(report) < 16
    assert undefended() - psnr(report) > 15
    assert report["epsilon"]["message"] is None
    assert report["epsilon"]["aggregate"] is None


def test_clipping_does_not_stop_an_attack_that_knows_of_it():
    report = measure("clip:norm=0.5", attack="idlg:adapt=true,restarts=2,steps=900")
    assert psnr(report) > 30
    assert "blind to scale" in report["adaptations"][0]


def test_central_noise_leaves_the_servers_view_as_if_undefended():
    """The clip is wide enough to touch nothing, so that the noise alone is judged."""
    report = measure("clip:norm=1000", "gaussian:noise_multiplier=1.0,placement=server")
    assert psnr(report) == pytest.approx(undefended(), abs=1e-6)
    assert report["epsilon"]["message"] is None
    assert report["epsilon"]["aggregate"] == pytest.approx(4.377178, rel=1e-3)


def test_aggregate_of_several_clients_with_noise_fails():
    report = measure(
        "clip:norm=0.5", "gaussian:noise_multiplier=1.0,placement=server", threat="aggregate", clients=4
    )
    assert psnr(report) < 16
    assert report["metrics"]["psnr_gain_db"]["mean"] < 1
    assert report["metrics"]["success_rate"]["value"] == 0.0


def test_secure_aggregation_over_one_client_leaks_it_whole():
    report = measure("secagg:clients=1")
    assert report["clients"] == 1
    assert psnr(report) == pytest.approx(undefended(), abs=6)
    assert psnr(report) > 30


def test_secure_aggregation_over_four_clients_shows_only_their_mean():
    report = measure("secagg:clients=4")
    assert report["clients"] == 4
    assert report["metrics"]["psnr_gain_db"]["mean"] < 3
    assert report["epsilon"]["message"] is None


def test_client_noise_protects_every_view():
    report = measure("clip:norm=0.5", "gaussian:noise_multiplier=1.0,placement=client", clients=4)
    assert psnr(report) < 16
    assert report["epsilon"]["message"] == pytest.approx(4.377178, rel=1e-3)
    assert report["epsilon"]["aggregate"] < report["epsilon"]["message"] / sqrt(2)
