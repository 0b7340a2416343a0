"""How much arithmetic a round of federated averaging is, and how fast this machine could do it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fltoolkit.models.text import PeepholeLstm


def forward_flops(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Floating-point operations of `model` on the batch `x`, a multiplication and an addition being two: of
    all linear, convolutional and LSTM layers, and of the first of them alone."""
    counts: list[float] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, PeepholeLstm):
            steps = inputs[0].shape[0] * inputs[0].shape[1]
            counts.append(2.0 * steps * (layer.input_weight.numel() + layer.hidden_weight.numel()))
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            places = output.numel() // layer.weight.shape[0]
            counts.append(2.0 * places * layer.weight.numel())

    hooks = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts), counts[0] if counts else 0.0


def round_flops(model: nn.Module, x: Tensor, clients: int, examples: int, epochs: int) -> float:
    """A round's: forward, and twice that backward, save the gradient by the input of the first layer. x: one
    example."""
    every, first = forward_flops(model, x)
    return clients * examples * epochs * (3 * every - (0 if has_embedding(model) else first))


def has_embedding(model: nn.Module) -> bool:
    """Whether the first layer's input has a gradient, an embedding being before it."""
    return any(isinstance(m, nn.Embedding) for m in model.modules())


def peak_flops(repeats: int = 10) -> dict[str, float]:
    """Operations a second of the fastest of `repeats`, in float32, of two kernels.

    mm: a large matrix product by `torch.mm`. conv: a 5x5 convolution of ten 14x14 images, 32 to 64 channels,
    which oneDNN does. Both are needed: where `torch.mm` does not use the widest instructions a processor has
    (MKL on AMD processors with AVX-512), a convolution is more than twice as fast, and a floor by `torch.mm`
    alone would be none.
    """
    a, b, out = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.empty(2048, 2048)
    image = torch.randn(10, 32, 14, 14).contiguous(memory_format=torch.channels_last)
    layer = nn.Conv2d(32, 64, 5, padding=2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        return {
            "mm": _fastest(lambda: torch.mm(a, b, out=out), 2.0 * 2048**3, repeats),
            "conv": _fastest(lambda: layer(image), forward_flops(layer, image)[0], 10 * repeats),
        }


def _fastest(work: Callable[[], object], flops: float, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return flops / min(seconds[1:])


def busy_share(seconds: float) -> float:
    """The share of all processors' time that was used while this process slept for `seconds`; nan where
    the system does not tell."""
    before = _processor_times()
    time.sleep(seconds)
    used, every = (b - a for a, b in zip(before, _processor_times(), strict=True))
    return used / every if every else float("nan")


def _processor_times() -> tuple[int, int]:
    """Used and total ticks since the start, by /proc/stat: user, nice, system, idle, waiting, ..."""
    try:
        ticks = [int(t) for t in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return 0, 0
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def wait_until_quiet(share: float = 0.1, each: float = 0.5, patience: float = 120.0) -> float:
    """Sleep until less than `share` of the processors' time is used, `patience` seconds at most; returns the
    share at the end, nan where unknown. Two threads that wait for each other at every layer become many
    times slower when a third process wants one of two processors."""
    deadline = time.monotonic() + patience
    while (busy := busy_share(each)) >= share and time.monotonic() < deadline:
        pass
    return busy
