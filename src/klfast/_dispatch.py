"""Which backend runs a call, and what can be asked about it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ._arrays import Rows, dtype_name
from ._operations import OPERATIONS, parse_metric
from .errors import BackendUnavailable

__all__ = [
    "Backend",
    "BackendStatus",
    "Result",
    "backends",
    "compiled",
    "get_num_threads",
    "select",
    "set_num_threads",
    "warmup",
]

# Where each backend lives, and the devices whose memory it takes; the host's goes to a GPU if that
# backend is asked for by name.
MODULES = {
    "cpu": "klfast.kernels.cpu",
    "cuda": "klfast.kernels.cuda",
    "reference": "klfast._reference_backend",
}
DEVICES = {"cpu": ("cpu",), "cuda": ("cpu", "cuda"), "reference": ("cpu",)}
CHOICES = ("auto", *MODULES)


class Backend(Protocol):
    """What the module of a backend offers. Values are float64, in nats, one a row.

    All rows are on the host, but those of `evaluate`, `differentiate`, `normalize` and what ends in
    `_on_device`, which only the backend of a device has.
    """

    __name__: str

    def available(self) -> str | None:
        """Return None, or why the backend cannot be used here."""

    def run(
        self,
        name: str,
        p: Rows,
        q: Rows | None,
        parameters: tuple[float, ...],
        rows: NDArray[np.int64] | None,
        out: NDArray[np.float64],
        tokens: NDArray[np.int64] | None = None,
    ) -> None:
        """Write the values of one operation into `out`, for the row numbers in `rows`."""

    def log_softmax(self, x: Rows, rows: NDArray[np.int64] | None, out: Rows) -> None:
        """Write log-probabilities into the memory of `out`."""

    def compare(
        self,
        metrics: Sequence[tuple[str, tuple[float, ...]]],
        p: Rows,
        q: Rows,
        rows: NDArray[np.int64] | None,
        tokens: NDArray[np.int64] | None,
    ) -> list[NDArray[np.float64]]:
        """Return the values of many operations, from one read of main memory."""

    def gradient(
        self,
        name: str,
        p: Rows,
        q: Rows | None,
        parameters: tuple[float, ...],
        rows: NDArray[np.int64] | None,
        out: NDArray[np.float64],
        scale: NDArray[np.float64],
        into_p: Rows | None,
        into_q: Rows | None,
    ) -> None:
        """Write values into `out`, and their gradients times `scale` into logits' like memory."""

    def shard(
        self,
        metrics: Sequence[tuple[str, tuple[float, ...]]],
        p: Rows,
        q: Rows | None,
        rows: NDArray[np.int64] | None,
        tokens: NDArray[np.int64] | None,
        symmetric: bool = False,
        alone: bool = True,
    ) -> tuple[list[NDArray[np.float64]], NDArray[np.float64] | None, list[NDArray[np.float64]]]:
        """Return what is known of rows that are parts of wider ones.

        Of each batch the largest entry m as it is given, L = log sum exp((x - m)/T) and the index
        of m, as three columns: NaN where a row is no part of a distribution, -inf, 0 and -1 where
        all of it is -inf. Of two batches Lx - Ly, as exact as the rows are close, and where
        `symmetric` the same but for its sign when they change places, and good enough for results
        that it enters as it is. L is relatively exact if asked for `alone`, or by a metric, and
        else as exact as a mass has to be. Values of the metrics within the parts, of "log_power:A",
        the Rényi divergence whose multiples have exact exponentials, and of "top_ratio_p" and
        "top_ratio_q", the entries as they are given where log(p/q) is largest.
        """

    def partial_sums(
        self,
        metrics: Sequence[tuple[str, tuple[float, ...]]],
        p: Rows,
        q: Rows,
        rows: NDArray[np.int64] | None,
        normalizers: NDArray[np.float64],
    ) -> list[NDArray[np.float64]]:
        """Return these rows' shares of "tv" or "js" of the whole rows whose parts they are.

        `normalizers` has m and L of the whole rows of p, of q, and Lx - Ly, as columns.
        """

    def shard_on_device(
        self,
        metrics: Sequence[tuple[str, tuple[float, ...]]],
        p: Rows,
        q: Rows | None,
        where: Any,
        tokens: Any,
    ) -> tuple[list[NDArray[np.float64]], NDArray[np.float64] | None, list[NDArray[np.float64]]]:
        """Return on the host what `shard` does; `where` and `tokens` are CuPy's pointers."""

    def partial_sums_on_device(
        self,
        metrics: Sequence[tuple[str, tuple[float, ...]]],
        p: Rows,
        q: Rows,
        where: Any,
        normalizers: NDArray[np.float64],
    ) -> list[NDArray[np.float64]]:
        """Return on the host what `partial_sums` does; `normalizers` is on the host too."""

    def evaluate(
        self,
        metrics: Sequence[tuple[str, tuple[float, ...]]],
        p: Rows,
        q: Rows | None,
        where: Any,
        tokens: Any,
        results: Sequence[Result],
    ) -> None:
        """Queue the results of many operations; `where` and `tokens` are CuPy's pointers."""

    def differentiate(
        self,
        metric: tuple[str, tuple[float, ...]],
        p: Rows,
        q: Rows | None,
        where: Any,
        result: Result,
        scales: Any,
        into: Mapping[str, Rows],
    ) -> None:
        """Queue the values of an operation and its gradients, by side; `scales` as `where`."""

    def normalize(self, x: Rows, where: Any, out: Rows) -> None:
        """Queue the log-probabilities of all entries."""

    def explain(self, name: str, p: Rows, q: Rows | None) -> dict[str, object]:
        """Return what `run` would do for a metric: kernel, passes, threads."""

    def set_num_threads(self, count: int) -> None:
        """Use this many threads from now on."""

    def get_num_threads(self) -> int:
        """Return how many threads are used."""

    def warmup(self, names: Sequence[str], dtypes: Sequence[str]) -> None:
        """Compile, or load from the disk cache, what these operations need."""

    def info(self) -> dict[str, object]:
        """Return what `klfast info` shows."""


