"""The public functions: what they mean, and the way from their arguments to a backend."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar, Unpack, cast

import numpy as np

from . import _device
from ._arguments import (
    DEFAULTS,
    Batch,
    CompareOptions,
    ElementOptions,
    Options,
    check_options,
    finish,
    prepare,
    result_shape,
    target_of,
)
from ._arrays import (
    FLOATS,
    decode,
    empty,
    encode,
    memory,
    overlap,
    place_of,
    plain_rows,
    rows_of,
    view_of,
    wrap,
)
from ._dispatch import MODULES, select
from ._operations import OPERATIONS, parse_metric

__all__ = [
    "Explanation",
    "alpha_divergence",
    "chi2_divergence",
    "cross_entropy",
    "documented",
    "entropy",
    "explain",
    "jeffreys_divergence",
    "js_divergence",
    "kl_divergence",
    "log_softmax",
    "logsumexp",
    "renyi_divergence",
    "renyi_entropy",
    "squared_hellinger",
    "token_log_probs",
    "total_variation",
    "tsallis_divergence",
]

Function = TypeVar("Function", bound=Callable[..., Any])

ARRAYS = """\
{names}: {batches}, shape (..., V), in float16, bfloat16, float32 or float64: NumPy
    arrays, PyTorch tensors, JAX arrays on the CPU, CuPy arrays, or anything on the CPU with
    `__dlpack__`. Strides of any kind are read in place; nothing is copied or written to. Results
    have no gradient: functions of `klfast.torch` and `klfast.jax` have."""

PAIR = """
    Batch axes broadcast against each other without being copied, and the dtypes may differ,
    but not the library or the device."""

KEYWORDS = {
    "axis": "the vocabulary axis.",
    "input": """\
what the entries are: "logits", "log_probs" or "probs". All are normalized, whatever
    their sum. A negative probability makes its row NaN.""",
    "temperature": "T > 0, which divides the logits, or of two batches a pair (T_p, T_q).",
    "base": """\
base of the logarithm of the result, above 1; None is e, and the unit nats. Results that
    are no logarithms do not depend on it.""",
    "where": """\
booleans, one a row: rows that are False are never read, take no part in a mean or sum,
    and hold NaN in a result with one value a row. A list, a NumPy array, or of the library and
    device of the logits.""",
    "vocab_size": "read only the first entries of each row, for vocabularies padded at the end.",
    "reduction": """\
"none" (one value a row), or the "mean" or "sum", taken in float64, over the rows
    that `where` keeps. The mean of no rows is NaN, their sum 0.""",
    "dtype": """\
of the result; None is that of `out`, else float64 if an input is float64, else float32.
    Values are computed in float64 or as exactly as numerics ask, and rounded once.""",
    "out": "NumPy or CuPy array or PyTorch tensor, of any strides, to write into and return.",
    "backend": """\
"auto" (that of the device), or one of "reference", "cpu" and "cuda" by name. "cuda" takes
    arrays on the host too, sent to the GPU in pieces; nothing else moves between devices.""",
    "validate": """\
whether to wait for a GPU, to raise IndexError for tokens or targets there that are out of
    range. Without it their rows are NaN. What is on the host is always checked.""",
}

ERRORS = """\
TypeError: for arrays that are no arrays of numbers, integers, two libraries or devices, or a
    keyword of the wrong type.
ValueError: for shapes that do not broadcast, vocabularies that differ or are empty, or a number
    outside its range.
