"""Laws that hold for every input, as Hypothesis properties, on every backend.

Values are taken as float64. A law that a rounding error may bend is held to that error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from distributions import DTYPES, Cases, rounded
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from test_agreement import (
    MEASURES,
    assert_right,
    computed,
    expected,
    measures_of,
)

import klfast
from klfast._operations import OPERATIONS, Operation