class Result(NamedTuple):
    """Where a device puts the values of an operation: one a row, or only their sum or mean."""

    rows: Rows  # of one entry
    unit: float = 1.0  # of the result, in nats
    reduction: str = "none"  # "none", "sum" or "mean"


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Whether a backend can be used; true in a condition if so. `reason` says why not."""

    name: str
    reason: str | None

    @property
    def usable(self) -> bool:
        """Whether calls can run on it."""
        return self.reason is None

    def __bool__(self) -> bool:
        return self.usable

    def __repr__(self) -> str:
        return "usable" if self.reason is None else f"not usable: {self.reason}"


# Backends that were selected before, by name and device: a warning is given once.
_selected: dict[tuple[str, str], Backend] = {}


def load(name: str) -> Backend:
    """Import a backend, or raise BackendUnavailable with the reason."""
    module = MODULES[name]
    try:
        backend = cast(Backend, import_module(module))
        reason = backend.available()
    except ModuleNotFoundError as error:
        if error.name == module:
            reason = f"this version of klfast has no {name} kernels"
        else:
            extras = ' (pip install "klfast[cuda12]" or "klfast[cuda13]")'
            reason = f"{error.name} is not installed{extras if error.name == 'cupy' else ''}"
    except Exception as error:  # whatever a broken installation raises is the reason
        reason = f"importing it raised {type(error).__name__}: {error}"
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} cannot be used: {reason}")
    return backend


def select(name: str, device: str) -> Backend:
    """Return the backend for `backend=name` and arrays on `device`, loading it the first time.

    "auto" takes the compiled backend of the device. Where that one cannot be used, arrays on the
    host fall back to the reference, with one RuntimeWarning a process; others have no fallback,
    because nothing moves between host and device silently.
    """
    backend = _selected.get((name, device))
    if backend is None:
        backend = _selected[name, device] = _first_selection(name, device)
    return backend


def _first_selection(name: str, device: str) -> Backend:
    if name not in CHOICES:
        raise ValueError(f"backend is {name!r}; accepted: {', '.join(map(repr, CHOICES))}")
    family = device.partition(":")[0]
    if name != "auto":
        backend = load(name)
        if family not in DEVICES[name]:
            raise BackendUnavailable(
                f"backend {name!r} reads memory of {' and '.join(DEVICES[name])}, and the arrays "
                f"are on {device}; nothing is moved between devices unasked"
            )
        return backend
    if family not in MODULES:
        raise BackendUnavailable(f"no backend reads arrays on {device}; accepted: cpu, cuda")
    try:
        return load(family)
    except BackendUnavailable as error:
        if family != "cpu":
            raise BackendUnavailable(
                f"the arrays are on {device}, and {error}; move them to the host yourself to "
                "have them read there"
            ) from None
        warnings.warn(
            f"klfast runs on its slow NumPy reference, because {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return load("reference")


def compiled() -> Any | None:
    """The kernels outside the operation table, or None where only NumPy can be used."""
    if select("auto", "cpu").__name__ != MODULES["cpu"]:
        return None
    return import_module(f"{MODULES['cpu']}.family")


def backends() -> dict[str, BackendStatus]:
    """Return which backends are usable, and why the others are not.

    The values are true where usable, hold the `reason` otherwise, and print as either. Asking
    imports the backends.
    """
    statuses = {}
    for name in MODULES:
        try:
            load(name)
            reason = None
        except BackendUnavailable as error:
            reason = str(error).partition("cannot be used: ")[2]
        statuses[name] = BackendStatus(name, reason)
    return statuses


def set_num_threads(threads: int) -> None:
    """Set how many threads the CPU backend uses, from 1 to the number of processors.

    Only klfast's own setting changes, for the calls of this process. The number of threads never
    changes a bit of a result. Raises BackendUnavailable where the CPU backend cannot be used.
    """
    if isinstance(threads, bool) or not hasattr(threads, "__index__"):
        raise TypeError(f"threads is {threads!r}; accepted: a whole number from 1")
    count = operator.index(threads)
    if count < 1:
        raise ValueError(f"threads is {count}; accepted: a whole number from 1")
    load("cpu").set_num_threads(count)


def get_num_threads() -> int:
    """Return how many threads the CPU backend uses."""
    return load("cpu").get_num_threads()


def warmup(
    metrics: str | Sequence[str] | None = None,
    dtypes: Any = ("float32",),
    *,
    backend: str = "auto",
) -> None:
    """Compile now, or load from the disk cache, what later calls would compile on first use.

    `metrics` are names as for `compare`, or of any other function in the operation table; None is
    all of them. Parameters such as the order of a Rényi divergence are run-time arguments: "renyi"
    serves every order. `dtypes` are those of the arrays to come.
    """
    if metrics is None:
        names = tuple(OPERATIONS)
    else:
        given = (metrics,) if isinstance(metrics, str) else metrics
        names = tuple(
            dict.fromkeys(
                text if text in OPERATIONS else parse_metric(text)[0].name for text in given
            )
        )
    wanted = (dtypes,) if isinstance(dtypes, str) or not hasattr(dtypes, "__len__") else dtypes
    select(backend, "cuda" if backend == "cuda" else "cpu").warmup(
        names, tuple(dtype_name(dtype, "dtypes") for dtype in wanted)
    )
