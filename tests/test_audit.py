"""The audit from both doors: scenes and updates from elsewhere; the report and its schema."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from conftest import plain_gradient, tiny_examples, tiny_model
from torch import nn

from attacks.idlg import IDLG
from fltoolkit import audit
from fltoolkit.audit import Scene, Stage, UpdateSpec, run
from fltoolkit.data import load
from fltoolkit.data.dataset import Dataset
from fltoolkit.defense import Defense
from fltoolkit.errors import InputError
from fltoolkit.loss import cross_entropy
from fltoolkit.report.document import schema
from fltoolkit.types import Examples, LocalSpec

ROOT = Path(__file__).parents[1]
QUICK = "idlg:steps=40,restarts=2"
SMALL = {"attack": QUICK, "data": "digits", "model": "mlp"}


def stable(report):
    """A report without what may differ between two equal runs."""
    return {k: v for k, v in report.items() if k not in ("seconds", "victim_seconds", "command")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"victims": 3, "batch": 2},
        {"clients": 3, "threat": "aggregate", "defenses": ("clip:norm=0.5", "gaussian:noise_multiplier=1")},
        {"defenses": ("secagg:clients=2",)},
        {"local": LocalSpec(2, 1, 0.1), "batch": 2},
    ],
)
def test_reports_follow_the_schema(changes):
    report = run(Scene(**(SMALL | changes))).report
    jsonschema.validate(json.loads(json.dumps(report, allow_nan=False)), schema())
    assert len(report["metrics"]["psnr_db"]["values"]) == report["victims"]


def test_schema_refuses_what_is_not_a_report():
    report = run(Scene(**SMALL)).report
    for broken in (
        report | {"schema": "fltoolkit.audit/0"},
        report | {"surprise": 1},
        {k: v for k, v in report.items() if k != "epsilon"},
        report | {"epsilon": report["epsilon"] | {"message": "inf"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema())
    jsonschema.Draft202012Validator.check_schema(schema())


def test_same_seed_same_numbers_in_two_processes(capsys):
    code = (
        "from fltoolkit.audit import Scene, run; import json;"
        f"r = run(Scene(attack={QUICK!r}, data='digits', model='mlp', victims=2, seed=5,"
        "defenses=('clip:norm=0.5', 'gaussian:placement=client'))).report;"
        "print(json.dumps({k: r[k] for k in ('metrics', 'matching_loss', 'iterations')}))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    exec(code, {})
    assert other.stdout == capsys.readouterr().out
    assert json.loads(other.stdout)["metrics"]["psnr_db"]["values"]


def test_another_seed_gives_other_numbers():
    first, second = (run(Scene(**SMALL, seed=s)).report for s in (0, 1))
    assert first["metrics"] != second["metrics"]


def test_a_defense_moves_no_other_stream():
    """Data, model and attack start are the same with and without a clip that touches nothing."""
    plain = run(Scene(**SMALL, victims=2)).report
    clipped = run(Scene(**SMALL, victims=2, defenses=("clip:norm=1e6",))).report
    assert stable(plain) | {"defenses": []} == stable(clipped) | {"defenses": []}


def test_victims_are_different_images_and_different_models():
    stage = Stage(Scene(victims=4))
    images = torch.cat([stage.private(v)[0].x for v in range(4)])
    assert torch.cdist(images.flatten(1), images.flatten(1)).add(torch.eye(4) * 9).min() > 0.5
    weights = [next(stage.model(v).parameters()) for v in range(4)]
    assert not torch.equal(weights[0], weights[1])
    everyone = torch.cat([stage.private(v)[0].y for v in range(100)])
    assert sorted(everyone.tolist()) == list(range(100))


def test_score_is_of_all_images_in_the_mix():
    result = run(Scene(**SMALL, clients=3, threat="aggregate"))
    assert len(result.victims[0].truth) == 3
    single = run(Scene(**SMALL, clients=3, threat="server"))
    assert len(single.victims[0].truth) == 1


@pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
@pytest.mark.parametrize("form", ["row", "mapping", "arrays"])
def test_update_from_elsewhere_in_every_form(kind, form):
    """A plain PyTorch training step, without our training core, gives its image away."""
    model, data = tiny_model(), tiny_examples(1)
    gradient = plain_gradient(model, data)
    params = nn.utils.parameters_to_vector(model.parameters()).detach()
    row = {"gradient": gradient, "delta": -0.1 * gradient, "weights": params - 0.1 * gradient}[kind]
    names = [n for n, _ in model.named_parameters()]
    arrays = [
        p.reshape(q.shape).numpy()
        for p, q in zip(row.split([q.numel() for q in model.parameters()]), model.parameters(), strict=True)
    ]
    mapping = {n: torch.from_numpy(a) for n, a in zip(names, arrays, strict=True)}
    given = {"row": row, "mapping": mapping, "arrays": arrays}[form]
    spec = UpdateSpec(1, (1, 5, 5), 4, kind=kind, local=LocalSpec(1, None, 0.1))
    found = audit.update(model, nn.CrossEntropyLoss(), given, spec)
    assert found.y.tolist() == data.y.tolist()
    assert (found.x - data.x).square().mean() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update": torch.zeros(7)}, r"update must be a row of 364 numbers, got \(7,\)"),
        ({"update": [np.zeros((12, 25))]}, "update must hold 4 arrays, got 1"),
        ({"update": {}}, r"update must hold every trainable parameter, got none for '1\.weight'"),
        ({"update": torch.full((364,), torch.nan)}, r"got NaN or infinity in layer '1\.weight'"),
        ({"kind": "difference"}, "kind must be one of"),
        ({"num_examples": 0}, "num_examples must be >= 1, got 0"),
        ({"input_shape": (1, 4, 4)}, "model must accept inputs of shape"),
        ({"num_classes": 9}, "model must give 9 logits"),
        ({"attack": "gld"}, "unknown attack 'gld'"),
    ],
)
def test_update_that_does_not_fit_is_refused(change, message):
    values = {"num_examples": 1, "input_shape": (1, 5, 5), "num_classes": 4} | change
    given = values.pop("update", torch.zeros(364))
    with pytest.raises(InputError, match=message):
        audit.update(tiny_model(), cross_entropy, given, UpdateSpec(**values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be >= 1, got 0"),
        ({"batch": 101}, "batch must be at most the data's 100 examples over 1 clients, got 101"),
        ({"batch": 26, "clients": 4}, "100 examples over 4 clients, got 26"),
        ({"victims": 0}, "victims must be >= 1, got 0"),
        ({"clients": 0}, "clients must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"delta": 2.0}, "delta must be between 0 and 1"),
        ({"threat": "sever"}, "unknown threat model 'sever'; did you mean 'server'"),
        ({"model": "lnet"}, "unknown model 'lnet'"),
        ({"device": "quantum"}, "device must be one that PyTorch can use here, got 'quantum'"),
        ({"local": LocalSpec(0)}, "epochs must be >= 1, got 0"),
        ({"local": LocalSpec(1, 0)}, "local batch must be"),
        ({"local": LocalSpec(1, None, -1.0)}, "lr must be a finite number > 0"),
        (
            {"defenses": ("secagg:clients=4",), "clients": 2},
            "secagg:clients must equal the round's cohort of 2",
        ),
        ({"model": tiny_model()}, r"model must accept inputs of shape \(3, 32, 32\)"),
        ({"loss": nn.CrossEntropyLoss()}, r"loss must give one value an example, shape \(2,\), got \(\)"),
    ],
)
def test_impossible_scenes_stop_before_work(change, message, monkeypatch):
    monkeypatch.setattr(audit, "play", None)
    with pytest.raises(InputError, match=message):
        run(Scene(**change))


def test_labels_outside_the_models_classes_are_refused():
    few = Dataset("few", Examples(torch.rand(4, 1, 5, 5), torch.tensor([0, 1, 2, 9])), None, 4)
    with pytest.raises(InputError, match=r"labels must be in 0\.\.3 for 4 classes, got 0\.\.9"):
        run(Scene(data=few, model=tiny_model()))


def test_nan_in_a_model_is_named_with_its_layer():
    model = tiny_model()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    data = Dataset("few", tiny_examples(8), None, 4)
    with pytest.raises(InputError, match=r"got NaN or infinity in layer '3\.weight'"):
        run(Scene(data=data, model=model))


def test_ready_objects_work_as_names_do():
    data = load("digits")
    by_object = run(Scene(attack=IDLG(steps=40, restarts=2), data=data, model="mlp")).report
    assert stable(by_object) == stable(run(Scene(**SMALL)).report)


def test_a_defense_from_a_third_party_needs_no_change_here():
    class Zero(Defense):
        name = "zero"

        def clients(self, rows, ctx):
            return torch.zeros_like(rows)

    report = run(Scene(**SMALL, defenses=[Zero()])).report
    assert report["defenses"] == [{"name": "zero"}]
    assert report["metrics"]["psnr_gain_db"]["mean"] < 1


def test_defenses_on_examples_act_in_an_audit():
    """Two examples' gradients, no longer than 1e-3 each: nor is their mean, unless noise is added."""
    scene = Scene(data="digits", model="softmax", batch=2, defenses=("clip:level=example,norm=1e-3",))
    transcript, public = Stage(scene).round(0)
    assert 0 < float(transcript.messages[0].norm()) <= 1e-3 * (1 + 1e-5)
    assert [d["name"] for d in public.defenses] == ["clip"]
    noise = "gaussian:level=example,noise_multiplier=1"
    noisy, public = Stage(replace(scene, defenses=(*scene.defenses, noise))).round(0)
    assert float(noisy.messages[0].norm()) > 5e-3
    assert [d["name"] for d in public.defenses] == ["clip", "gaussian"]
