"""Files of logits: every kind is read, row by row, and what cannot be is named in one line."""

import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from klfast._job import Job
from klfast._sources import (
    ArraySource,
    LogitSource,
    SourceError,
    open_column,
    open_logits,
)

LOGITS = np.random.default_rng(1).standard_normal((6, 4, 50)).astype(np.float32)
ROWS = LOGITS.reshape(24, 50)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def save_npy(path: Path, array: NDArray[Any]) -> Path:
    np.save(path.with_suffix(".npy"), array)
    return path.with_suffix(".npy")


def save_npz(path: Path, array: NDArray[Any]) -> Path:
    np.savez(path.with_suffix(".npz"), logits=array, other=np.zeros(3))
    return path.with_suffix(".npz")


def save_compressed(path: Path, array: NDArray[Any]) -> Path:
    np.savez_compressed(path.with_suffix(".npz"), logits=array, other=np.zeros(3))
    return path.with_suffix(".npz")


def save_safetensors(path: Path, array: NDArray[Any]) -> Path:
    tensors = {"other": np.zeros(3), "logits": np.ascontiguousarray(array), "a": np.ones(1)}
    save_file(tensors, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


SAVE = [save_npy, save_npz, save_compressed, save_safetensors]
Save = Callable[[Path, NDArray[Any]], Path]


def rows_of(source: LogitSource, chunk: int = 7) -> NDArray[Any]:
    count = int(np.prod(source.shape[:-1]))
    parts = [source.read(i, min(i + chunk, count)) for i in range(0, count, chunk)]
    return np.concatenate(parts)


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6, 4, 50), (24, 50), (1200,)])
def test_rows_come_back(tmp_path: Path, save: Save, dtype: Any, shape: tuple[int, ...]) -> None:
    array = LOGITS.astype(dtype).reshape(shape)
    source = open_logits(save(tmp_path / "x", array))
    assert source.shape == shape
    assert source.dtype == np.dtype(dtype).name
    rows = rows_of(source)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows, array.reshape(-1, shape[-1]))


def test_bfloat16_safetensors(tmp_path: Path) -> None:
    array = LOGITS.astype(BFLOAT16)
    source = open_logits(save_safetensors(tmp_path / "x", array))
    assert source.dtype == "bfloat16"
    np.testing.assert_array_equal(rows_of(source), array.reshape(24, 50))


@pytest.mark.parametrize("save", [save_npy, save_npz])
def test_other_memory_orders(tmp_path: Path, save: Save) -> None:
    for array in (
        np.asfortranarray(LOGITS),
        np.asfortranarray(ROWS),
        LOGITS.astype(">f4"),
    ):
        rows = rows_of(open_logits(save(tmp_path / "x", array)))
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, array.reshape(24, 50))


def test_compressed_rows_in_any_order(tmp_path: Path) -> None:
    source = open_logits(save_compressed(tmp_path / "x", LOGITS))
    for start in (20, 3, 3, 11):
        np.testing.assert_array_equal(source.read(start, start + 2), ROWS[start : start + 2])


@pytest.mark.parametrize("save", [save_npy, save_safetensors])
def test_mapped_not_read(tmp_path: Path, save: Save) -> None:
    block: Any = open_logits(save(tmp_path / "x", LOGITS)).read(3, 5)
    owners = []
    while block is not None:
        owners.append(type(block))
        block = getattr(block, "base", None)
    assert np.memmap in owners


def test_file_larger_than_memory(tmp_path: Path) -> None:
    rows, width = 2**20, 2**17  # half a terabyte, of which the disk holds two rows
    path = tmp_path / "sparse.npy"
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, header)
        end = file.tell() + rows * width * 4
        try:
            file.truncate(end)
        except OSError:
            pytest.skip("the file system has no sparse files")
        file.seek(end - width * 4)
        file.write(np.full(width, 7, np.float32).tobytes())
    source = open_logits(path)
    assert (source.read(rows - 1, rows) == 7).all()
    assert (source.read(rows - 2, rows - 1) == 0).all()


def test_array_views_are_not_copies() -> None:
    source = ArraySource(LOGITS, "base")
    assert np.shares_memory(source.read(3, 5), LOGITS)
    turned = np.random.default_rng(0).standard_normal((4, 6, 50)).transpose(1, 0, 2)
    np.testing.assert_array_equal(rows_of(ArraySource(turned, "base")), turned.reshape(24, 50))
    assert isinstance(source, LogitSource)


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, first=ROWS, second=ROWS + 1)
    np.testing.assert_array_equal(open_logits(path, "second").read(0, 24), ROWS + 1)
    with pytest.raises(SourceError, match=r"no array named 'logits'; there are: 'first', 'second'"):
        open_logits(path)
    np.savez(path, only=ROWS)
    np.testing.assert_array_equal(open_logits(path).read(0, 24), ROWS)
    save_file({"first": ROWS, "second": ROWS}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match="no array named 'third'; there are: 'first', 'second'"):
        open_logits(tmp_path / "x.safetensors", "third")
    with pytest.raises(SourceError, match=r"a \.npy file holds one array and no names"):
        open_logits(save_npy(tmp_path / "x", ROWS), "logits")


