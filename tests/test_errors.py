"""Bad arguments raise before anything is computed, and say which, what and what is accepted."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import klfast
from klfast._operations import OPERATIONS, parse_metric

P = np.zeros((2, 3, 5), np.float32)
TARGETS = np.zeros((2, 3), int)


def kl(p: Any = P, q: Any = P, **options: Any) -> Any:
    return klfast.kl_divergence(p, q, **options)


def compare(*arguments: Any, **options: Any) -> Any:
    return klfast.compare(P, P, *arguments, **options)


Case = tuple[Callable[[], Any], type[Exception], str]

CASES: dict[str, Case] = {
    # Shapes.
    "batches that do not broadcast": (
        lambda: kl(P, np.zeros((2, 2, 5), np.float32)),
        ValueError,
        r"p and q have shapes \(2, 3, 5\) and \(2, 2, 5\); .* \(2, 3\) and \(2, 2\)",
    ),
    "padded vocabulary": (  # trl#6252
        lambda: kl(np.zeros((1, 151936), np.float16), np.zeros((1, 152064), np.float16)),
        ValueError,
        "p and q have vocabularies of 151936 and 152064 entries; .* vocab_size=151936",
    ),
    "a vocabulary of one does not broadcast": (
        lambda: kl(P, P[..., :1]),
        ValueError,
        "vocabularies of 5 and 1 entries",
    ),
    "no vocabulary": (
        lambda: kl(P[..., :0], P[..., :0]),
        ValueError,
        "p and q: vocabulary of 0 and 0 entries; accepted: at least 1",
    ),
    "no vocabulary and no rows": (
        lambda: klfast.entropy(np.zeros((0, 0))),
        ValueError,
        "p: vocabulary of 0 entries",
    ),
    # Keywords.
    "unknown keyword": (
        lambda: kl(temprature=2),
        TypeError,
        r"kl_divergence\(\) got .* 'temprature' \(did you mean 'temperature'\?\); accepted: axis",
    ),
    "axis out of range": (lambda: kl(axis=3), ValueError, "axis is 3, .* accepted: -3 to 2"),
    "negative axis out of range": (lambda: kl(axis=-4), ValueError, "axis is -4"),
    "axis that one array lacks": (
        lambda: kl(P, P[0, 0], axis=0),
        ValueError,
        r"axis is 0, and q has shape \(5,\)",
    ),
    "axis of two axes": (lambda: kl(axis=(0, 1)), TypeError, r"axis is \(0, 1\), of type tuple"),
    "axis that is no whole number": (lambda: kl(axis=1.0), TypeError, "axis is 1.0"),
    "unknown input": (
        lambda: kl(input="logit"),
        ValueError,
        "input is 'logit'; accepted: 'logits', 'log_probs', 'probs'",
    ),
    "unknown reduction": (
        lambda: kl(reduction="batchmean"),
        ValueError,
        "reduction is 'batchmean'; accepted: 'none', 'mean', 'sum'",
    ),
    "temperature 0": (lambda: kl(temperature=0), ValueError, "temperature is 0; .* above 0"),
    "temperature below 0": (lambda: kl(temperature=-1.0), ValueError, "temperature is -1.0"),
    "infinite temperature": (lambda: kl(temperature=math.inf), ValueError, "temperature is inf"),
    "temperature NaN": (lambda: kl(temperature=math.nan), ValueError, "temperature is nan"),
    "a bad temperature in a pair": (
        lambda: kl(temperature=(1.0, 0.0)),
        ValueError,
        r"temperature is \(1.0, 0.0\); accepted: a number above 0, or a pair",
    ),
    "three temperatures": (lambda: kl(temperature=(1, 1, 1)), ValueError, "or a pair"),
    "two temperatures of one batch": (
        lambda: klfast.entropy(P, temperature=(1, 1)),
        ValueError,
        r"temperature is \(1, 1\); accepted: a number above 0$",
    ),
    "temperature in words": (
        lambda: kl(temperature="hot"),
        TypeError,
        "temperature is 'hot', of type str; accepted: a number",
    ),
    "base 1": (lambda: kl(base=1), ValueError, "base is 1; accepted: None .* above 1"),
    "base below 0": (lambda: kl(base=-2), ValueError, "base is -2"),
    "base in words": (lambda: kl(base="e"), TypeError, "base is 'e'"),
    "vocab_size 0": (
        lambda: kl(vocab_size=0),
        ValueError,
        "vocab_size is 0, .* accepted: None, or a whole number from 1 to 5",
    ),
    "vocab_size above the vocabulary": (
        lambda: kl(P, P[..., :4], vocab_size=5),
        ValueError,
        "vocab_size is 5, and p and q hold 5 and 4 entries; .* 1 to 4",
    ),
    "vocab_size that is no whole number": (
        lambda: kl(vocab_size=4.0),
        TypeError,
        "vocab_size is 4.0, of type float",
    ),
    "vocab_size True": (lambda: kl(vocab_size=True), TypeError, "vocab_size is True"),
    "where of the wrong shape": (
        lambda: kl(where=np.ones(4, bool)),
        ValueError,
        r"where has shape \(4,\); accepted: \(2, 3\), one entry a row",
    ),
    "where larger than the batch": (
        lambda: kl(where=np.ones((7, 2, 3), bool)),
        ValueError,
        r"where has shape \(7, 2, 3\)",
    ),
    "where of one value an entry": (
        lambda: kl(where=np.ones(P.shape, bool)),
        ValueError,
        "one entry a row",
    ),
    "where that is not boolean": (
        lambda: kl(where=np.ones((2, 3))),
        TypeError,
        "where has dtype float64; accepted: boolean",
    ),
    "where in words": (lambda: kl(where="all"), TypeError, "where is of type str"),
    "dtype of integers": (lambda: kl(dtype=int), TypeError, "dtype has dtype int64; accepted"),
    "dtype that is none": (lambda: kl(dtype="float33"), TypeError, "dtype has dtype .*float33"),
    "unknown backend": (
        lambda: kl(backend="gpu"),
        ValueError,
        "backend is 'gpu'; accepted: 'auto', 'cpu', 'cuda', 'reference'",
    ),
    # out.
    "out of the wrong shape": (
        lambda: kl(out=np.zeros((3, 2), np.float32)),
        ValueError,
        r"out has shape \(3, 2\); accepted: \(2, 3\)",
    ),
    "out of a reduction": (
        lambda: kl(out=np.zeros((2, 3), np.float32), reduction="mean"),
        ValueError,
        r"out has shape \(2, 3\); accepted: \(\)",
    ),
    "out of integers": (lambda: kl(out=TARGETS), TypeError, "out has dtype int64; accepted"),
    "out of another dtype than asked for": (
        lambda: kl(out=np.zeros((2, 3), np.float32), dtype="float64"),
        TypeError,
        "out has dtype float32; accepted: float64",
    ),
    "out that is read-only": (
        lambda: kl(out=np.broadcast_to(np.float32(0), (2, 3))),
        ValueError,
        "out is read-only",
    ),
    "out that repeats memory": (
        lambda: kl(out=np.lib.stride_tricks.as_strided(np.zeros(3), (2, 3), (0, 8))),
        ValueError,
        "out repeats the same memory",
    ),
    "out that is no array": (lambda: kl(out=[0.0]), TypeError, "out is of type list"),
    "log_softmax into its input": (
        lambda: klfast.log_softmax(P, out=P),
        ValueError,
        "out overlaps x",
    ),
    "log_softmax into its input, shifted": (
        lambda: klfast.log_softmax(P.reshape(-1)[:20], out=P.reshape(-1)[1:21]),
        ValueError,
        "out overlaps x",
    ),
    # Parameters.
    "alpha below 0": (
        lambda: klfast.renyi_divergence(P, P, -0.5),
        ValueError,
        r"alpha is -0.5; accepted: a number in \[0, inf\]",
    ),
    "alpha NaN": (lambda: klfast.renyi_divergence(P, P, math.nan), ValueError, "alpha is nan"),
    "alpha in words": (
        lambda: klfast.renyi_entropy(P, "two"),  # type: ignore[arg-type]
        TypeError,
        "alpha is 'two', of type str; accepted: a number",
    ),
    "alpha of one a row": (
        lambda: klfast.renyi_divergence(P, P, np.ones(3)),  # type: ignore[arg-type]
        TypeError,
        "alpha is array",
    ),
    "infinite alpha of the alpha-divergence": (
        lambda: klfast.alpha_divergence(P, P, math.inf),
        ValueError,
        r"alpha is inf; accepted: a number in \[0, inf\)",
    ),
    "infinite alpha of Tsallis": (
        lambda: klfast.tsallis_divergence(P, P, math.inf),
        ValueError,
        "alpha is inf",
    ),
    "weight above 1": (
        lambda: klfast.js_divergence(P, P, weight=1.01),
        ValueError,
        r"weight is 1.01; accepted: a number in \[0, 1\]",
    ),
    "weight below 0": (lambda: klfast.js_divergence(P, P, weight=-1e-9), ValueError, "weight is"),
    # Tokens.
    "token above the vocabulary": (
        lambda: klfast.token_log_probs(P, [[0, 1, 4], [2, 5, 9]]),
        IndexError,
        r"tokens\[1, 1\] is 5; accepted: 0 to 4",
    ),
    "negative token": (
        lambda: klfast.token_log_probs(P, [0, -1, 0]),
        IndexError,
        r"tokens\[0, 1\] is -1",
    ),
    "negative token of one row": (
        lambda: klfast.token_log_probs(P[0, 0], -1),
        IndexError,
        "tokens is -1; accepted: 0 to 4",
    ),
    "token beyond the vocab_size": (
        lambda: klfast.token_log_probs(P, 3, vocab_size=3),
        IndexError,
        r"tokens\[0, 0\] is 3; accepted: 0 to 2",
    ),
    "token beyond int64": (
        lambda: klfast.token_log_probs(P, np.uint64(2**63 + 1)),
        IndexError,
        "is 9223372036854775809",
    ),
    "tokens that are not whole": (
        lambda: klfast.token_log_probs(P, TARGETS.astype(float)),
        TypeError,
        "tokens has dtype float64; accepted: integers",
    ),
    "tokens that are boolean": (
        lambda: klfast.token_log_probs(P, TARGETS.astype(bool)),
        TypeError,
        "tokens has dtype bool",
    ),
    "tokens of the wrong shape": (
        lambda: klfast.token_log_probs(P, [0, 0]),
        ValueError,
        r"tokens has shape \(2,\); accepted: \(2, 3\)",
    ),
    # compare.
    "unknown metric": (
        lambda: compare(("kl", "revers_kl")),
        ValueError,
        r"metric 'revers_kl' is unknown \(did you mean 'reverse_kl'\?\); accepted: kl, reverse_kl",
    ),
    "metric in capitals": (lambda: compare("KL"), ValueError, "did you mean 'kl'"),
    "metric by its function": (lambda: compare("kl_divergence"), ValueError, "did you mean 'kl'"),
    "metric like no other": (
        lambda: compare("zzzzzz"),
        ValueError,
        "metric 'zzzzzz' is unknown; accepted: kl",
    ),
    "a function that is no metric": (lambda: compare("logsumexp"), ValueError, "is unknown"),
    "no metric": (lambda: compare(()), ValueError, "metrics is empty"),
    "metric that is no name": (lambda: compare((2,)), TypeError, "a metric is 2, of type int"),
    "metric without its parameter": (
        lambda: compare("renyi"),
        ValueError,
        "metric 'renyi' lacks alpha; accepted: 'renyi:alpha'",
    ),
    "metric with a bad parameter": (
        lambda: compare("js:1.5"),
        ValueError,
        "metric 'js:1.5': weight is 1.5",
    ),
    "metric with a parameter in words": (
        lambda: compare("renyi:two"),
        ValueError,
        "metric 'renyi:two': alpha is 'two'",
    ),
    "metric with a parameter it lacks": (
        lambda: compare("kl:2"),
        ValueError,
        "metric 'kl:2': 'kl' takes no parameter",
    ),
    "metric with two parameters": (
        lambda: compare("renyi:2:3"),
        ValueError,
        "metric 'renyi:2:3': 'renyi' takes 1 parameter",
    ),
    "the largest 2.5": (
        lambda: compare("topk_overlap:2.5"),
        ValueError,
        "k is 2.5; accepted: a whole number from 1",
    ),
    "the largest 6 of 5": (
        lambda: compare("topk_overlap:6"),
        ValueError,
        "metric 'topk_overlap:6': k is 6; accepted: 1 to 5",
    ),
    "metric that needs targets": (
        lambda: compare(("kl", "nll_q")),
        ValueError,
        "metric 'nll_q' needs targets",
    ),
    "target out of range": (
        lambda: compare(targets=[[0, 0, 7]]),
        IndexError,
        r"targets\[0, 2\] is 7; accepted: 0 to 4",
    ),
    "targets that are not whole": (
        lambda: compare(targets=np.zeros((2, 3))),
        TypeError,
        "targets has dtype float64",
    ),
    "compare has many results and no out": (
        lambda: compare(out=np.zeros((2, 3))),
        TypeError,
        r"compare\(\) got an unexpected keyword argument 'out'",
    ),
    # The rest.
    "explain without the second batch": (
        lambda: klfast.explain(P),
        TypeError,
        "q is None; accepted: an array, because 'kl' reads it",
    ),
    "explain an unknown metric": (lambda: klfast.explain(P, P, "k"), ValueError, "'k' is unknown"),
    "no threads": (lambda: klfast.set_num_threads(0), ValueError, "threads is 0; accepted"),
    "threads in words": (
        lambda: klfast.set_num_threads("all"),  # type: ignore[arg-type]
        TypeError,
        "threads is 'all'",
    ),
    "warmup of an unknown metric": (lambda: klfast.warmup("kll"), ValueError, "mean 'kl'"),
    "warmup of a dtype that is none": (
        lambda: klfast.warmup("kl", "int8", backend="reference"),
        TypeError,
        "dtypes has dtype int8",
    ),
}


@pytest.fixture(autouse=True)
def spy(recorder: Any) -> Any:
    """A backend that nothing may reach."""
    return recorder()


@pytest.mark.parametrize("case", CASES)
def test_bad_argument(case: str, spy: Any) -> None:
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()
    assert spy.calls == []  # nothing was computed


def test_targets_in_other_places() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="tokens is a PyTorch array on cpu, and the logits are a N"):
        klfast.token_log_probs(P, torch.zeros(2, 3, dtype=torch.int64))


def test_out_of_another_library() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(
        TypeError, match="out is a PyTorch array on cpu, and the inputs are a NumPy"
    ):
        kl(out=torch.zeros(2, 3))
    tensor = torch.from_numpy(P)
    with pytest.raises(ValueError, match="out requires a gradient"):
        kl(tensor, tensor, out=torch.zeros(2, 3, requires_grad=True))


def test_jax_arrays_cannot_be_written_or_hold_float64() -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(P)
    with pytest.raises(TypeError, match="out is a JAX array"):
        kl(x, x, out=jax.numpy.zeros((2, 3)))
    with pytest.raises(ValueError, match="dtype is float64, which JAX has switched off"):
        kl(x, x, dtype="float64")


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_default_parameter_is_accepted_by_itself(name: str) -> None:
    for parameter in OPERATIONS[name].parameters:
        assert parameter.lower <= parameter.upper
        if parameter.default is not None:
            assert parameter.check(parameter.default) == parameter.default


def test_parse_metric() -> None:
    assert parse_metric("renyi:inf") == (OPERATIONS["renyi"], (math.inf,))
    assert parse_metric("js") == (OPERATIONS["js"], (0.5,))
    assert parse_metric("js:0.25")[1] == (0.25,)
    assert parse_metric("topk_overlap:10")[1] == (10,)
