"""Columns of an evaluation, one value a row, as text for JSON and as Parquet files.

Measures are float64 throughout: 8 bytes a row beside half a megabyte of logits, and nothing is
lost between a kernel and a statistic.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._files import replacing

if TYPE_CHECKING:
    from ._evaluation import Evaluation

Column = NDArray[Any]
_ROWS_AT_ONCE = 1 << 18


def encode(column: Column) -> dict[str, str]:
    """A column as its dtype and its little-endian bytes, deflated, in base64."""
    portable = column.astype(column.dtype.newbyteorder("<"), copy=False)
    data = base64.b64encode(zlib.compress(portable.tobytes(), 1)).decode("ascii")
    return {"dtype": portable.dtype.str, "data": data}


def decode(text: Mapping[str, str]) -> Column:
    """Undo `encode`."""
    data = zlib.decompress(base64.b64decode(text["data"], validate=True))
    stored = np.frombuffer(data, np.dtype(text["dtype"]))
    return stored.astype(stored.dtype.newbyteorder("="))


def write_parquet(path: str | os.PathLike[str], evaluations: Sequence[Evaluation]) -> None:
    """Write the columns of all candidates below each other, all of them or nothing.

    Columns are ``candidate`` (name of the test model), ``row`` (its number, as `row_numbers`), and
    those of `Evaluation.columns`, null where a candidate has no such column; same_top is a boolean.
    What was compared and how stands in the file's metadata as JSON, under ``klfast``. Raises
    ImportError where pyarrow is missing.
    """
    arrow, parquet = _pyarrow()
    about = [
        {"base": each.base, "test": each.test, "settings": each.settings} for each in evaluations
    ]
    dictionary = arrow.array([each.test["name"] for each in evaluations], arrow.string())
    union: dict[str, Column] = {}
    for each in evaluations:
        union = each.columns | union
    union.pop("row", None)
    schema = _schema(arrow, union, json.dumps(about))
    writer = None
    with replacing(path) as temporary:
        try:
            for number, evaluation in enumerate(evaluations):
                columns, numbers = evaluation.columns, evaluation.row_numbers
                if writer is None:
                    writer = parquet.ParquetWriter(temporary, schema, compression="zstd")
                for start in range(0, evaluation.rows, _ROWS_AT_ONCE):
                    stop = min(start + _ROWS_AT_ONCE, evaluation.rows)
                    indices = arrow.array(np.full(stop - start, number, np.int32))
                    arrays = [
                        arrow.DictionaryArray.from_arrays(indices, dictionary),
                        arrow.array(numbers[start:stop]),
                    ]
                    for name in union:
                        if name not in columns:
                            arrays.append(arrow.nulls(stop - start, schema.field(name).type))
                            continue
                        part = columns[name][start:stop]
                        if name == "same_top":
                            arrays.append(arrow.array(part == 1, mask=np.isnan(part)))
                        else:
                            arrays.append(arrow.array(part))
                    writer.write_batch(arrow.record_batch(arrays, schema=schema))
        finally:
            if writer is not None:
                writer.close()


def check_parquet() -> None:
    """Raise ImportError, in one line, where Parquet files cannot be written."""
    _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(
            'writing Parquet needs the package pyarrow: pip install "klfast[eval]"'
        ) from None
    return pyarrow, parquet


def _schema(arrow: Any, columns: Mapping[str, Column], about: str) -> Any:
    fields = [("candidate", arrow.dictionary(arrow.int32(), arrow.string())),
              ("row", arrow.int64())]  # fmt: skip
    for name, column in columns.items():
        kind = arrow.bool_() if name == "same_top" else arrow.from_numpy_dtype(column.dtype)
        fields.append((name, kind))
    return arrow.schema(fields, metadata={"klfast": about})