@pytest.mark.parametrize("save", SAVE)
def test_targets(tmp_path: Path, save: Save) -> None:
    targets = np.arange(24, dtype=np.int32)
    path = tmp_path / "x"
    if save is save_npy:
        file = save(path, targets)
    else:
        file = path.with_suffix(".npz" if "npz" in save.__name__ else ".safetensors")
        if file.suffix == ".npz":
            (np.savez if save is save_npz else np.savez_compressed)(file, targets=targets)
        else:
            save_file({"targets": targets}, file)
    np.testing.assert_array_equal(open_column(file), targets)
    with pytest.raises(SourceError, match="targets must be integers"):
        open_column(save_npy(tmp_path / "y", ROWS))


# What cannot be read


def missing(path: Path) -> Path:
    return path / "missing.npy"


def folder(path: Path) -> Path:
    (path / "folder.npy").mkdir()
    return path / "folder.npy"


def unknown_kind(path: Path) -> Path:
    (path / "x.bin").write_bytes(b"1")
    return path / "x.bin"


def empty(path: Path, suffix: str) -> Path:
    (path / f"x{suffix}").touch()
    return path / f"x{suffix}"


def nonsense(path: Path, suffix: str) -> Path:
    (path / f"x{suffix}").write_bytes(b"nonsense that is long enough to hold a header" * 10)
    return path / f"x{suffix}"


def truncated(path: Path, save: Save, share: float) -> Path:
    file = save(path / "x", LOGITS)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    return file


def pickled(path: Path) -> Path:
    np.save(path / "x.npy", np.array([{}, None]), allow_pickle=True)
    return path / "x.npy"


def bare_pickle(path: Path) -> Path:
    (path / "x.npy").write_bytes(pickle.dumps(ROWS))
    return path / "x.npy"


def damaged_header(path: Path) -> Path:
    file = save_npy(path / "x", ROWS)
    file.write_bytes(file.read_bytes().replace(b"'descr'", b"'descr\n"))
    return file


def unclosed_header(path: Path) -> Path:
    file = save_npy(path / "x", ROWS)
    file.write_bytes(file.read_bytes().replace(b"50), }", b"50    "))
    return file


def negative_shape(path: Path) -> Path:
    file = save_npy(path / "x", ROWS)
    file.write_bytes(file.read_bytes().replace(b"(24, 50)", b"(-4, 50)"))
    return file


def unknown_compression(path: Path) -> Path:
    file = save_compressed(path / "x", ROWS)
    content = file.read_bytes()
    at = content.index(b"PK\x01\x02") + 10  # the method, in the directory
    file.write_bytes(content[:at] + b"\x63\x00" + content[at + 2 :])
    return file


def newer_format(path: Path) -> Path:
    file = save_npy(path / "x", ROWS)
    file.write_bytes(file.read_bytes().replace(b"NUMPY\x01", b"NUMPY\x09"))
    return file


