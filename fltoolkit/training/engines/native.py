"""`kernels.c`, compiled once for the processor at hand, and what it is called by.

MKL leaves half of the vector width of an AMD processor unused and small products cost it more; these kernels
reach two to three times its speed there. Where there is no C compiler, or FLTOOLKIT_NATIVE is 0, `library` is
None and everything runs on PyTorch alone, to the same numbers but for rounding.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import torch
from platformdirs import user_cache_path
from torch import Tensor

SWITCH = "FLTOOLKIT_NATIVE"
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
LANES = 16
"""Floats in a vector of `kernels.c`."""

KINDS = ("linear", "relu", "sigmoid", "tanh")
"""Activations in the order of the enumeration in `kernels.c`."""

_Pointer, _Long, _Float, _Int = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_Pointers = ctypes.POINTER(ctypes.c_void_p)
_SIGNATURES: dict[str, list[object]] = {
    "fl_forward": [*[_Pointer] * 3, *[_Long] * 3, _Int, _Pointer],
    "fl_below": [*[_Pointer] * 2, *[_Long] * 3, _Pointer],
    "fl_step": [*[_Pointer] * 2, *[_Long] * 3, _Pointer, _Float, _Float],
    "fl_step_bias": [_Pointer, *[_Long] * 2, _Pointer, _Float, _Float],
    "fl_lstm": [*[_Pointer] * 4, *[_Long] * 3, *[_Pointer] * 4],
    "fl_lstm_back": [*[_Pointer] * 7, *[_Long] * 3, *[_Pointer] * 3],
    "fl_lstm_short": [*[_Pointer] * 5, *[_Long] * 3, *[_Pointer] * 5],
    "fl_lstm_back_short": [*[_Pointer] * 7, *[_Long] * 3, *[_Pointer] * 3],
    "fl_relu_pool": [_Pointer, *[_Long] * 4, *[_Pointer] * 2],
    "fl_relu_pool_short": [_Pointer, *[_Long] * 4, *[_Pointer] * 2],
    "fl_unpool_short": [*[_Pointer] * 2, *[_Long] * 4, _Pointer],
    "fl_conv_pool_grad_short": [*[_Pointer] * 3, *[_Long] * 9, *[_Pointer] * 3],
    "fl_conv_pool_back": [*[_Pointer] * 4, *[_Long] * 9, *[_Pointer] * 7],
    "fl_train_dense": [
        *[_Pointer] * 3,
        *[_Long] * 3,
        _Int,
        *[ctypes.POINTER(_Long), ctypes.POINTER(_Int)],
        *[_Pointers] * 4,
        *[_Float] * 3,
        _Pointer,
    ],
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had or are switched off."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if os.environ.get(SWITCH) == "0" or compiler is None:
        return None
    source = files("fltoolkit.training.engines").joinpath("kernels.c").read_text(encoding="utf-8")
    key = sha256("\n".join((source, compiler, *FLAGS, _processor())).encode()).hexdigest()[:16]
    try:
        path = user_cache_path("fltoolkit", ensure_exists=True) / f"kernels-{key}.so"
        if not path.exists():
            _compile(compiler, source, path)
        found = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, signature in _SIGNATURES.items():
        if hasattr(found, name):  # those for tiles are missing where the processor has none
            function = getattr(found, name)
            function.argtypes, function.restype = signature, None
    return found


@cache
def tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 and the kernels can be had."""
    return library() is not None and bool(_library().fl_tiles())


def _processor() -> str:
    """What tells processors apart that need machine code of their own."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: str, source: str, path: Path) -> None:
    """Compile `source` to `path`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        text, made = Path(folder) / "kernels.c", Path(folder) / "kernels.so"
        text.write_text(source, encoding="utf-8")
        for tuned in (["-march=native"], ["-mcpu=native"], []):
            command = [compiler, *FLAGS, *tuned, str(text), "-o", str(made), "-lm"]
            if subprocess.run(command, capture_output=True, timeout=120).returncode == 0:
                made.replace(path)
                return
    raise subprocess.SubprocessError(f"{compiler} cannot compile kernels.c")


