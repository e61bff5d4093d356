"""Logits whose vocabulary is sharded over processes, gathered by gloo."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import klfast
from klfast import RowState

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

NAMES = (
    "kl", "reverse_kl", "jeffreys", "js", "js:0.2", "js:0.0", "renyi:2", "renyi:0.3", "renyi:1",
    "alpha:0.5", "tsallis:3", "tv", "hellinger2", "chi2", "cross_entropy",
)  # fmt: skip
METRICS = ("kl", "js", "tv", "same_top", "nll_p", "delta_prob")

#: Rank, number of processes, a file to meet at, and one for what comes out.
WORKER = """
import pickle, sys
import torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, sys.argv[5])
from test_distributed import METRICS, NAMES, batch, cuts
import klfast.distributed as kd

rank, world = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world)
p, q, targets, keep = batch()
start, stop = cuts(world)[rank : rank + 2]
found = {}
for name in NAMES:
    shards = [x[..., start:stop].clone().requires_grad_() for x in (p, q)]
    value = kd.divergence(name, *shards, temperature=1.5, where=keep)
    (value * torch.arange(1.0, 7.0).reshape(2, 3)).sum().backward()
    found[name] = value.detach(), *(x.grad for x in shards)
shard = p[..., start:stop].clone().requires_grad_()
mean = kd.divergence("entropy", shard, reduction="mean")
mean.backward()
found["entropy"] = mean.detach(), shard.grad
found["compare"] = kd.compare(p[..., start:stop], q[..., start:stop], METRICS, targets)
Path(sys.argv[4]).write_bytes(pickle.dumps(found))
dist.destroy_process_group()
"""


def batch() -> tuple[Any, Any, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    p = 3.0 * torch.randn(2, 3, 999, generator=generator)
    q = p + 0.1 * torch.randn(2, 3, 999, generator=generator)
    p[0, 0, 10:20] = q[0, 0, 10:20] = -torch.inf  # in both
    q[0, 1, 7] = -torch.inf  # what P has
    p[0, 2, 400] = -torch.inf  # what Q has
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[1, 1] = False
    return p, q, torch.tensor([[0, 400, 998], [5, 500, 777]]), keep


def cuts(world: int) -> list[int]:
    """Shards of different widths, the third of four empty."""
    return [0, 333, 999] if world == 2 else [0, 100, 612, 612, 999]


def results(world: int, folder: Path) -> list[dict[str, Any]]:
    # Kernels are compiled here, once, and not in every process.
    p, q, targets, _ = batch()
    state = RowState.of(p, q, (*NAMES, *METRICS, "entropy"), targets=targets)
    state.partial_sums(p, q)
    files = [folder / f"{rank}.pickle" for rank in range(world)]
    meet = folder / "meet"
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                WORKER,
                str(rank),
                str(world),
                str(meet),
                str(file),
                str(Path(__file__).parent),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    ends = []
    for process in processes:
        with process:
            try:
                _, errors = process.communicate(timeout=100)
            finally:
                process.kill()
            ends.append((process.returncode, errors))
    failed = [errors for code, errors in ends if code]
    assert not failed, "\n".join(failed)
    return [pickle.loads(file.read_bytes()) for file in files]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_values_and_gradients_of_shards(world: int, tmp_path: Path) -> None:
    found = results(world, tmp_path)
    p, q, targets, keep = batch()
    upstream = torch.arange(1.0, 7.0).reshape(2, 3)
    for name in NAMES:
        value, gradients = klfast.value_and_grad(
            name, p.double(), q.double(), wrt="both", temperature=1.5, where=keep,
            grad_scale=upstream.double(),
        )  # fmt: skip
        value = torch.where(keep, value, 0.0).float()
        for each in found:
            assert torch.equal(each[name][0], found[0][name][0])
        torch.testing.assert_close(found[0][name][0], value, rtol=3e-6, atol=1e-12)
        for side, whole in enumerate(gradients, start=1):
            joined = torch.cat([each[name][side] for each in found], dim=-1)
            torch.testing.assert_close(joined, whole.float(), rtol=2e-5, atol=2e-7)
    value, gradient = klfast.value_and_grad("entropy", p.double(), grad_scale=1 / 6)
    torch.testing.assert_close(found[0]["entropy"][0], value.mean().float())
    joined = torch.cat([each["entropy"][1] for each in found], dim=-1)
    torch.testing.assert_close(joined, gradient.float(), rtol=2e-5, atol=1e-8)
    whole = klfast.compare(p, q, METRICS, targets, dtype="float64")
    for name in METRICS:
        for each in found:
            assert torch.equal(each["compare"][name], found[0]["compare"][name])
        torch.testing.assert_close(found[0]["compare"][name], whole[name], rtol=3e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (("kl:2", True), ValueError, "'kl' takes no parameter"),
        (("topk_overlap", True), ValueError, "has no gradient here"),
        (("kl", False), TypeError, "q is None"),
        (("entropy", True), TypeError, "q is a tensor"),
        (("renyi:0", True), ValueError, "both excluded"),
        (("renyi:inf", True), ValueError, "both excluded"),
    ],
)
def test_what_is_refused(call: tuple[str, bool], error: type[Exception], message: str) -> None:
    import klfast.distributed

    name, pair = call
    x = torch.zeros(2, 4)
    with pytest.raises(error) as caught:
        klfast.distributed.divergence(name, x, x if pair else None)
    assert message in str(caught.value)


def test_shards_of_unlike_shapes_and_unknown_reductions() -> None:
    import klfast.distributed

    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="p and q have shapes"):
        klfast.distributed.divergence("kl", x, x[:1])
    with pytest.raises(ValueError, match="reduction is 'max'"):
        klfast.distributed.divergence("kl", x, x, reduction="max")  # type: ignore[arg-type]
