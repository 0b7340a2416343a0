"""A user's own data: tensors in a file, or PyTorch data sets."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils import data as torch_data

from fltoolkit.data.dataset import Dataset
from fltoolkit.data.files import read_npz
from fltoolkit.errors import InputError, require, unknown
from fltoolkit.loss import IGNORE
from fltoolkit.types import Examples

MOST_CLASSES = 1 << 22
"""A greater label is rather somebody's id or hash than a number from 0 on."""

KEYS = ("x", "y", "client", "x_test", "y_test", "num_classes")


def load_tensors(path: str) -> Dataset:
    """PATH.npz without pickles, or PATH.pt with a dict; in it x `[N, ...]` and y `[N]`, and where there are
    any client `[N]`, x_test, y_test and the number num_classes. Raises InputError for anything else.

    x: images are `[N, C, H, W]`. uint8 is divided by 255, `input_range` (0, 1). Floats and booleans become
    float32 as they are, `input_range` their least and greatest in training. Other integers are token ids,
    `input_range` from 0 to the greatest id there is.
    y: classes `[N]`, or the tokens `[N, T]` to predict from x `[N, T]`, -100 where there is none.
    client: integers or strings, numbered 0..K-1 in sorted order.
    num_classes: by default what the labels need. Of tokens, x counts as well, and the last id,
    num_classes - 1, is padding and has no label.
    """
    content = _read(path)
    name = f"tensors:{path}"
    wanted = ("x", "y", "x_test", "y_test") if {"x_test", "y_test"} & {*content} else ("x", "y")
    if missing := [key for key in wanted if key not in content]:
        raise InputError(
            f"data {name!r} must hold {' and '.join(missing)}, got {', '.join(content) or 'none'}"
        )
    for key in content:
        if key not in KEYS:
            unknown(f"key of data {name!r}:", key, KEYS)
    test = (content["x_test"], content["y_test"]) if "x_test" in content else None
    return _assemble(
        name, (content["x"], content["y"]), test, content.get("client"), content.get("num_classes")
    )


def from_torch(
    train: torch_data.Dataset[Any],
    test: torch_data.Dataset[Any] | None = None,
    *,
    clients: Sequence[int] | Sequence[str] | np.ndarray | Tensor | None = None,
    name: str = "torch",
    num_classes: int | None = None,
) -> Dataset:
    """Map-style PyTorch data sets of (x, y) or (x, y, client), read once from first to last.

    x: a tensor, a NumPy array, or a PIL image, which becomes uint8 `[1, H, W]` if grey and `[3, H, W]`
    otherwise; all of one shape and type. Values, y and clients mean what they mean in `load_tensors`.
    clients `[N_train]`: the client of each training item, where the items do not say. Raises InputError
    for anything else; what the data sets raise passes through.
    """
    x, y, own = _collect(f"train of data {name!r}", train)
    if own is not None and clients is not None:
        raise InputError(f"clients must be None where items of {name!r} are (x, y, client), got both")
    pair = None if test is None else _collect(f"test of data {name!r}", test)[:2]
    return _assemble(name, (x, y), pair, own if clients is None else clients, num_classes)


def load_torch(argument: str) -> Dataset:
    """What `module:function` returns, called without arguments: a Dataset of this library, a PyTorch data
    set, or a pair (train, test) of those. Raises InputError where there is no such function or it returns
    something else."""
    module, _, function = argument.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as e:
        raise InputError(f"data must name an importable module:function, got {argument!r}: {e}") from e
    if not callable(make):
        raise InputError(f"data {argument!r} must be a function, got {type(make).__name__}")
    made = make()
    if isinstance(made, Dataset):
        return made
    train, test = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    return from_torch(train, test, name=f"torch:{argument}")