def no_arrays(path: Path) -> Path:
    with zipfile.ZipFile(path / "x.npz", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    return path / "x.npz"


def damaged_member(path: Path) -> Path:
    file = save_compressed(path / "x", LOGITS)
    content = bytearray(file.read_bytes())
    content[300:700] = bytes(400)
    file.write_bytes(content)
    return file


def moved_member(path: Path) -> Path:
    file = save_npz(path / "x", LOGITS)
    file.write_bytes(b"PK\x03\x00" + file.read_bytes()[4:])
    return file


def compressed_fortran(path: Path) -> Path:
    return save_compressed(path / "x", np.asfortranarray(ROWS))


def header_beyond_the_file(path: Path) -> Path:
    (path / "x.safetensors").write_bytes(struct.pack("<Q", 10**9) + b"{}")
    return path / "x.safetensors"


BAD = [
    ("No such file", missing),
    ("holds no .npy, .npz, .safetensors file", folder),
    ("unknown kind of file; accepted are .npy, .npz, .safetensors", unknown_kind),
    ("is empty", lambda p: empty(p, ".npy")),
    ("is empty", lambda p: empty(p, ".npz")),
    ("is empty", lambda p: empty(p, ".safetensors")),
    ("does not begin like a .npy file", lambda p: nonsense(p, ".npy")),
    ("truncated or not an .npz file", lambda p: nonsense(p, ".npz")),
    ("truncated or not a .safetensors file", lambda p: nonsense(p, ".safetensors")),
    ("is truncated: 4800 bytes promised, 2336 there", lambda p: truncated(p, save_npy, 0.5)),
    ("cannot be read", lambda p: truncated(p, save_npy, 0.01)),
    ("cannot be read", lambda p: truncated(p, save_npy, 0.002)),
    ("truncated or not an .npz file", lambda p: truncated(p, save_npz, 0.5)),
    ("truncated or not an .npz file", lambda p: truncated(p, save_compressed, 0.5)),
    ("truncated or not a .safetensors file", lambda p: truncated(p, save_safetensors, 0.5)),
    ("truncated or not a .safetensors file", lambda p: truncated(p, save_safetensors, 0.01)),
    ("truncated or not a .safetensors file", header_beyond_the_file),
    ("holds pickled Python objects, which are never loaded", pickled),
    ("is a pickle, which is never loaded", bare_pickle),
    ("cannot be read", damaged_header),
    ("cannot be read", unclosed_header),
    ("is damaged: its header says shape (-4, 50)", negative_shape),
    ("cannot be read", unknown_compression),
    ("has .npy format version", newer_format),
    ("holds no array", no_arrays),
    ("cannot be read", damaged_member),
    ("is damaged", moved_member),
    ("is compressed in Fortran order", compressed_fortran),
    ("has dtype int64", lambda p: save_npy(p / "x", np.zeros((3, 4), np.int64))),
    ("has dtype complex64", lambda p: save_compressed(p / "x", np.zeros((3, 4), np.complex64))),
    ("has dtype int32", lambda p: save_safetensors(p / "x", np.zeros((3, 4), np.int32))),
    ("must have a vocabulary axis", lambda p: save_npy(p / "x", np.array(3, np.float32))),
    ("the vocabulary is empty", lambda p: save_npy(p / "x", np.zeros((3, 0), np.float32))),
]


@pytest.mark.parametrize(("reason", "make"), BAD)
def test_what_is_wrong_is_named(tmp_path: Path, reason: str, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    with pytest.raises(SourceError) as caught:
        open_logits(path).read(0, 24)
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("package", "array"),
    [("safetensors", ROWS), ("ml_dtypes", ROWS.astype(BFLOAT16))],
)
def test_missing_package_names_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, array: NDArray[Any]
) -> None:
    path = save_safetensors(tmp_path / "x", array)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SourceError, match=rf'needs the package {package}: pip install "klfast\[e'):
        open_logits(path)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux what is resident")
@pytest.mark.parametrize("save", [save_npy, save_npz, save_safetensors])
def test_rows_that_are_released_are_resident_no_longer(tmp_path: Path, save: Save) -> None:
    """Those beside them are, but for a page at either end; and all of them are read again."""
    logits = np.arange(64 * 4096, dtype=np.float32).reshape(64, 4096)
    path = save(tmp_path / "logits", logits)
    source = open_logits(path)
    assert isinstance(source, ArraySource)

    def resident() -> int:
        entry = Path("/proc/self/smaps").read_text().partition(str(path))[2]
        return 1024 * int(entry.partition("Rss:")[2].split()[0])

    source.read_ahead(0, 64)
    np.testing.assert_array_equal(source.read(0, 64), logits)
    assert resident() >= logits.nbytes
    source.release(16, 48)
    # The system maps pages around one that is read, and none here are.
    assert abs(resident() - logits.nbytes / 2) < 2**16
    np.testing.assert_array_equal(source.read(0, 64), logits)
    source.release(0, 64)
    assert resident() < 2**16


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([1000, 1000], 100), ([1000, 1000, 70], 100), ([128, 128], 64), ([16, 16, 16], 64),
     ([48, 48, 48], 96), ([1009, 1009], 64), ([1000, 900, 1000], 64), ([300], 64)],
)  # fmt: skip
def test_chunks_end_where_shards_do(tmp_path: Path, counts: list[int], expected: int) -> None:
    """As far as shards of one length allow: rows of two of them would have to be copied."""
    row = np.zeros(1, np.float32)
    for number, count in enumerate(counts):
        shard = np.lib.format.open_memmap(
            tmp_path / f"{number:02}.npy", "w+", np.float32, (count, 2**17)
        )  # fmt: skip
        shard[0, :1] = row
    source = open_logits(tmp_path)
    job = Job(source, [np.broadcast_to(row, source.shape)])
    assert job.chunk_rows == expected
