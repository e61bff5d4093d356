"""Results do not depend on the sign of the errors that the device's exponentials may have."""

from __future__ import annotations

from typing import Any

import pytest
import test_gradient_kernel
import test_one_pass
import test_single_pass
import test_two_phase
from distributions import cases
from measures import tokens_of
from twin import compiler

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler"),
    pytest.mark.slow,  # a kernel is compiled for each of them
]

#: The largest relative error of ex2.approx that is documented, 2**-22.5, with one sign throughout,
#: and with one that depends on the digits of the result; see TWIN_BIAS.
BIASES = ("1.69e-7", "m < 1.5 ? -1.69e-7 : 1.69e-7")


@pytest.mark.parametrize(
    ("operation", "bias"),
    [(test_one_pass.OPERATIONS[1], BIASES[1]), (test_one_pass.OPERATIONS[4], BIASES[0])],
    ids=["kl_both", "renyi"],
)
def test_one_pass_with_biased_exponentials(operation: Any, bias: str) -> None:
    for width, dtype in ((257, "float32"), (2049, "float32"), (1031, "bfloat16")):
        test_one_pass.check(operation, cases(width, dtype), defines={"TWIN_BIAS(m)": bias})


@pytest.mark.parametrize("bias", BIASES, ids=["one sign", "by digits"])
def test_two_phase_with_biased_exponentials(bias: str) -> None:
    for width, dtype in ((257, "float32"), (2049, "float32"), (1031, "bfloat16")):
        test_two_phase.check(
            test_two_phase.DIVERGENCES[:8], cases(width, dtype), defines={"TWIN_BIAS(m)": bias}
        )


@pytest.mark.parametrize(
    "slope", [test_gradient_kernel.JS, test_gradient_kernel.SLOPES[5]], ids=str
)
def test_gradients_with_biased_exponentials(slope: Any) -> None:
    test_gradient_kernel.check(slope, cases(257, "float32"), defines={"TWIN_BIAS(m)": BIASES[1]})


def test_single_rows_with_biased_exponentials() -> None:
    found = cases(500, "float32")
    tokens = tokens_of(found.p)
    columns = test_single_pass.single_pass(
        "statistics", found.p, tokens=tokens, defines={"TWIN_BIAS(m)": BIASES[0]}
    )
    test_single_pass.check(found, columns, tokens)
