"""Logits in several files, in order, and in Zarr arrays."""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from klfast import SourceError, evaluate, open_logits

ROWS = np.random.default_rng(4).standard_normal((60, 7)).astype(np.float32)


def same_rows(source: Any, expected: Any = ROWS) -> None:
    """All ways of cutting it into reads give the rows of ``expected``."""
    for size in (1, 7, 25, 60):
        parts = [source.read(i, min(i + size, 60)) for i in range(0, 60, size)]
        np.testing.assert_array_equal(np.concatenate(parts), expected)
    assert source.read(13, 13).shape == (0, 7)


def test_folders_and_patterns(tmp_path: Path) -> None:
    cuts = [0, 20, 22, 41, 41, 60]
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        np.save(tmp_path / f"part-{i + 7}.npy", ROWS[start:stop])  # 10 comes after 9
    (tmp_path / "notes.txt").write_text("no logits")
    for path in (tmp_path, tmp_path / "part-*.npy", tmp_path / "part-[0-9]*"):
        source = open_logits(path)
        assert (source.name, source.shape, source.dtype) == (str(path), (60, 7), "float32")
        same_rows(source)
    found = evaluate(tmp_path, ROWS, metrics=["kl"], chunk_rows=9)
    assert found.columns["kl"].tolist() == [0.0] * 60


def test_shards_of_texts(tmp_path: Path) -> None:
    texts = ROWS.reshape(6, 10, 7)
    np.save(tmp_path / "a.npy", texts[:2])
    np.savez_compressed(tmp_path / "b.npz", logits=texts[2:])
    source = open_logits(tmp_path)
    assert source.shape == (6, 10, 7)
    same_rows(source)
    np.save(tmp_path / "b.npz.npy", ROWS[:0])
    assert open_logits(tmp_path).shape == (60, 7)  # texts of no one length


def test_safetensors_with_an_index(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    names = {f"rows.{i}": f"{i % 2}.safetensors" for i in (9, 10, 11)}
    parts = dict(zip(names, np.split(ROWS, [10, 35]), strict=True))
    for file in ("0.safetensors", "1.safetensors"):
        numpy.save_file({n: parts[n] for n in names if names[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for path in (index, tmp_path):
        same_rows(open_logits(path))
    np.testing.assert_array_equal(open_logits(index, "rows.10").read(0, 25), parts["rows.10"])
    for content, reason in (
        ({"weight_map": {"x": "../0.safetensors"}}, "names '../0.safetensors'"),
        ({"weight_map": {"x": "3.safetensors"}}, "No such file"),
        ({"weight_map": {}}, "holds no array"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(SourceError, match=reason) as caught:
            open_logits(index)
        assert str(caught.value).startswith(f"{tmp_path}")
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(SourceError, match=r"holds no array named 'y'; there are: 'rows\.10'"):
        open_logits(index, "y")


def test_shards_of_bfloat16(tmp_path: Path) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    numpy = pytest.importorskip("safetensors.numpy")
    rounded = ROWS.astype(bfloat16)
    for i in range(2):
        numpy.save_file({"logits": rounded[30 * i : 30 * i + 30]}, tmp_path / f"{i}.safetensors")
    source = open_logits(tmp_path)
    assert source.dtype == "bfloat16"
    same_rows(source, rounded)


def test_shards_that_do_not_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    np.save(tmp_path / "b.npy", ROWS[:, :6])
    with pytest.raises(SourceError, match=r"b\.npy: has rows of 6 float32, but .*a\.npy of 7"):
        open_logits(tmp_path)
    np.save(tmp_path / "b.npy", ROWS.astype(np.float16))
    with pytest.raises(SourceError, match=r"b\.npy: has rows of 7 float16"):
        open_logits(tmp_path / "*.npy")
    with pytest.raises(SourceError, match="matches no file"):
        open_logits(tmp_path / "c*.npy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"holds no \.npy, \.npz, \.safetensors file"):
        open_logits(tmp_path / "empty")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("shape", [(60, 7), (6, 10, 7), (3, 4, 5, 7)])
def test_zarr(tmp_path: Path, shape: tuple[int, ...], version: int) -> None:
    zarr = pytest.importorskip("zarr")
    chunks = (2, *shape[1:-1], 4)
    array = zarr.create_array(
        tmp_path / "z", shape=shape, chunks=chunks, dtype="float32", zarr_format=version
    )
    array[...] = ROWS.reshape(shape)
    source: Any = open_logits(tmp_path / "z")
    assert (source.name, source.shape, source.dtype) == (str(tmp_path / "z"), shape, "float32")
    assert source.unit_rows == 2 * math.prod(shape[1:-1])
    same_rows(source)
    assert evaluate(tmp_path / "z", ROWS.reshape(shape), metrics=["kl"]).columns["kl"].max() == 0
    with pytest.raises(SourceError, match="is one array and has no names, so no 'x'"):
        open_logits(tmp_path / "z", "x")


def test_zarr_groups(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "g", mode="w")
    for name in ("x", "y"):
        group.create_array(name, shape=ROWS.shape, dtype="float16")[...] = ROWS
    with pytest.raises(SourceError, match="holds no array named 'logits'; there are: 'x', 'y'"):
        open_logits(tmp_path / "g")
    assert open_logits(tmp_path / "g", "y").dtype == "float16"
    same_rows(open_logits(tmp_path / "g", "y"), ROWS.astype(np.float16))


def test_zarr_that_is_damaged_or_pickled(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    folder = tmp_path / "z"
    folder.mkdir()
    about = {
        "zarr_format": 2, "shape": [60, 7], "chunks": [60, 7], "dtype": "<f4", "order": "C",
        "compressor": None, "fill_value": 0.0, "filters": [{"id": "pickle", "protocol": 5}],
    }  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(about))
    (folder / "0.0").write_bytes(
        b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    )
    with pytest.raises(SourceError, match=str(folder)):
        open_logits(folder).read(0, 60)
    assert not (tmp_path / "ran").exists()
    (folder / ".zarray").write_text("{")
    with pytest.raises(SourceError, match=str(folder)):
        open_logits(folder)


def test_zarr_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zarr.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(SourceError, match=r'needs the package zarr: pip install "klfast\[zarr\]"'):
        open_logits(tmp_path)
