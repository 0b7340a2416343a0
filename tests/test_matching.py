"""The stacked matching loss against ordinary double backward, and what the engine promises."""

from __future__ import annotations

import pytest
import torch
from conftest import observe, plain_gradient, tiny_examples, tiny_model
from torch import nn

from attacks.dlg import DLG
from attacks.idlg import IDLG
from fltoolkit.errors import InputError
from fltoolkit.inversion.matching import GradientMatching
from fltoolkit.types import Examples


def plain_matching(model, target, x, logits):
    """Zhu et al. 2019, eq. 3, for one guess, by autograd through autograd."""
    x, logits = x.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(x), logits.softmax(-1))
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    distance = (torch.cat([g.flatten() for g in grads]) - target).square().sum()
    return distance.detach(), torch.autograd.grad(distance, (x, logits))


@pytest.mark.parametrize("chunk", [2**25, 400])
def test_equals_double_backward_of_each_victim(chunk, monkeypatch):
    monkeypatch.setattr("fltoolkit.inversion.matching.CHUNK_FLOATS", chunk)
    models = [tiny_model(s) for s in range(3)]
    batches = [tiny_examples(2, s) for s in range(3)]
    owner = torch.tensor([0, 0, 1, 2])
    problem = GradientMatching([observe(m, b) for m, b in zip(models, batches, strict=True)], owner, None)
    z = torch.randn(4, problem.variables)
    loss, gradient = problem(z, torch.arange(4))
    for s, v in enumerate(owner.tolist()):
        x, logits = z[s, :50].view(2, 1, 5, 5), z[s, 50:].view(2, 4)
        expected, (gx, gy) = plain_matching(models[v], plain_gradient(models[v], batches[v]), x, logits)
        torch.testing.assert_close(loss[s], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient[s], torch.cat([gx.flatten(), gy.flatten()]), rtol=1e-4, atol=1e-6)


def test_is_zero_at_the_truth():
    model, data = tiny_model(), tiny_examples(2)
    problem = GradientMatching([observe(model, data)], torch.tensor([0]), data.y[None])
    loss, _ = problem(data.x.flatten()[None], torch.tensor([0]))
    assert loss.item() < 1e-12
    assert problem.scale.item() == pytest.approx(plain_gradient(model, data).square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("attack", [DLG(), IDLG()], ids=["dlg", "idlg"])
def test_recovers_single_examples_and_their_labels(attack):
    victims = [(tiny_model(s), tiny_examples(1, s)) for s in range(4)]
    rngs = [torch.Generator().manual_seed(s) for s in range(4)]
    for (_, data), found in zip(victims, attack.many([observe(*v) for v in victims], rngs), strict=True):
        assert found.y.tolist() == data.y.tolist()
        assert (found.x - data.x).square().mean() < 1e-4
        assert found.loss == pytest.approx(found.restart_losses.min().item())


def test_restart_with_a_broken_start_never_costs_the_result(monkeypatch):
    """Every restart but one begins at NaN; the result is that one's."""
    from fltoolkit.inversion import base

    honest = base.noise

    def sabotaged(*args):
        z = honest(*args)
        z[1:] = torch.nan
        return z

    monkeypatch.setattr(base, "noise", sabotaged)
    model, data = tiny_model(), tiny_examples(1)
    found = IDLG()(observe(model, data), torch.Generator().manual_seed(0))
    assert (found.x - data.x).square().mean() < 1e-4
    assert torch.isinf(found.restart_losses[1:]).all()


def test_attack_of_a_victim_does_not_depend_on_its_company():
    victims = [observe(tiny_model(s), tiny_examples(1, s)) for s in range(3)]
    attack = IDLG(steps=60)
    together = attack.many(victims, [torch.Generator().manual_seed(s) for s in range(3)])
    alone = attack(victims[1], torch.Generator().manual_seed(1))
    torch.testing.assert_close(together[1].x, alone.x, rtol=1e-2, atol=1e-3)


def test_groups_that_do_not_fit_in_memory_are_run_one_after_the_other(monkeypatch):
    victims = [observe(tiny_model(s), tiny_examples(1, s)) for s in range(3)]
    monkeypatch.setattr("fltoolkit.inversion.search.GROUP_FLOATS", 1.0)
    found = IDLG().many(victims, [torch.Generator().manual_seed(s) for s in range(3)])
    assert [f.y.item() for f in found] == [tiny_examples(1, s).y.item() for s in range(3)]


def test_idlg_reads_different_labels_of_a_batch():
    model = tiny_model()
    data = Examples(tiny_examples(3).x, torch.tensor([3, 0, 2]))
    assert IDLG().infer_labels(observe(model, data)).tolist() == [0, 2, 3]


def test_known_labels_are_used():
    model, data = tiny_model(), tiny_examples(1)
    found = DLG(steps=5)(observe(model, data, labels=data.y), torch.Generator().manual_seed(0))
    assert found.y.tolist() == data.y.tolist()


def test_update_with_nan_is_refused_by_layer():
    model, data = tiny_model(), tiny_examples(1)
    seen = observe(model, data)
    bad = seen.update.clone()
    bad[-1] = torch.nan
    with pytest.raises(InputError, match=r"update must be finite, got NaN or infinity in layer '3\.bias'"):
        DLG()(observe(model, data, update=bad), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("field", ["steps", "restarts", "history", "tolerance", "start_std"])
def test_impossible_options_are_refused(field):
    with pytest.raises(InputError, match=f"{field} must be"):
        DLG(**{field: -1})
