"""Logits as hidden states times an output head: made while they are compared, never stored."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ._arrays import FLOATS, dtype_name
from ._dispatch import get_num_threads

# Weights in 16 bits become float32 block by block, so that no copy of the head is held. A product
# of a smaller block would not keep the cores busy.
_BLOCK_BYTES = 128 * 2**20
# So many rows share the cost of that, if their logits are not more than so many bytes.
_UNIT_ROWS = 512
_UNIT_BYTES = 256 * 2**20


class LinearLogits:
    """Rows of logits ``softcap * tanh(x / softcap)`` with ``x = scale * hidden @ weight.T + bias``.

    A source like a file of logits: `klfast.compare`, `klfast.evaluate` and
    `klfast.Evaluation.update` take it wherever they take an array. A few rows at a time are
    multiplied by the BLAS of the arrays' library, in float32 whatever they are stored in (float64
    if one of them is), compared at once, and forgotten: a state of 4096 entries stands in for a
    row of 128 256.

    Parameters
    ----------
    hidden
        States before the output head, ``(..., D)``: an array of NumPy, PyTorch, JAX or CuPy in
        float16, bfloat16, float32 or float64. Memory-mapped ones are read as they are needed.
    weight
        The head, ``(V, D)``, on the same device. In 16 bits it is converted by blocks of 128 MiB.
    bias
        ``(V,)``, or None.
    scale
        A number that multiplies ``hidden @ weight.T``, or None (some models divide logits).
    softcap
        A bound c > 0 on the size of logits, or None.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, a dtype is none of these, or softcap is not a positive number.

    Examples
    --------
    >>> base = klfast.LinearLogits(base_states, head)
    >>> test = klfast.LinearLogits(test_states, head)
    >>> klfast.compare(base, test, "kl")["kl"]
    """

    def __init__(
        self,
        hidden: Any,
        weight: Any,
        bias: Any = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        self.name = "LinearLogits"
        dtypes = [dtype_name(x.dtype, name) for name, x in (("hidden", hidden), ("weight", weight))]
        shapes = tuple(hidden.shape), tuple(weight.shape)
        if len(shapes[1]) != 2 or not shapes[0] or shapes[0][-1] != shapes[1][1]:
            raise ValueError(
                f"weight has shape {shapes[1]}, but hidden has {shapes[0]}; accepted: (V, D) "
                "where hidden has (..., D)"
            )
        if shapes[1][0] == 0:
            raise ValueError(f"weight has shape {shapes[1]}; accepted: at least one row")
        if bias is not None:
            dtypes.append(dtype_name(bias.dtype, "bias"))
            if tuple(bias.shape) != shapes[1][:1]:
                raise ValueError(
                    f"bias has shape {tuple(bias.shape)}; accepted: {shapes[1][:1]}, as weight says"
                )
        for name, number in (("scale", scale), ("softcap", softcap)):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{name} is {number}; accepted: a finite number, or None")
        if softcap is not None and softcap <= 0:
            raise ValueError(f"softcap is {softcap}; accepted: a positive number, or None")
        self.shape = (*(int(n) for n in shapes[0][:-1]), int(shapes[1][0]))
        self.dtype = "float64" if "float64" in dtypes else "float32"
        self.kind = f"{dtypes[0]} states of {shapes[0][-1]} x {dtypes[1]} head"
        self.row_bytes = shapes[0][-1] * FLOATS[dtypes[0]]
        narrow = dtypes[1] != self.dtype
        most = _UNIT_BYTES // (self.shape[-1] * FLOATS[self.dtype])
        self.unit_rows = max(1, min(_UNIT_ROWS, most)) if narrow else 1
        self.memory = _BLOCK_BYTES if narrow else 0
        self._block = shapes[1][0]
        if narrow:
            self._block = max(1, _BLOCK_BYTES // (shapes[1][1] * FLOATS[self.dtype]))
        self._space: Any = None  # for a block: new memory costs as much as the conversion
        self._hidden = hidden.reshape(-1, shapes[0][-1])
        self._weight, self._bias = weight, bias
        self._scale, self._softcap = scale, softcap

    def read(self, start: int, stop: int) -> Any:
        """Logits of rows ``start`` to ``stop``, of the kind and on the device of the arrays."""
        states = _widened(self._hidden[start:stop], self.dtype)
        if self._scale is not None:
            states = states * self._scale
        width = self.shape[-1]
        if self._block >= width:
            logits = states @ _widened(self._weight, self.dtype).T
        else:
            logits = self._by_blocks(states)
        if self._bias is not None:
            logits += _widened(self._bias, self.dtype)
        if self._softcap is not None:
            logits /= self._softcap
            logits = _tanh(logits)
            logits *= self._softcap
        return logits

    def _by_blocks(self, states: Any) -> Any:
        width = self.shape[-1]
        parts = [slice(i, min(i + self._block, width)) for i in range(0, width, self._block)]
        if isinstance(states, np.ndarray):
            logits = np.empty((len(states), width), states.dtype)
            space, self._space = self._space, None  # nobody else's until it is put back
            if space is None:
                space = np.empty((self._block, states.shape[1]), states.dtype)
            threads = get_num_threads()
            with ThreadPoolExecutor(threads, "klfast-convert") as pool:
                for part in parts:
                    block = space[: part.stop - part.start]
                    weights = zip(
                        np.array_split(self._weight[part], threads),
                        np.array_split(block, threads),
                        strict=True,
                    )
                    list(pool.map(lambda pair: _widened(pair[0], self.dtype, pair[1]), weights))
                    np.matmul(states, block.T, out=logits[:, part])
            self._space = space
            return logits
        products = [states @ _widened(self._weight[part], self.dtype).T for part in parts]
        if hasattr(states, "detach"):
            import torch

            return torch.cat(products, -1)
        return states.__array_namespace__().concat(products, axis=-1)


def _widened(array: Any, dtype: str, out: Any = None) -> Any:
    """The array in float32 or float64; not a copy if it is so already."""
    if hasattr(array, "detach"):
        array = array.detach()
        return array.double() if dtype == "float64" else array.float()
    if isinstance(array, np.ndarray):
        out = np.empty(array.shape, dtype) if out is None and array.dtype != dtype else out
        if out is None:
            return array
        if array.dtype.name == "bfloat16" and dtype == "float32":
            # The upper half of a float32: twice as fast as a conversion entry by entry.
            np.left_shift(array.view(np.uint16), 16, dtype=np.uint32, out=out.view(np.uint32))
        else:
            out[...] = array
        return out
    return array.astype(dtype, copy=False)


def _tanh(logits: Any) -> Any:
    if isinstance(logits, np.ndarray):
        return np.tanh(logits, out=logits)
    return logits.tanh_() if hasattr(logits, "tanh_") else logits.__array_namespace__().tanh(logits)
