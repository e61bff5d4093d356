"""Every function with a range of parameters, on kernels and reference, and how close they must be.

What the tests of accuracy and of laws share.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from distributions import Cases
from numpy.typing import NDArray

import klfast
from klfast import reference
from klfast._operations import OPERATIONS, Operation, Parameter

INF = math.inf
VALUES: dict[str, tuple[float, ...]] = {
    "alpha": (0.0, 0.1, 0.5, 0.9, 1 - 1e-6, 1.0, 1 + 1e-6, 2.0, 20.0, INF),
    "weight": (0.0, 1e-6, 0.5, 0.999, 1.0),
    "k": (1.0, 2.0),
}

Values = NDArray[np.float64]

#: Where a result may as well be infinite.
BEYOND = 1e307


def measures() -> list[Any]:
    """Every operation of the table with each of the parameters above, as test parameters."""
    found = []
    for operation in OPERATIONS.values():
        values = [
            [value for value in VALUES[parameter.name] if accepts(parameter, value)]
            for parameter in operation.parameters
        ]
        for parameters in itertools.product(*values):
            name = ":".join([operation.name, *map(repr, parameters)])
            found.append(pytest.param(operation, parameters, id=name))
    return found


def accepts(parameter: Parameter, value: float) -> bool:
    return value < parameter.upper or (value == parameter.upper and parameter.upper_included)


MEASURES = measures()


def tokens_of(p: Any) -> NDArray[np.int64]:
    """The largest entry of every second row, and any entry of the others."""
    width = p.shape[-1]
    tokens: NDArray[np.int64] = np.arange(len(p)) * 7919 % width
    tokens[::2] = np.argmax(p[::2].astype(np.float64), axis=-1)
    return tokens


def given(operation: Operation, p: Any, q: Any, tokens: Any = None) -> list[Any]:
    """The arrays that the operation's functions take."""
    arrays = [{"p": p, "q": q}[side] for side in operation.rows]
    if not operation.tokens:
        return arrays
    return [*arrays, tokens_of(p) if tokens is None else tokens]


def computed(
    operation: Operation,
    parameters: tuple[float, ...],
    p: Any,
    q: Any,
    tokens: Any = None,
    **options: Any,
) -> Values:
    """The values of the compiled kernels: of the public function, or else of `compare`.

    From a device they are fetched.
    """
    options = {"backend": "cpu", "dtype": "float64", **options}
    function = getattr(klfast, operation.function, None)
    if function is not None:
        names = [parameter.name for parameter in operation.parameters]
        options.update(zip(names, parameters, strict=True))
        result = function(*given(operation, p, q, tokens), **options)
        return result.get() if hasattr(result, "get") else np.asarray(result)
    metric = ":".join([operation.name, *map(repr, parameters)])
    if operation.tokens:
        options["targets"] = tokens_of(p) if tokens is None else tokens
    # A function of one row reads the other one for nothing.
    pair = {"p": (p, p), "q": (q, q)}.get(operation.rows, (p, q))
    values = klfast.compare(*pair, metric, **options)[metric]
    return values.get() if hasattr(values, "get") else np.asarray(values)


def expected(
    operation: Operation,
    parameters: tuple[float, ...],
    p: Any,
    q: Any,
    tokens: Any = None,
    **options: Any,
) -> Values:
    if operation.parameters and operation.parameters[0].whole:
        parameters = tuple(map(int, parameters))
    result: Values = operation.reference(*given(operation, p, q, tokens), *parameters, **options)
    return result


#: Of these a relative error is asked for from 1e-6, and 1e-11 below that.
FIRST_ORDER = {
    "tv", "cross_entropy", "entropy", "entropy_p", "entropy_q", "renyi_entropy",
    "token_log_probs", "nll_p", "nll_q",
}  # fmt: skip
#: Exponentials of large exponents, which in float64 are no more exact than these.
EXPONENTIAL = {"chi2", "alpha", "tsallis"}


def tolerance(operation: Operation, truth: Values, exact: bool) -> Values:
    """How far from the truth a value may be; ``exact`` where an input is float64."""
    size = np.abs(truth)
    if operation.name == "logsumexp":
        return (1e-13 if exact else 2e-6) * np.maximum(1.0, size)
    if exact:
        growth = np.log(np.maximum(size, 1.0)) / 100 if operation.name in EXPONENTIAL else 1.0
        return np.where(size > 1e-20, 1e-13 * np.maximum(1.0, growth) * size, 1e-30)
    smallest, below = (1e-6, 1e-11) if operation.name in FIRST_ORDER else (1e-12, 1e-17)
    return np.where(size >= smallest, 2e-6 * size, below)


def assert_right(
    operation: Operation, found: Cases, got: Values, truth: Values, **how: Any
) -> None:
    """Every row is what it should be; if not, name those that are not."""
    dtypes = [str({"p": found.p, "q": found.q}[side].dtype) for side in operation.rows]
    with np.errstate(all="ignore"):
        allowed = tolerance(operation, truth, "float64" in dtypes)
        if operation.name == "delta_prob":
            # Accurate relative to the probabilities that it is the difference of.
            narrow = set(dtypes) != {"float64"}
            allowed = (2e-6 if narrow else 1e-13) * largest_probability(found, **how)
        right = (got == truth) | (np.isnan(got) & np.isnan(truth))
        right |= np.isfinite(truth) & (np.abs(got - truth) <= allowed)
        # Two logits may be further apart than float64 reaches.
        right |= np.minimum(np.abs(got), np.abs(truth)) > BEYOND
        error = np.abs(got - truth) / np.abs(truth)
    wrong = [
        f"{found.names[row]}: {got[row]!r}, and should be {truth[row]!r}: off by {error[row]:.1e}"
        for row in np.flatnonzero(~right)
    ]
    if wrong:
        how.pop("tokens", None)
        title = f"{how or ''} {len(wrong)} rows of V = {found.p.shape[-1]}, {' and '.join(dtypes)}"
        pytest.fail("\n".join([title, *wrong[:20]]), pytrace=False)


def largest_probability(found: Cases, tokens: Any = None, **how: Any) -> Values:
    """The larger one of the probabilities that P and Q give to the token."""
    tokens = tokens_of(found.p) if tokens is None else tokens
    temperatures = np.broadcast_to(how.pop("temperature", 1.0), 2)
    log_p, log_q = (
        reference.token_log_probs(x, tokens, temperature=temperature, **how)
        for x, temperature in zip((found.p, found.q), temperatures, strict=True)
    )
    return np.exp(np.maximum(log_p, log_q))


def check(operation: Operation, parameters: tuple[float, ...], found: Cases, **how: Any) -> None:
    """The kernels of a backend agree with the reference; other options go to both."""
    backend = how.pop("backend", "cpu")
    if operation.name == "topk_overlap" and parameters[0] > found.p.shape[-1]:
        return
    got = computed(operation, parameters, found.p, found.q, backend=backend, **how)
    truth = expected(operation, parameters, found.p, found.q, **how)
    assert_right(operation, found, got, truth, **how)