BackendUnavailable: for a backend that cannot run here, or arrays on a device that none reads."""

NO_GRADIENT = """
ValueError: for tensors that require a gradient, outside torch.no_grad(): to PyTorch's autograd the
    result would be a constant."""


def documented(
    options: type, names: str = "p, q", operation: str | None = None, returns: str | None = None
) -> Callable[[Function], Function]:
    """Complete the docstring and signature of a function that takes the keywords of `options`.

    The formula and its source come from the operation table, and what the keywords mean is
    written once. Dask arrays are taken from here to `_dask`.
    """

    def complete(function: Function) -> Function:
        pair = "," in names
        batches = "two batches of logits" if pair else "a batch of logits"
        entries = [ARRAYS.format(names=names, batches=batches) + (PAIR if pair else "")]
        entries += [f"{name}: {text}" for name, text in _keywords(options).items()]
        sections = {"Arguments": "\n".join(entries)}
        sections["Returns"] = returns or (
            "One value a row, of the shape of the batch, as the same kind of array as the input; a "
            "row\nthat holds NaN or +inf, or only -inf, gives NaN and leaves the others alone."
        )
        sections["Raises"] = ERRORS + (NO_GRADIENT if "out" in _keywords(options) else "")
        if operation is not None:
            entry = OPERATIONS[operation]
            sections = {"Formula": entry.formula} | sections | {"Source": entry.source}
        blocks = [inspect.cleandoc(function.__doc__ or "")]
        for title, text in sections.items():
            blocks.append(f"{title}:\n" + "\n".join(f"    {line}" for line in text.splitlines()))
        function.__doc__ = "\n\n".join(blocks)
        signature = inspect.signature(function)
        given = signature.parameters.values()
        parameters = [each for each in given if each.kind != each.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS[name])
            for name in _keywords(options)
        ]

        @functools.wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> Any:
            dask = sys.modules.get("dask.array")  # a library counts only once it is imported
            if dask is not None and any(
                isinstance(each, dask.Array) for each in (*arguments, *keywords.values())
            ):
                lazily = import_module("._dask", __package__).call
                result = lazily(checked, names.split(", "), operation, arguments, keywords)
                if result is not None:
                    return result
            return function(*arguments, **keywords)

        vars(checked)["__signature__"] = signature.replace(parameters=parameters)
        return cast(Function, checked)

    return complete


def _keywords(options: type) -> dict[str, str]:
    return {name: text for name, text in KEYWORDS.items() if name in options.__annotations__}


def _evaluate(
    name: str,
    arrays: dict[str, Any],
    options: Options,
    values_of_parameters: tuple[Any, ...] = (),
    tokens: tuple[str, Any] | None = None,
) -> Any:
    operation = OPERATIONS[name]
    parameters: tuple[float, ...] = ()
    for parameter, value in zip(operation.parameters, values_of_parameters, strict=True):
        parameters += (parameter.check(value),)
    if not options and tokens is None:
        result = _evaluate_plain(name, parameters, *arrays.values())
        if result is not None:
            return result
    settings = check_options(operation.function, options, Options)
    batch = prepare(arrays, settings, tokens)
    _refuse_gradients(batch, arrays)
    dtype, target = target_of(batch, result_shape(batch))
    if batch.place.device != "cpu":
        (result,) = _device.evaluate(batch, [(name, parameters)], dtype, target)
        return result
    values = batch.empty_values()
    if not batch.idle:
        batch.backend.run(name, batch.p, batch.q, parameters, batch.rows, values, batch.tokens)
    return finish(batch, values, operation.logarithmic, dtype, target)


def _refuse_gradients(batch: Batch, arrays: Mapping[str, Any]) -> None:
    """Raise where a result would be a constant in a loss, and nobody would notice."""
    if batch.place.kind != "PyTorch" or not sys.modules["torch"].is_grad_enabled():
        return
    for name, x in arrays.items():
        if x.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which the result would not have; accepted: "
                f"{name}.detach(), or a call under torch.no_grad() (klfast.torch has functions "
                "with gradients)"
            )


def _evaluate_plain(name: str, parameters: tuple[float, ...], p: Any, *others: Any) -> Any | None:
    """The short way of a call with no keywords, of contiguous arrays or tensors of one shape.

    None where it does not lead, and all checks have to be made.
    """
    place, other = place_of(p, "p"), None
    first = plain_rows(p, place)
    if first is None:
        return None
    dtypes = [first.dtype]
    for q in others:
        if place_of(q, "q") != place or p.shape != q.shape:
            return None
        other = plain_rows(q, place)
        if other is None:
            return None
        dtypes.append(other.dtype)
    dtype = "float64" if "float64" in dtypes else "float32"
    values = np.empty(first.count)
    select("auto", "cpu").run(name, first, other, parameters, None, values)
    return wrap(encode(values.reshape(p.shape[:-1]), dtype), dtype, place, p)


@documented(Options, operation="kl")
def kl_divergence(p: Any, q: Any, **options: Unpack[Options]) -> Any:
    """Kullback-Leibler divergence of each row of `p` from that of `q`, P always first.

    Computed as sum p (exp(-d) - 1 + d) with d = log(p / q), whose terms are never negative, so
    that it is exact however close P and Q are; exactly 0 for identical rows; +inf where P has
    mass and q = 0. PyTorch's `F.kl_div(input, target)` is the other way round: its input is log Q
    and its target P, and its "mean" divides by the number of entries, "batchmean" by that of rows.
    """
    return _evaluate("kl", {"p": p, "q": q}, options)


@documented(Options, operation="jeffreys")
def jeffreys_divergence(p: Any, q: Any, **options: Unpack[Options]) -> Any:
    """Jeffreys divergence: KL both ways, summed. Exchanging P and Q changes no bit."""
    return _evaluate("jeffreys", {"p": p, "q": q}, options)


@documented(Options, operation="js")
def js_divergence(p: Any, q: Any, *, weight: float = 0.5, **options: Unpack[Options]) -> Any:
    """Jensen-Shannon divergence, with `weight` in [0, 1] as that of P in the mixture.

    At most log 2 for the default weight 1/2, where exchanging P and Q changes no bit; 0 for the
    weights 0 and 1. `scipy.spatial.distance.jensenshannon` is its square root, and TensorFlow
    Probability's `jensen_shannon` is twice it. TRL's `generalized_jsd_loss(student, teacher, beta)`
    is this with P = teacher, Q = student and weight = beta, except at the ends.
    """
    return _evaluate("js", {"p": p, "q": q}, options, (weight,))


@documented(Options, operation="renyi")
def renyi_divergence(p: Any, q: Any, alpha: float, **options: Unpack[Options]) -> Any:
    """Rényi divergence of order `alpha`, from 0 to infinity, both included.

    Order 0 is -log of the Q-mass of P's support, 1/2 is -2 log of the Bhattacharyya coefficient,
    1 is KL(P, Q), which it approaches continuously, and infinity is the largest log(p / q). It
    does not decrease in `alpha`.
    """
    return _evaluate("renyi", {"p": p, "q": q}, options, (alpha,))


@documented(Options, operation="alpha")
def alpha_divergence(p: Any, q: Any, alpha: float, **options: Unpack[Options]) -> Any:
    """alpha-divergence, `alpha` from 0: continuous at 1, KL(P, Q), and at 0, KL(Q, P).

    alpha = 1/2 is four times the squared Hellinger distance, and 2 half of chi-squared.
    """
    return _evaluate("alpha", {"p": p, "q": q}, options, (alpha,))


@documented(Options, operation="tsallis")
def tsallis_divergence(p: Any, q: Any, alpha: float, **options: Unpack[Options]) -> Any:
    """Tsallis relative entropy of order `alpha`, from 0: continuous at 1, KL(P, Q)."""
    return _evaluate("tsallis", {"p": p, "q": q}, options, (alpha,))


@documented(Options, operation="tv")
def total_variation(p: Any, q: Any, **options: Unpack[Options]) -> Any:
    """Total variation distance: the largest change in the probability of any set of tokens.

    In [0, 1], without unit. Exchanging P and Q changes no bit.
    """
    return _evaluate("tv", {"p": p, "q": q}, options)


@documented(Options, operation="hellinger2")
def squared_hellinger(p: Any, q: Any, **options: Unpack[Options]) -> Any:
    """Squared Hellinger distance, in [0, 1], without unit. Exchanging P and Q changes no bit."""
    return _evaluate("hellinger2", {"p": p, "q": q}, options)


@documented(Options, operation="chi2")
def chi2_divergence(p: Any, q: Any, **options: Unpack[Options]) -> Any:
    """Pearson's chi-squared divergence, without unit; +inf where P has mass and q = 0."""
    return _evaluate("chi2", {"p": p, "q": q}, options)