def _read(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    if file.suffix == ".npz":
        return dict(read_npz(file))
    if file.suffix != ".pt":
        raise InputError(f"data tensors:PATH must end in .npz or .pt, got {path!r}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # OSError, RuntimeError, UnpicklingError, ... by where the file is broken
        first = (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(f"data file must be readable by torch.load, got {path!r}: {first}") from e
    if not isinstance(content, dict):
        raise InputError(f"data file {path!r} must hold a dict of tensors, got {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _collect(where: str, data: Any) -> tuple[Tensor, Tensor, list[Any] | None]:
    """x `[N, ...]`, y `[N, ...]` and the clients, if items name them, of a map-style data set."""
    mapped = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not mapped or isinstance(data, torch_data.IterableDataset | dict):
        kind = type(data).__name__
        raise InputError(f"{where} must be a map-style torch data set, with len and items, got {kind}")
    items = [data[i] for i in range(len(data))]
    if not items:
        raise InputError(f"{where} must hold examples, got none")
    sizes = {len(item) if isinstance(item, tuple | list) else 1 for item in items}
    if len(sizes) != 1 or not sizes <= {2, 3}:
        raise InputError(f"{where} must give (x, y) or (x, y, client), got {sorted(sizes)} values an item")
    columns = list(zip(*items, strict=True))
    x = _stack(f"x in {where}", [_input(f"x in {where}", x) for x in columns[0]])
    y = _stack(f"y in {where}", [_tensor(f"y in {where}", y) for y in columns[1]])
    named = [c.item() if isinstance(c, Tensor) else c for c in columns[2]] if len(columns) == 3 else None
    return x, y, named


def _input(where: str, x: Any) -> Tensor:
    if isinstance(x, Image.Image):
        if x.mode[0] in "IF":
            raise InputError(f"{where} must be images of 8 bits, got a PIL image of mode {x.mode!r}")
        pixels = np.array(x.convert("L" if x.mode in ("1", "L", "LA") else "RGB"))
        return torch.from_numpy(pixels.reshape(x.height, x.width, -1)).permute(2, 0, 1)
    if not isinstance(x, Tensor | np.ndarray):
        raise InputError(f"{where} must be tensors, NumPy arrays or PIL images, got {type(x).__name__}")
    return _tensor(where, x)


def _stack(where: str, items: Sequence[Tensor]) -> Tensor:
    kinds = [(tuple(t.shape), t.dtype) for t in items]
    odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    if odd is not None:
        raise InputError(f"{where} must all be like the first, {kinds[0]}, got {kinds[odd]} in item {odd}")
    return torch.stack(list(items))


def _tensor(where: str, values: Any) -> Tensor:
    try:
        if isinstance(values, np.ndarray):
            return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C"))
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"{where} must be numbers, got {type(values).__name__}: {e}") from e
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _assemble(name: str, train: tuple[Any, Any], test: Any, clients: Any, num_classes: Any) -> Dataset:
    parts = [_part(name, "", *train)] + ([] if test is None else [_part(name, "_test", *test)])
    kinds = [(tuple(p.x.shape[1:]), p.x.dtype, tuple(p.y.shape[1:])) for p in parts]
    if kinds[-1] != kinds[0]:
        raise InputError(f"test of data {name!r} must be like train, {kinds[0]}, got {kinds[-1]}")
    classes = _classes(name, parts, num_classes)
    first = parts[0].x
    bounds = (0.0, 1.0)
    if first.dtype == torch.float32:
        bounds = (float(first.min()), float(first.max()))
        if bounds[0] == bounds[1]:
            raise InputError(f"x of data {name!r} must hold more than one value, got {bounds[0]} everywhere")
    elif first.dtype == torch.int64:
        bounds = (0.0, classes - 1.0 if parts[0].y.dim() == 2 else float(max(p.x.max() for p in parts)))
    final = [Examples(p.x.float().div_(255) if p.x.dtype == torch.uint8 else p.x, p.y) for p in parts]
    owners = _clients(f"client of data {name!r}", clients, len(first))
    return Dataset(name, final[0], final[1] if test is not None else None, classes, bounds, owners)


def _part(name: str, suffix: str, x: Any, y: Any) -> Examples:
    """Training or test examples with x uint8, float32 or int64, and y int64, both checked."""
    inputs = _inputs(f"x{suffix} of data {name!r}", x)
    labels = _labels(f"y{suffix} of data {name!r}", y)
    if len(inputs) != len(labels):
        lengths = f"{len(inputs)} and {len(labels)}"
        raise InputError(f"x{suffix} and y{suffix} of data {name!r} must be of one length, got {lengths}")
    if labels.dim() == 2 and (inputs.dtype != torch.int64 or inputs.shape != labels.shape):
        got = f"x {tuple(inputs.shape)} {inputs.dtype} and y {tuple(labels.shape)}"
        raise InputError(f"y{suffix} of data {name!r} must be [N], or [N, T] for tokens x [N, T], got {got}")
    return Examples(inputs, labels)


def _inputs(where: str, values: Any) -> Tensor:
    x = _tensor(where, values)
    if x.dim() < 2 or not x.numel():
        raise InputError(f"{where} must be [N, ...] with N >= 1, got shape {tuple(x.shape)}")
    if x.is_complex():
        raise InputError(f"{where} must be real, got {x.dtype}")
    if x.is_floating_point() or x.dtype == torch.bool:
        x = x.float()
        if bad := int((~x.isfinite()).sum()):
            raise InputError(f"{where} must be finite, got NaN or infinity in {bad} places")
    elif x.dtype != torch.uint8:
        x = x.long()
        require(int(x.min()) >= 0, where, "token ids >= 0 (or uint8, or floats)", int(x.min()))
    return x


def _labels(where: str, values: Any) -> Tensor:
    y = _tensor(where, values)
    if y.is_floating_point() or y.is_complex() or y.dim() not in (1, 2):
        raise InputError(f"{where} must be integers [N] or [N, T], got {y.dtype} of shape {tuple(y.shape)}")
    y = y.long()
    negative = y[(y < 0) & (y != IGNORE)] if y.dim() == 2 else y[y < 0]
    if len(negative):
        or_none = f" (or {IGNORE} for no label)" if y.dim() == 2 else ""
        raise InputError(f"{where} must be >= 0{or_none}, got {int(negative.min())}")
    if len(y) and bool((y == IGNORE).all()):
        raise InputError(f"{where} must hold a label, got none but {IGNORE}")
    return y


def _classes(name: str, parts: Sequence[Examples], wanted: Any) -> int:
    """num_classes as wanted, if that is enough, or else what is needed."""
    needed, why = 1 + max(int(p.y.max()) for p in parts), "one above the greatest label"
    if parts[0].y.dim() == 2:
        needed, why = max(needed, 1 + max(int(p.x.max()) for p in parts)), "so that the last id is padding"
        needed += any(bool(((p.x == needed - 1) & (p.y != IGNORE)).any()) for p in parts)
    most = f"an integer below {MOST_CLASSES}, labels numbered from 0"
    require(needed <= MOST_CLASSES, f"greatest label or token id of data {name!r}", most, needed - 1)
    if wanted is None:
        return needed
    try:
        count = operator.index(wanted.item() if hasattr(wanted, "item") else wanted)
    except (TypeError, ValueError, RuntimeError):
        count = 0
    require(count >= needed, f"num_classes of data {name!r}", f"an integer >= {needed}, {why}", wanted)
    return count


def _clients(where: str, clients: Any, count: int) -> Tensor | None:
    """Integers or strings `[N]` -> 0..K-1 in sorted order."""
    if clients is None:
        return None
    try:
        ids = clients.cpu().numpy() if isinstance(clients, Tensor) else np.asarray(list(clients))
    except (TypeError, ValueError) as e:
        raise InputError(f"{where} must be integers or strings, got {type(clients).__name__}: {e}") from e
    if ids.dtype.kind not in "biuUS" or ids.shape != (count,):
        raise InputError(f"{where} must be {count} integers or strings, got {ids.dtype} {ids.shape}")
    return torch.from_numpy(np.unique(ids, return_inverse=True)[1].astype(np.int64))
