"""The operation table: everything klfast can compute of a row, one entry each.

Dispatch, argument checks, `compare`, the command line, tests, benchmarks and the table in the
documentation all run off it. Adding a divergence is adding its entry here, its formula to
`reference.py` and its integrand to each backend.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

__all__ = [
    "DEFAULT_METRICS",
    "DIFFERENTIABLE",
    "OPERATIONS",
    "TARGET_METRICS",
    "Operation",
    "Parameter",
    "parse_metric",
]

INFINITY = math.inf

Bounds = Callable[[tuple[float, ...], int], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that a whole call shares, such as the order of a Rényi divergence."""

    name: str
    default: float | None
    lower: float
    upper: float
    upper_included: bool = True
    whole: bool = False

    @property
    def accepted(self) -> str:
        """The allowed range in words."""
        if self.whole:
            return f"a whole number from {self.lower:g}"
        return f"a number in [{self.lower:g}, {self.upper:g}{']' if self.upper_included else ')'}"

    def check(self, value: Any) -> float:
        """Return `value` as a float, or raise TypeError or ValueError saying what is accepted."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise TypeError(
                f"{self.name} is {value!r}, of type {kind}; accepted: {self.accepted}"
            ) from None
        inside = self.lower <= number and (
            number <= self.upper if self.upper_included else number < self.upper
        )
        if not inside or (self.whole and not number.is_integer()):
            raise ValueError(f"{self.name} is {number:g}; accepted: {self.accepted}")
        return number


@dataclass(frozen=True, slots=True)
class Operation:
    """One function of a row of logits, or of a pair of rows."""

    name: str  # the metric name, as in compare(metrics=...)
    function: str  # the public function, and the function of klfast.reference
    title: str
    formula: str
    source: str
    bounds: Bounds  # (parameters, V) -> (smallest, largest) value in nats
    rows: str = "pq"  # which rows the reference function takes, in its order: "pq", "qp", "p", "q"
    parameters: tuple[Parameter, ...] = ()
    symmetric: bool = False  # exchanging P and Q changes no bit, at the default parameters
    logarithmic: bool = False  # measured in nats, so that `base` applies
    tokens: bool = False  # needs one token a row
    metric: bool = True  # may be named in compare(metrics=...)
    differentiable: bool = False  # `value_and_grad` has its gradient

    @property
    def arity(self) -> int:
        """How many rows it reads: 1 or 2."""
        return len(self.rows)

    @property
    def reference(self) -> Callable[..., Any]:
        """The float64 NumPy function of `klfast.reference` that defines it."""
        function: Callable[..., Any] = getattr(import_module("klfast.reference"), self.function)
        return function


def fixed(lower: float, upper: float) -> Bounds:
    """Bounds that depend on nothing."""
    return lambda parameters, width: (lower, upper)


def js_bounds(parameters: tuple[float, ...], width: int) -> tuple[float, float]:
    """JS is at most the entropy of the two weights, reached where the supports are disjoint."""
    return 0.0, -sum(w * math.log(w) for w in (parameters[0], 1 - parameters[0]) if w > 0)


def alpha_bounds(parameters: tuple[float, ...], width: int) -> tuple[float, float]:
    """S is at least 0, which bounds (S - 1) / (alpha (alpha - 1)) where its sign is negative."""
    alpha = parameters[0]
    return 0.0, 1 / (alpha * (1 - alpha)) if 0 < alpha < 1 else INFINITY


def tsallis_bounds(parameters: tuple[float, ...], width: int) -> tuple[float, float]:
    """As for the alpha-divergence, without the factor alpha."""
    return 0.0, 1 / (1 - parameters[0]) if parameters[0] < 1 else INFINITY


def entropy_bounds(parameters: tuple[float, ...], width: int) -> tuple[float, float]:
    """Entropies of every order are largest for the uniform distribution."""
    return 0.0, math.log(width)


ORDER = Parameter("alpha", None, 0.0, INFINITY)
FINITE_ORDER = Parameter("alpha", None, 0.0, INFINITY, upper_included=False)
NON_NEGATIVE = fixed(0.0, INFINITY)
UNIT = fixed(0.0, 1.0)

KL = Operation(
    name="kl",
    function="kl_divergence",
    title="Kullback-Leibler divergence",
    formula="KL(P, Q) = sum p log(p / q)",
    source="Kullback and Leibler, On Information and Sufficiency, 1951",
    bounds=NON_NEGATIVE,
    logarithmic=True,
    differentiable=True,
)
ENTROPY = Operation(
    name="entropy",
    function="entropy",
    title="Shannon entropy",
    formula="H(P) = -sum p log p",
    source="Shannon, A Mathematical Theory of Communication, 1948",
    bounds=entropy_bounds,
    rows="p",
    logarithmic=True,
    metric=False,
    differentiable=True,
)
NLL = Operation(
    name="nll_p",
    function="nll",
    title="negative log-likelihood of the target under P",
    formula="-log p[target]",
    source="its mean over the tokens is the logarithm of the perplexity",
    bounds=NON_NEGATIVE,
    rows="p",
    logarithmic=True,
    tokens=True,
)

_TABLE = (
    KL,
    replace(
        KL,
        name="reverse_kl",
        title="reverse Kullback-Leibler divergence",
        formula="KL(Q, P) = sum q log(q / p)",
        rows="qp",
    ),
    Operation(
        name="jeffreys",
        function="jeffreys_divergence",
        title="Jeffreys divergence",
        formula="J(P, Q) = KL(P, Q) + KL(Q, P) = sum (p - q) log(p / q)",
        source="Jeffreys, An Invariant Form for the Prior Probability, 1946",
        bounds=NON_NEGATIVE,
        symmetric=True,
        logarithmic=True,
        differentiable=True,
    ),
    Operation(
        name="js",
        function="js_divergence",
        title="Jensen-Shannon divergence",
        formula="JS(P, Q) = w KL(P, M) + (1 - w) KL(Q, M), M = w P + (1 - w) Q",
        source="Lin, Divergence Measures Based on the Shannon Entropy, 1991",
        bounds=js_bounds,
        parameters=(Parameter("weight", 0.5, 0.0, 1.0),),
        symmetric=True,
        logarithmic=True,
        differentiable=True,
    ),
    Operation(
        name="renyi",
        function="renyi_divergence",
        title="Rényi divergence",
        formula="R(P, Q) = log(sum p^alpha q^(1 - alpha)) / (alpha - 1)",
        source="Rényi, On Measures of Entropy and Information, 1961; "
        "van Erven and Harremoës, Rényi Divergence and Kullback-Leibler Divergence, 2014",
        bounds=NON_NEGATIVE,
        parameters=(ORDER,),
        logarithmic=True,
        differentiable=True,
    ),
    Operation(
        name="alpha",
        function="alpha_divergence",
        title="alpha-divergence",
        formula="A(P, Q) = (sum p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1))",
        source="Amari, Differential-Geometrical Methods in Statistics, 1985; in this "
        "parametrization Cichocki and Amari, Families of Alpha- Beta- and Gamma-Divergences, 2010",
        bounds=alpha_bounds,
        parameters=(FINITE_ORDER,),
        differentiable=True,
    ),
    Operation(
        name="tsallis",
        function="tsallis_divergence",
        title="Tsallis relative entropy",
        formula="T(P, Q) = (sum p^alpha q^(1 - alpha) - 1) / (alpha - 1)",
        source="Tsallis, Generalized Entropy-Based Criterion for Consistent Testing, 1998",
        bounds=tsallis_bounds,
        parameters=(FINITE_ORDER,),
        differentiable=True,
    ),
    Operation(
        name="tv",
        function="total_variation",
        title="total variation distance",
        formula="TV(P, Q) = 1/2 sum |p - q|",
        source="Levin and Peres, Markov Chains and Mixing Times, 2017, section 4.1",
        bounds=UNIT,
        symmetric=True,
        differentiable=True,
    ),
    Operation(
        name="hellinger2",
        function="squared_hellinger",
        title="squared Hellinger distance",
        formula="H2(P, Q) = 1/2 sum (sqrt p - sqrt q)^2",
        source="Hellinger, Neue Begründung der Theorie quadratischer Formen, 1909",
        bounds=UNIT,
        symmetric=True,
        differentiable=True,
    ),
    Operation(
        name="chi2",
        function="chi2_divergence",
        title="Pearson chi-squared divergence",
        formula="X2(P, Q) = sum (p - q)^2 / q",
        source="Pearson, On the Criterion that a Given System of Deviations, 1900",
        bounds=NON_NEGATIVE,
        differentiable=True,
    ),
    Operation(
        name="cross_entropy",
        function="cross_entropy",
        title="cross-entropy",
        formula="H(P, Q) = -sum p log q",
        source="Cover and Thomas, Elements of Information Theory, 2006, chapter 5.4",
        bounds=NON_NEGATIVE,
        logarithmic=True,
        differentiable=True,
    ),
    ENTROPY,
    replace(
        ENTROPY,
        name="entropy_p",
        title="Shannon entropy of P",
        metric=True,
        differentiable=False,
    ),
    replace(
        ENTROPY,
        name="entropy_q",
        title="Shannon entropy of Q",
        formula="H(Q) = -sum q log q",
        rows="q",
        metric=True,
        differentiable=False,
    ),
    Operation(
        name="renyi_entropy",
        function="renyi_entropy",
        title="Rényi entropy",
        formula="H_alpha(P) = log(sum p^alpha) / (1 - alpha)",
        source="Rényi, On Measures of Entropy and Information, 1961",
        bounds=entropy_bounds,
        rows="p",
        parameters=(ORDER,),
        logarithmic=True,
        metric=False,
    ),
    Operation(
        name="logsumexp",
        function="logsumexp",
        title="log-sum-exp",
        formula="LSE(x) = log(sum exp x)",
        source="Blanchard, Higham and Higham, Accurately Computing the Log-Sum-Exp, 2021",
        bounds=fixed(-INFINITY, INFINITY),
        rows="p",
        logarithmic=True,
        metric=False,
    ),
    Operation(
        name="token_log_probs",
        function="token_log_probs",
        title="log-probability of one token a row",
        formula="log p[token] = x[token] - LSE(x)",
        source="Bridle, Probabilistic Interpretation of Feedforward Network Outputs, 1990",
        bounds=fixed(-INFINITY, 0.0),
        rows="p",
        logarithmic=True,
        tokens=True,
        metric=False,
    ),
    Operation(
        name="same_top",
        function="same_top",
        title="same most probable token",
        formula="1 where argmax p = argmax q, else 0; ties go to the first index",
        source="llama.cpp's perplexity tool, 'Same top p'",
        bounds=UNIT,
        symmetric=True,
    ),
    Operation(
        name="top_p",
        function="top_p",
        title="largest probability of P",
        formula="max p",
        source="Hendrycks and Gimpel, A Baseline for Detecting Misclassified Examples, 2017",
        bounds=lambda parameters, width: (1 / width, 1.0),
        rows="p",
    ),
    Operation(
        name="topk_overlap",
        function="topk_overlap",
        title="overlap of the k most probable tokens",
        formula="|top_k(P) and top_k(Q)| / k; ties go to the first indices",
        source="Webber, Moffat and Zobel, A Similarity Measure for Indefinite Rankings, 2010",
        bounds=UNIT,
        parameters=(Parameter("k", None, 1.0, INFINITY, whole=True),),
        symmetric=True,
    ),
    NLL,
    replace(
        NLL,
        name="nll_q",
        title="negative log-likelihood of the target under Q",
        formula="-log q[target]",
        rows="q",
    ),
    Operation(
        name="delta_prob",
        function="delta_prob",
        title="change of the target's probability",
        formula="q[target] - p[target]",
        source="llama.cpp's perplexity tool, 'delta p'",
        bounds=fixed(-1.0, 1.0),
        tokens=True,
    ),
)

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _TABLE}
DIFFERENTIABLE = {name: each for name, each in OPERATIONS.items() if each.differentiable}

# What a quantization evaluation reads: the information lost, the mass put where the original has
# none, the largest change in the probability of any event, and how often greedy decoding differs.
DEFAULT_METRICS = ("kl", "reverse_kl", "tv", "same_top")
# Added to them where the true next tokens are known: perplexities and their change.
TARGET_METRICS = ("nll_p", "nll_q", "delta_prob")


def parse_metric(text: str, single: bool = False) -> tuple[Operation, tuple[float, ...]]:
    """Split "renyi:2" into its operation and parameters; ValueError gives the nearest name.

    `single` accepts the functions of one batch too.
    """
    if not isinstance(text, str):
        raise TypeError(f"a metric is {text!r}, of type {type(text).__name__}; accepted: a string")
    name, *given = text.split(":")
    operation = OPERATIONS.get(name)
    if operation is None or not (operation.metric or single):
        known = [each for each in OPERATIONS.values() if each.metric or single]
        names = [each.name for each in known]
        # Many write the name of the function.
        meant = {each.function: each.name for each in reversed(known)} | {n: n for n in names}
        near = difflib.get_close_matches(name.lower(), meant, n=1, cutoff=0.5)
        hint = f" (did you mean {meant[near[0]]!r}?)" if near else ""
        raise ValueError(f"metric {name!r} is unknown{hint}; accepted: {', '.join(names)}")
    wanted = operation.parameters
    if len(given) > len(wanted):
        raise ValueError(f"metric {text!r}: {name!r} takes {len(wanted) or 'no'} parameter")
    values = []
    for position, parameter in enumerate(wanted):
        value = given[position] if position < len(given) else parameter.default
        if value is None:
            raise ValueError(
                f"metric {text!r} lacks {parameter.name}; accepted: '{name}:{parameter.name}' "
                f"with {parameter.name} {parameter.accepted}"
            )
        try:
            values.append(parameter.check(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"metric {text!r}: {error}") from None
    return operation, tuple(values)