def fits(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels can be had and take these tensors: of that dtype, on the CPU, rows without gaps."""
    return library() is not None and all(
        t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous() for t in tensors
    )


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found


def call(name: str, *given: Tensor | int) -> None:
    """Call a kernel, with pointers in place of tensors."""
    getattr(_library(), name)(*(g.data_ptr() if isinstance(g, Tensor) else g for g in given))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b of x `[n, in]`, W `[out, in]`."""
    y = x.new_empty(len(x), len(weight))
    b = None if bias is None else bias.data_ptr()
    at = (x.data_ptr(), weight.data_ptr(), b)
    _library().fl_forward(*at, len(x), x.shape[1], len(weight), 0, y.data_ptr())
    return y


def below(d: Tensor, weight: Tensor) -> Tensor:
    """d W of d `[n, out]`, W `[out, in]`."""
    g = d.new_empty(len(d), weight.shape[1])
    _library().fl_below(d.data_ptr(), weight.data_ptr(), len(d), *reversed(weight.shape), g.data_ptr())
    return g


def step(d: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, beta: float, alpha: float) -> None:
    """W ← β W + α dᵀ x and b ← β b + α Σ d, in place."""
    at, out = (d.data_ptr(), x.data_ptr()), len(weight)
    _library().fl_step(*at, len(d), x.shape[1], out, weight.data_ptr(), beta, alpha)
    if bias is not None:
        _library().fl_step_bias(d.data_ptr(), len(d), out, bias.data_ptr(), beta, alpha)


def relu_pool(z: Tensor) -> tuple[Tensor, Tensor]:
    """The 2x2 maxima of relu(z), z `[n, c, h, w]` in float32 or bfloat16 and channels-last memory, and where
    in its window each is."""
    (n, c, h, w), short = z.shape, z.dtype == torch.bfloat16
    y = torch.empty((n, c, h // 2, w // 2), dtype=z.dtype, memory_format=torch.channels_last)
    which = torch.empty_like(y, dtype=torch.int16 if short else torch.int32)
    pool = _library().fl_relu_pool_short if short else _library().fl_relu_pool
    pool(z.data_ptr(), n, h, w, c, y.data_ptr(), which.data_ptr())
    return y, which


def unpool(d: Tensor, which: Tensor, height: int, width: int) -> Tensor:
    """The gradient by z `[n, c, height, width]` of relu_pool(z), given that by its maxima, d
    `[n, c, height // 2, width // 2]`; all in bfloat16 and channels-last memory."""
    n, c = d.shape[:2]
    z = torch.empty((n, c, height, width), dtype=d.dtype, memory_format=torch.channels_last)
    _library().fl_unpool_short(d.data_ptr(), which.data_ptr(), n, height, width, c, z.data_ptr())
    return z


def conv_pool_back(
    x: Tensor, weight: Tensor, d: Tensor, which: Tensor, padding: tuple[int, int], below: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients by the images x, the weight and the bias of relu_pool(conv(x)), given that by its output, d;
    the first if `below`. All four are in channels-last memory."""
    (n, c, h, w), (out, _, kh, kw), (ph, pw) = x.shape, weight.shape, padding
    gx, gw, gb = torch.empty_like(x) if below else None, torch.empty_like(weight), d.new_empty(out)
    room = (h + 2 * ph) * (w + 2 * pw) * c + LANES
    wide, gwide = d.new_empty(room), d.new_empty(room if below else 0)
    values, offsets = d.new_empty(d[0].numel()), which.new_empty(d[0].numel())
    _library().fl_conv_pool_back(
        *(t.data_ptr() for t in (x, weight, d, which)),
        *(n, h, w, c, out, kh, kw, ph, pw),
        None if gx is None else gx.data_ptr(),
        *(t.data_ptr() for t in (gw, gb, wide, gwide, values, offsets)),
    )
    return gx, gw, gb


FEW = 32
"""Weights of an output channel up to which a gradient is summed faster here than as a product."""


def few(weight: Tensor) -> bool:
    """Whether `conv_pool_grad` serves a convolution with the weights `[out, in, kh, kw]`."""
    return weight[0].numel() <= FEW and len(weight) % LANES == 0


def conv_pool_grad(
    x: Tensor, weight: Tensor, d: Tensor, which: Tensor, padding: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gradients in float32 by the weight `[out, in, kh, kw]` and the bias of relu_pool(conv(x)), given that
    by its output, d; x, d in bfloat16 and all in channels-last memory."""
    (n, c, h, w), (out, _, kh, kw), (ph, pw) = x.shape, weight.shape, padding
    x = x.float()
    gw, gb, wide = x.new_empty(kh, kw, c, out), x.new_empty(out), x.new_empty(h + 2 * ph, w + 2 * pw, c)
    _library().fl_conv_pool_grad_short(
        *(t.data_ptr() for t in (x, d, which)),
        *(n, h, w, c, out, kh, kw, ph, pw),
        *(t.data_ptr() for t in (gw, gb, wide)),
    )
    return gw.permute(3, 2, 0, 1), gb


def train_dense(
    x: Tensor,
    y: Tensor,
    order: Tensor,
    batch: int,
    epochs: int,
    layers: Sequence[tuple[Tensor, Tensor | None]],
    kinds: Sequence[str],
    velocities: Sequence[tuple[Tensor, Tensor | None]],
    lr: float,
    momentum: float,
    decay: float,
) -> None:
    """One client's SGD, in place, on x `[n, in]`, y `[n]` in the order `[n]` of their indices: the layers'
    weights `[out, in]` and biases `[out]`, and, with momentum, their velocities (else none are given)."""
    widths = [x.shape[1], *(len(w) for w, _ in layers)]
    if [w.shape[1] for w, _ in layers] != widths[:-1]:
        raise ValueError(f"inputs of {widths[0]} values for a layer of {layers[0][0].shape[1]}")
    if y.shape != x.shape[:1] or y.dtype != torch.int64 or not 0 <= int(y.min()) <= int(y.max()) < widths[-1]:
        raise ValueError(f"labels must be {len(x)} classes from 0 to {widths[-1] - 1}")
    batch = min(batch, len(x))
    scratch = x.new_empty(batch * (sum(widths) + 2 * max(widths[1:])))

    def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * len(layers))(*(None if t is None else t.data_ptr() for t in tensors))

    pairs = [*zip(*layers, strict=True), *zip(*(velocities or layers), strict=True)]
    _library().fl_train_dense(
        x.data_ptr(),
        y.data_ptr(),
        order.data_ptr(),
        len(x),
        batch,
        epochs,
        len(layers),
        (ctypes.c_long * len(widths))(*widths),
        (ctypes.c_int * len(kinds))(*map(KINDS.index, kinds)),
        *map(pointers, pairs),
        lr,
        momentum,
        decay,
        scratch.data_ptr(),
    )