@documented(Options, operation="cross_entropy")
def cross_entropy(p: Any, q: Any, **options: Unpack[Options]) -> Any:
    """Cross-entropy of Q under P: the entropy of P plus KL(P, Q). Both are distributions.

    For the loss of known next tokens take `token_log_probs`.
    """
    return _evaluate("cross_entropy", {"p": p, "q": q}, options)


@documented(Options, "p", operation="entropy")
def entropy(p: Any, **options: Unpack[Options]) -> Any:
    """Shannon entropy of each row, from 0 to log V."""
    return _evaluate("entropy", {"p": p}, options)


@documented(Options, "p", operation="renyi_entropy")
def renyi_entropy(p: Any, alpha: float, **options: Unpack[Options]) -> Any:
    """Rényi entropy of order `alpha`, from 0 to infinity, both included.

    Order 0 is the logarithm of the size of the support, 1 Shannon's entropy, 2 the collision
    entropy, infinity -log of the largest probability. It does not increase in `alpha`.
    """
    return _evaluate("renyi_entropy", {"p": p}, options, (alpha,))


@documented(Options, "x", operation="logsumexp")
def logsumexp(x: Any, **options: Unpack[Options]) -> Any:
    """Logarithm of the sum of exponentials of each row of x / T.

    With input "probs" the entries are the exponentials. `base` divides the result by log(base).
    """
    return _evaluate("logsumexp", {"x": x}, options)


