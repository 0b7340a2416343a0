"""Execute the notebooks of this folder from clean, in the environment of the interpreter that runs this.

    python notebooks/run.py                    # all of them; changes nothing
    python notebooks/run.py 01_first_leak      # one, by its name or how its name begins
    python notebooks/run.py --write            # all of them, and keep the outputs

Exit code 1 with the cell's error where one fails; the first failure ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fltoolkit.errors import InputError
from fltoolkit.report.files import write_atomic

FOLDER = Path(__file__).resolve().parent
KERNEL = "fltoolkit-run"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ENCRYPTED = {"KernelManager": {"transport_encryption": "auto"}}
"""What is said to the kernel over local ports is encrypted, where the libraries can do so."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def chosen(folder: Path, names: Sequence[str]) -> list[Path]:
    """The notebooks of `folder` that the names mean, all where there is none, in order."""
    known = sorted(folder.glob("*.ipynb"))
    for name in names:
        if not any(_means(name, path) for path in known):
            raise InputError(f"NAME must begin one of {', '.join(p.stem for p in known)}, got {name!r}")
    return [p for p in known if not names or any(_means(n, p) for n in names)]


def _means(name: str, path: Path) -> bool:
    return bool(name) and path.stem.startswith(Path(name).name.removesuffix(".ipynb"))


def cleared(document: dict[str, Any]) -> dict[str, Any]:
    """A notebook without outputs, whose cells have names that stay and whose metadata name no machine."""
    cells = []
    taken = {c["id"] for c in document["cells"] if "id" in c}
    for number, cell in enumerate(document["cells"], 1):
        kept = {k: v for k, v in cell["metadata"].items() if k == "tags"}
        new = {**cell, "id": cell.get("id") or _free(f"cell-{number}", taken), "metadata": kept}
        if cell["cell_type"] == "code":
            new |= {"outputs": [], "execution_count": None}
        cells.append(new)
    return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "-b"
    taken.add(name)
    return name


def executed(document: dict[str, Any], folder: Path, timeout: int) -> dict[str, Any]:
    """A cleared notebook with what its cells put out when run in `folder`, at most `timeout` seconds a cell.
    Raises what nbclient raises where a cell fails, takes too long or ends the kernel."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from traitlets.config import Config

    with tempfile.TemporaryDirectory() as kernels:
        _write_kernel(Path(kernels) / KERNEL)
        specs = KernelSpecManager(kernel_dirs=[kernels], ensure_native_kernel=False)
        client = NotebookClient(
            nbformat.reads(json.dumps(document), as_version=4),
            km=AsyncKernelManager(kernel_spec_manager=specs, kernel_name=KERNEL, config=Config(ENCRYPTED)),
            timeout=timeout,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        done = client.execute()
    return {**json.loads(nbformat.writes(done)), "metadata": METADATA}


def _write_kernel(folder: Path) -> None:
    """A kernel that is this interpreter, whatever other environments have installed; one thread unless asked
    for more, so that numbers do not depend on how many cores there are."""
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {
        "argv": [*argv, "--HistoryManager.hist_file=:memory:"],
        "display_name": KERNEL,
        "language": "python",
        "metadata": {"supported_encryption": ["curve"]},
        "env": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    }
    folder.mkdir()
    (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")


def run(path: Path, write: bool, timeout: int) -> str | None:
    """Execute one notebook; None, or in words what went wrong. With `write` its outputs are kept."""
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import CellControlSignal, CellTimeoutError, DeadKernelError

    document = cleared(json.loads(path.read_text(encoding="utf-8")))
    try:
        done = executed(document, path.parent, timeout)
    except (CellControlSignal, CellTimeoutError, DeadKernelError, NoSuchKernel) as e:
        return ANSI.sub("", str(e)).strip()
    if write:
        text = json.dumps(done, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        write_atomic(path, lambda p: _write(p, text))
    return None


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None, folder: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks to run (default: all)")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebooks")
    parser.add_argument("--timeout", type=int, default=600, metavar="S", help="most seconds a cell may take")
    o = parser.parse_args(argv)
    try:
        import ipykernel  # noqa: F401
        import nbclient  # noqa: F401
    except ImportError as e:
        print(f"error: running notebooks needs pip install -e .[notebooks], got: {e}", file=sys.stderr)
        return 2
    try:
        paths = chosen(folder, o.names)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for path in paths:
        begun = time.perf_counter()
        wrong = run(path, o.write, o.timeout)
        print(f"{path.stem}: {time.perf_counter() - begun:.1f} s", flush=True)
        if wrong is not None:
            print(f"{path.stem} failed:\n{wrong}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
