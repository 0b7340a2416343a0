"""What an attack that matches gradients refuses before its first iteration, in one sentence each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fltoolkit.errors import InputError, require
from fltoolkit.inversion.client import one_step
from fltoolkit.types import Observation


def check_observation(observation: Observation) -> None:
    """Refuse an update that no search can match: of another shape, not finite, or with impossible labels."""
    o, layout = observation, observation.layout
    for name, row in (("params", o.params), ("update", o.update)):
        if row.shape != (layout.size,):
            got = tuple(row.shape)
            raise InputError(f"{name} must be a row of {layout.size} numbers, got shape {got}")
        bad = layout.first_non_finite(row)
        if bad is not None:
            raise InputError(f"{name} must be finite, got NaN or infinity in layer {bad!r}")
    if o.labels is not None:
        good = o.labels.shape == (o.num_examples,) and not o.labels.is_floating_point()
        if not good or int(o.labels.min()) < 0 or int(o.labels.max()) >= o.num_classes:
            raise InputError(
                f"labels must be {o.num_examples} integers in 0..{o.num_classes - 1}, got {o.labels.tolist()}"
            )


def check_auxiliary(observation: Observation, attack: str, purpose: str) -> None:
    """Refuse to learn from public data that are not there, or not of the kind of what is attacked."""
    o, public, shape = observation, observation.auxiliary, tuple(observation.input_shape)
    if public is None:
        raise InputError(
            f"attack {attack} needs public auxiliary data to {purpose}, got none: it comes from a data set's "
            "test split, which digits, mnist, fashion-mnist, cifar10 and femnist have"
        )
    got = tuple(public.x.shape[1:])
    fits = public.x.is_floating_point() and got == shape and len(public) > 0
    require(fits, "auxiliary inputs", f"real numbers of shape {shape}", (public.x.dtype, got))
    low, high = int(public.y.min()), int(public.y.max())
    require(low >= 0 and high < o.num_classes, "auxiliary labels", f"in 0..{o.num_classes - 1}", (low, high))


def check_searchable(observation: Observation) -> None:
    """Refuse a model or loss whose gradient cannot be differentiated by the input, and name the layer."""
    o = observation
    low, high = o.input_range
    x = torch.linspace(low, high, o.num_examples * torch.Size(o.input_shape).numel(), device=o.params.device)
    x = x.reshape(o.num_examples, *o.input_shape).requires_grad_()
    y = torch.arange(o.num_examples, device=x.device) % o.num_classes
    try:
        slope = _second_order(o, x, y)
    except RuntimeError as e:
        layer = _culprit(o, x.detach())
        where = f"layer {layer}" if layer else "model or loss"
        raise InputError(
            f"model must be differentiable twice to be inverted, but {where} is not: {str(e).splitlines()[0]}"
        ) from e
    if slope is None:
        raise InputError("loss must depend on the input through the model, but its gradient does not")


def stackable(observation: Observation) -> bool:
    """Whether guesses can be evaluated as one `torch.func` program, which custom autograd functions in the
    old style and reading values in Python prevent."""
    o = observation
    params = {n: p[None] for n, p in o.layout.unflatten(o.params).items()}
    buffers = {n: b.clone()[None] for n, b in o.model.named_buffers()}
    x = torch.zeros(1, o.num_examples, *o.input_shape, device=o.params.device)
    y = torch.zeros(1, o.num_examples, dtype=torch.long, device=x.device)
    try:
        vmap(one_step(o.model, o.loss))(params, buffers, x, y)
    except RuntimeError:
        return False
    return True


def _second_order(o: Observation, x: Tensor, y: Tensor) -> Tensor | None:
    """∂/∂x of the sum of the parameters' gradients of the loss; None where they do not depend on x."""
    params = {n: p.requires_grad_() for n, p in o.layout.unflatten(o.params.clone()).items()}
    buffers = {n: b.clone() for n, b in o.model.named_buffers()}
    value = o.loss(functional_call(o.model, (params, buffers), (x,)), y).mean()
    if not value.requires_grad:
        return None
    found = torch.autograd.grad(value, list(params.values()), create_graph=True, allow_unused=True)
    used = [g.sum() for g in found if g is not None and g.requires_grad]
    if not used:
        return None
    # Not autograd.grad(..., x): that would pass by a layer which only fails on the way to its own leaves.
    torch.stack(used).sum().backward()
    return x.grad


def _culprit(o: Observation, x: Tensor) -> str:
    """The first layer without children that alone cannot be differentiated twice, as `name (Class)`."""
    seen: dict[str, tuple[nn.Module, Tensor]] = {}
    leaves = [(n, m) for n, m in o.model.named_modules() if not list(m.children())]
    hooks = [
        m.register_forward_pre_hook(lambda m, inputs, n=n: seen.update({n: (m, inputs[0].detach().clone())}))
        for n, m in leaves
    ]
    buffers = {n: b.clone() for n, b in o.model.named_buffers()}
    try:
        functional_call(o.model, (o.layout.unflatten(o.params), buffers), (x,))
    except RuntimeError:
        pass
    finally:
        for h in hooks:
            h.remove()
    for name, (module, inputs) in seen.items():
        if not _twice_differentiable(module, inputs):
            return f"{name!r} ({type(module).__name__})"
    return ""


def _twice_differentiable(module: nn.Module, inputs: Tensor) -> bool:
    if not inputs.is_floating_point():
        return True
    v = inputs.clone().requires_grad_()
    state = {n: t.clone() for n, t in module.named_buffers()}
    try:
        # The product with v keeps a second derivative even where the layer is linear.
        out = functional_call(module, state, (v * 1.0,))
        (first,) = torch.autograd.grad((out * out).sum(), v, create_graph=True)
        first.sum().backward()
    except RuntimeError:
        return False
    return True