@documented(
    Options,
    "logits",
    operation="token_log_probs",
    returns="One value a row, of the shape of the batch, as the same kind of array as the input; "
    "with\nreturn_entropy a pair of them. A row that holds NaN or +inf, or only -inf, gives NaN "
    "and\nleaves the others alone.",
)
def token_log_probs(
    logits: Any, tokens: Any, *, return_entropy: bool = False, **options: Unpack[Options]
) -> Any:
    """Log-probability of one token a row, exact also where it is close to 0.

    `tokens` are integers from 0 to V - 1, of the shape of the batch or broadcasting to it: a list,
    a NumPy array, or of the library of the logits. Raises IndexError with the first position that
    is out of range; rows that `where` drops may hold anything, such as -100. `return_entropy` gives
    (log-probabilities, entropies) from one read, as policy gradients with an entropy bonus need.
    """
    if not return_entropy:
        arrays = {"logits": logits}
        return _evaluate("token_log_probs", arrays, options, tokens=("tokens", tokens))
    settings = check_options("token_log_probs", options, Options)
    if settings.out is not None:
        raise TypeError("out is given with return_entropy, which has two results; accepted: None")
    batch = prepare({"logits": logits}, settings, ("tokens", tokens))
    _refuse_gradients(batch, {"logits": logits})
    dtype, _ = target_of(batch, result_shape(batch))
    metrics: list[tuple[str, tuple[float, ...]]] = [("token_log_probs", ()), ("entropy", ())]
    if batch.place.device != "cpu":
        return tuple(_device.evaluate(batch, metrics, dtype))
    results = [batch.empty_values() for _ in metrics]
    if not batch.idle:
        # A comparison with itself: both come from the same statistics of each row.
        results = batch.backend.compare(metrics, batch.p, batch.p, batch.rows, batch.tokens)
        if batch.keep is not None:
            for values in results:
                values[~batch.keep] = np.nan
    return tuple(finish(batch, values, True, dtype) for values in results)


@documented(
    ElementOptions,
    "x",
    returns="Log-probabilities, of the shape of `x` with V cut to vocab_size, as the same kind of "
    "array; a\nrow that holds NaN or +inf, or only -inf, is all NaN, and so is one that `where` "
    "drops.",
)
def log_softmax(x: Any, **options: Unpack[ElementOptions]) -> Any:
    """Logarithm of the softmax of each row: log p = x / T - LSE(x / T).

    `out` must not overlap `x`. The definition is Bridle, Probabilistic Interpretation of
    Feedforward Network Outputs, 1990.
    """
    settings = check_options("log_softmax", options, ElementOptions)
    batch = prepare({"x": x}, settings)
    _refuse_gradients(batch, {"x": x})
    position = len(batch.shape) + 1 + batch.axis
    shape = (*batch.shape[:position], batch.p.width, *batch.shape[position:])
    dtype, target = target_of(batch, shape)
    if target is not None and overlap(target, view_of(x, batch.place, "x")):
        raise ValueError("out overlaps x, which is read twice; accepted: memory of its own")
    if batch.place.device != "cpu":
        return _device.log_softmax(batch, shape, dtype, target)
    stored = None
    if target is None:
        stored, target = empty(shape, dtype)
    if not batch.idle:
        into = rows_of(target, batch.axis, batch.shape, batch.p.width, "log_probs", 1.0)
        batch.backend.log_softmax(batch.p, batch.rows, into)
    table = np.moveaxis(memory(target, writable=True), batch.axis, -1)
    if settings.base is not None:
        for row in map(table.__getitem__, np.ndindex(batch.shape)):
            row[...] = encode(decode(row, dtype) / settings.unit, dtype)
    if batch.keep is not None:
        table[~batch.keep.reshape(batch.shape)] = encode(np.array(np.nan), dtype)
    return settings.out if stored is None else wrap(stored, dtype, batch.place, x)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a call would run: prints as a list, and has the same entries by name."""

    entries: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the entries by name."""
        return dict(self.entries)

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def __repr__(self) -> str:
        width = max(map(len, self.entries))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.entries.items())


@documented(
    CompareOptions,
    returns="An object that prints as a list and whose `to_dict()` has the same entries: metric, "
    "rows,\nvocabulary, input_bytes (what one read of the inputs moves), backend, and what the "
    "backend says\nof itself: kernel, passes, threads.",
)
def explain(
    p: Any, q: Any = None, metric: str = "kl", **options: Unpack[CompareOptions]
) -> Explanation:
    """What a call with these arguments would run. Nothing is computed.

    `metric` is a name as for `compare`, or of any other function in the operation table; `q` is
    None for functions of one batch.
    """
    operation = OPERATIONS.get(metric) or parse_metric(metric)[0]
    if "q" in operation.rows and q is None:
        raise TypeError(f"q is None; accepted: an array, because {metric!r} reads it")
    settings = check_options("explain", options, CompareOptions)
    batch = prepare({"p": p} if q is None else {"p": p, "q": q}, settings)
    backend = next(name for name, module in MODULES.items() if module == batch.backend.__name__)
    kept = batch.p.count if batch.rows is None else len(batch.rows)
    read = [each for each in (batch.p, batch.q) if each is not None]
    with _device.on(batch.place):
        plan = batch.backend.explain(metric, batch.p, batch.q)
    return Explanation(
        {
            "metric": metric,
            "rows": kept,
            "vocabulary": batch.p.width,
            "input_bytes": sum(kept * each.width * FLOATS[each.dtype] for each in read),
            "backend": backend,
            **plan,
        }
    )
