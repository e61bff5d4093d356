"""Write docs/operations.md, the table of everything klfast computes, from the operation table."""

import inspect
from collections.abc import Iterable
from pathlib import Path

import klfast
from klfast._operations import OPERATIONS, Operation

PAGE = Path(__file__).with_name("operations.md")

INTRODUCTION = """\
# Operations

Written by `make docs` from `src/klfast/_operations.py`; a test checks that it is up to date.

P and Q are the distributions of a row of `p` and of `q`, V is the number of entries of a row, and
log is the natural logarithm unless `base` says otherwise. "Same bits" means that exchanging P and Q
gives the same result to the last bit.
"""

FUNCTIONS = """\
## Functions

Every one is `klfast.NAME`, and `klfast.reference.NAME` in float64 NumPy. `klfast.log_softmax(x)`
belongs to them: it gives `x - LSE(x)`, one value an entry and not one a row. The last column is the
name that `klfast.value_and_grad` takes, which also knows `reverse_kl`.
"""

METRICS = """\
## Metrics

The names that `klfast.compare(metrics=...)` and `klfast compare --metrics` take.
"""


def page() -> str:
    """Return the whole page."""
    functions: dict[str, Operation] = {}
    for operation in OPERATIONS.values():
        if operation.function in klfast.__all__:
            functions.setdefault(operation.function, operation)
    metrics = [operation for operation in OPERATIONS.values() if operation.metric]
    return "\n".join([
        INTRODUCTION,
        FUNCTIONS,
        table(
            ("function", "formula", "parameters", "P and Q exchanged", "gradient"),
            ((code(call(each)), code(each.formula), ranges(each), exchanged(each), gradient(each))
             for each in functions.values()),
        ),
        METRICS,
        table(
            ("metric", "what it is", "formula"),
            ((code(name(each)), described(each), code(each.formula)) for each in metrics),
        ),
        "## Sources\n",
        table(
            ("function", "defined in"),
            ((code(function), each.source) for function, each in functions.items()),
        ),
    ])  # fmt: skip


def gradient(operation: Operation) -> str:
    """Return the name that `value_and_grad` takes, if there is a gradient."""
    return code(name(operation)) if operation.differentiable else ""


def call(operation: Operation) -> str:
    """Return how the function is called, without the keywords that all functions share."""
    own = {parameter.name for parameter in operation.parameters}
    signature = inspect.signature(getattr(klfast, operation.function))
    arguments = [
        str(each.replace(annotation=inspect.Parameter.empty))
        for each in signature.parameters.values()
        if each.kind != each.KEYWORD_ONLY or each.name in own
    ]
    return f"{operation.function}({', '.join(arguments)})"


def name(operation: Operation) -> str:
    """Return the name in `metrics`, with its parameters in capitals."""
    return ":".join([operation.name, *(each.name.upper() for each in operation.parameters)])


def ranges(operation: Operation) -> str:
    """Return what each parameter may be."""
    return "; ".join(f"{each.name}: {each.accepted}" for each in operation.parameters)


def exchanged(operation: Operation) -> str:
    """Return what becomes of the result when P and Q change places."""
    if not operation.symmetric:
        return "another value" if operation.arity == 2 else ""
    return " for ".join(["same bits", *(f"{each.name} = {each.default:g}"
                                        for each in operation.parameters)])  # fmt: skip


def described(operation: Operation) -> str:
    """Return the title, with what the metric takes and needs."""
    notes = [operation.title]
    if operation.tokens:
        notes.append("needs targets")
    for each in operation.parameters:
        otherwise = "" if each.default is None else f", {each.default:g} if left out"
        notes.append(f"{each.name.upper()}: {each.accepted}{otherwise}")
    return "; ".join(notes)


def code(text: str) -> str:
    """Return text as code, fit for a cell of a table."""
    return f"`{text}`".replace("|", r"\|")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
