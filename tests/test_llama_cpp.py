"""Base-logits files of llama.cpp: real ones, made ones of every shape, and damaged ones."""

import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from klfast.kernels import cpu
from numpy.typing import NDArray
from scipy import special

import klfast
from klfast import Evaluation, SourceError, _pairs, evaluate, open_logits
from klfast._columns import write_parquet
from klfast._pairs import FlooredPair
from klfast.llama_cpp import BaseLogits, convert, encode, statistics

DATA = Path(__file__).parents[1] / "examples" / "data"
BASE, TEST = DATA / "base.kld", DATA / "q5_0.kld"  # the first chunk of files that llama.cpp wrote
RANDOM = np.random.default_rng(12)

#: What llama-perplexity printed of that chunk, with the test model in full precision.
PRINTED = (
    "   1      46.2586 ±   24.4638       0.00970 ±    0.01193       0.00331 ±    0.00092"
    "     0.422 ±  0.116 %    95.652 ±  4.348 %"
)


def made(path: Path, logits: NDArray[Any], n_ctx: int, tokens: Any = None) -> Path:
    """A file of these rows."""
    rows, n_vocab = logits.shape
    chunks = rows // (n_ctx - 1 - n_ctx // 2)
    if tokens is None:
        tokens = RANDOM.integers(0, n_vocab, (chunks, n_ctx))
    header = b"_logits_" + struct.pack("<Iii", n_ctx, n_vocab, chunks)
    path.write_bytes(header + np.asarray(tokens, "<i4").tobytes() + encode(logits).tobytes())
    return path


def by_hand(path: Path) -> tuple[Any, ...]:
    """Everything in a file, read with nothing but struct and the format's description."""
    content = path.read_bytes()
    magic, n_ctx, n_vocab, n_chunk = struct.unpack_from("<8sIii", content)
    assert magic == b"_logits_"
    tokens = np.array(struct.unpack_from(f"<{n_chunk * n_ctx}i", content, 20))
    at = 20 + 4 * n_chunk * n_ctx
    rows = []
    for _ in range(n_chunk * (n_ctx - 1 - n_ctx // 2)):
        scale, least = struct.unpack_from("<ff", content, at)
        words = np.array(struct.unpack_from(f"<{n_vocab}H", content, at + 8))
        rows.append((scale, least, words))
        at += 2 * (2 * ((n_vocab + 1) // 2) + 4)
    assert at == len(content)
    return tokens.reshape(n_chunk, n_ctx), rows


def test_real_files_are_decoded_as_described() -> None:
    source = open_logits(BASE)
    assert isinstance(source, BaseLogits)
    tokens, rows = by_hand(BASE)
    assert (source.shape, source.n_ctx, source.name) == ((1, 23, 30522), 48, str(BASE))
    np.testing.assert_array_equal(source.tokens, tokens)
    np.testing.assert_array_equal(source.targets, tokens[:, 25:])
    for number, (scale, least, words) in enumerate(rows):
        expected = (scale * words + least).astype(np.float32)
        np.testing.assert_array_equal(source.read(number, number + 1)[0], expected)


def test_numbers_that_llama_cpp_printed() -> None:
    title, line = statistics(BaseLogits(BASE), open_logits(TEST))
    assert re.split(r"\s{2,}", title) == [
        "chunk", "PPL", "ln(PPL(Q)/PPL(base))", "KL Divergence", "Δp RMS", "Same top p",
    ]  # fmt: skip
    found, printed = (
        list(map(float, re.findall(r"-?\d+\.?\d*", each))) for each in (line, PRINTED)
    )
    assert len(line) == len(PRINTED)
    # Its test model was not rounded to 16 bits: of that, perplexity and ratio know.
    assert found[5:] == printed[5:]
    np.testing.assert_allclose(found[:5], printed[:5], rtol=4e-5, atol=4e-5)


@pytest.mark.parametrize("path", [BASE, TEST])
def test_real_files_are_rounded_without_bias(path: Path) -> None:
    """Stored probabilities sum to 1, where next to nothing is at the floor."""
    scale, least, words = BaseLogits(path).stored(0, 23)
    step = scale.astype(np.float64)
    p = np.exp(step[:, None] * words + least[:, None])
    rounded = np.where((words == 0) | (words == 65535), 0.0, p)
    missing = np.where(words == 0, p, 0.0).sum(1)  # at most
    few = missing < 3e-5
    assert few.sum() >= 2
    excess = p.sum(1) - missing - 1.0
    spread = step / math.sqrt(12) * np.sqrt((rounded**2).sum(1))
    assert (excess[few] < 4 * spread[few]).all()
    assert (excess[few] + missing[few] > -4 * spread[few]).all()


def test_all_that_it_prints(tmp_path: Path) -> None:
    logits = 4 * RANDOM.standard_normal((120, 33)).astype(np.float32)
    other = logits + 0.3 * RANDOM.standard_normal(logits.shape).astype(np.float32)
    base = BaseLogits(made(tmp_path / "base", logits, 32))
    found = "\n".join(statistics(base, klfast._sources.ArraySource(other, "test")))
    a = base.read(0, len(other)).astype(np.float64)
    b = special.log_softmax(other.astype(np.float64), -1)
    rows, targets = np.arange(len(other)), base.targets.ravel()
    kl = np.where(a > -16, np.exp(a) * (a - b), 0).sum(1)
    nll_base, nll = -a[rows, targets], -b[rows, targets]
    change = 100 * (np.exp(-nll) - np.exp(-nll_base))
    n = len(kl)

    def said(name: str) -> list[float]:
        (line,) = (each for each in found.splitlines() if each.startswith(name))
        return [float(each) for each in re.findall(r"-?\d+\.\d+", line.split(":")[-1])]

    def sem(values: NDArray[Any]) -> float:
        return float(values.std() / math.sqrt(n - 1))

    assert said("Mean    KLD") == pytest.approx([kl.mean(), sem(kl)], abs=2e-6)
    for name, share in (("99.9%", 0.999), ("10.0%", 0.1), (" 0.1%", 0.001), ("Median ", 0.5),
                        ("Maximum", 1), ("Minimum", 0)):  # fmt: skip
        lines = [each for each in found.splitlines() if each.startswith(name)]
        numbers = [float(each.split(":")[1].rstrip("%")) for each in lines]
        assert numbers[0] == pytest.approx(np.quantile(kl, share), abs=2e-6)
        assert numbers[1] == pytest.approx(np.quantile(change, share), abs=1e-3)
    ppl = np.exp([nll.mean(), nll_base.mean()])
    assert said("Mean PPL(Q)      ") == pytest.approx([ppl[0], ppl[0] * sem(nll)], rel=1e-5)
    assert said("Mean PPL(base)") == pytest.approx([ppl[1], ppl[1] * sem(nll_base)], rel=1e-5)
    correlation = np.corrcoef(nll, nll_base)[0, 1]
    assert said("Cor(") == pytest.approx([100 * correlation], abs=0.01)
    ratio = nll - nll_base
    assert said("Mean ln(") == pytest.approx([ratio.mean(), sem(ratio)], abs=1e-5)
    gradient = np.array([ppl[0], -ppl[1]])
    error = math.sqrt(gradient @ np.cov(nll, nll_base, ddof=0) @ gradient / (n - 1))
    assert said("Mean PPL(Q)-PPL(base)") == pytest.approx([ppl[0] - ppl[1], error], rel=1e-3)
    assert said("Mean    Δp") == pytest.approx([change.mean(), sem(change)], abs=1e-3)
    rms = math.sqrt((change**2).mean())
    assert said("RMS Δp") == pytest.approx([rms, 0.5 / rms * sem(change**2)], abs=1e-3)
    same = (a.argmax(1) == b.argmax(1)).mean()
    assert said("Same top p")[0] == pytest.approx(100 * same, abs=1e-3)
    assert len(found.splitlines()) == 1 + len(base.tokens) + 37


# The default: one bucket for what is at the floor of either


def bucketed(scale: float, least: float, words: NDArray[Any], either: Any) -> NDArray[np.float64]:
    """A row in float64, with the floor of both rows as its last entry."""
    logp = scale * words + least
    mass = np.where(either, 0, np.exp(logp))
    floor = (words == 0) & (scale * 65535 > 15.99)
    spread = np.where(words == 65535, 0, mass)
    sigma = scale / math.sqrt(12) * math.sqrt((spread**2).sum())
    known = np.exp(logp)[either & ~floor].sum()
    most = known + floor.sum() * math.exp(least)
    missing = min(max(1 - mass.sum(), known, sigma), most)
    return np.append(mass, missing)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_floor_is_one_outcome(backend: Any) -> None:
    result = evaluate(BASE, TEST, backend=backend)
    _, base = by_hand(BASE)
    tokens, test = by_hand(TEST)
    for row, ((a, b, u), (c, d, v)) in enumerate(zip(base, test, strict=True)):
        either = ((u == 0) & (a * 65535 > 15.99)) | ((v == 0) & (c * 65535 > 15.99))
        p, q = bucketed(a, b, u, either), bucketed(c, d, v, either)
        columns = {name: column[row] for name, column in result.columns.items()}
        # 1 minus a sum of float32 exponentials: a fiftieth of what 16 bits leave unknown of it.
        assert columns["floor_mass_p"] == pytest.approx(p[-1], abs=2e-7)
        assert columns["floor_mass_q"] == pytest.approx(q[-1], abs=2e-7)
        p, q = p / p.sum(), q / q.sum()
        assert columns["kl"] == pytest.approx(special.rel_entr(p, q).sum(), rel=2e-4, abs=2e-8)
        assert columns["tv"] == pytest.approx(abs(p - q).sum() / 2, rel=1e-5)
        token = tokens[0, 25 + row]
        assert columns["nll_p"] == pytest.approx(-(a * u[token] + b), rel=1e-6)
        assert columns["nll_q"] == pytest.approx(-(c * v[token] + d), rel=1e-6)
        assert columns["same_top"] == (u.argmax() == v.argmax())
    assert (result.columns["kl"] >= 0).all()
    assert result.summary().sequences == 1
    assert result.targets_from == str(BASE)


def test_kernel_and_reference_decode_the_same_bits() -> None:
    sources = BaseLogits(BASE), BaseLogits(TEST)
    targets = sources[0].targets.ravel()
    rows = np.arange(len(targets))
    pairs = [FlooredPair(*sources, targets, rows, backend) for backend in ("cpu", "reference")]
    fast, slow = (pair.block(3, pair.read(3, 20)) for pair in pairs)
    for one, other in ((fast.p, slow.p), (fast.q, slow.q)):
        np.testing.assert_array_equal(one[:, :-1], other[:, :-1])
        np.testing.assert_allclose(np.exp(one[:, -1]), np.exp(other[:, -1]), atol=2e-7)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 600, 4099])
@pytest.mark.parametrize("kinds", ["words words", "words floats", "floats words"])
def test_kernel_and_reference_find_the_same_sums(kinds: str, width: int) -> None:
    """Rows with the word 65535 and without, all at the floor, all equal, -inf, and NaN."""
    sides, number = [], np.arange(8)
    scale = (1e-5 * number).astype(np.float32).astype(np.float64)
    for kind in kinds.split():
        parameters = np.stack([scale, -number - 9.0, np.where(number % 2, 0.0, np.nan)], 1)
        words = RANDOM.integers(0, 65535, (8, width)).astype(np.uint16)
        words[:, RANDOM.random(width) < 0.3] = 0
        words[1:3, width // 2 :] = 65535
        words[3], words[4] = 0, 65535
        values: Any = words
        if kind == "floats":
            parameters[:] = 0.0, 0.0, np.nan
            values = -np.log1p(words.astype(np.float32))
            values[5, : width // 2] = -np.inf
            values[6] = np.nan
        sides.append((values, parameters))
    found, rows = [], []
    for module in (cpu, _pairs):
        into = [np.empty((8, width), np.float32) for _ in sides]
        found.append(module.join_floors(sides, into))
        rows.append(into)
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(found[0][..., 2], found[1][..., 2])
    np.testing.assert_array_equal(found[0][..., 4:], found[1][..., 4:])
    # Of float32 exponentials; squares only say how exact the masses are.
    np.testing.assert_allclose(found[0][..., 0], found[1][..., 0], rtol=3e-6)
    for column in (1, 3):
        np.testing.assert_allclose(found[0][..., column], found[1][..., column], rtol=1e-4)


def test_a_target_at_the_floor_of_the_other_side(tmp_path: Path) -> None:
    """What is left out of the divergence is still what the model gave to the token."""
    logits = RANDOM.standard_normal((1, 40)).astype(np.float32)
    low, high = logits.copy(), logits
    low[0, 7] -= 40
    file = made(tmp_path / "base.kld", low, 4, np.full((1, 4), 7))
    expected = -special.log_softmax(high.astype(np.float64), -1)[0, 7]
    for found, name in (
        (evaluate(file, high[None]).columns["nll_q"], "nll_q"),
        (evaluate(high[None], file).columns["nll_p"], "nll_p"),
    ):
        assert found[0] == pytest.approx(expected, rel=1e-6), name


def test_one_measure_that_the_file_knows_by_itself() -> None:
    found = evaluate(BASE, TEST, metrics=["same_top"]).columns["same_top"]
    np.testing.assert_array_equal(found, evaluate(BASE, TEST).columns["same_top"])
    assert set(found) == {0.0, 1.0}


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 33, 100, 4099])
def test_every_width(tmp_path: Path, width: int) -> None:
    """Rows that reach below the floor, rows that do not, equal entries, and all of them equal."""
    scales = np.repeat([0.0, 0.01, 1.0, 6.0], 5)[:, None]
    logits = (scales * RANDOM.standard_normal((20, width))).astype(np.float32)
    other = logits + (0.1 * scales * RANDOM.standard_normal((20, width))).astype(np.float32)
    other[:5] = logits[:5]
    tokens = RANDOM.integers(0, width, (5, 10))
    base = made(tmp_path / "base", logits, 10, tokens)
    test = made(tmp_path / "test", other, 10, tokens)
    np.testing.assert_array_equal(open_logits(base).shape, (5, 4, width))
    decoded = open_logits(base).read(0, 20)
    exact = special.log_softmax(logits.astype(np.float64), -1)
    above = logits > logits.max(1, keepdims=True) - 15.9
    step = 16 / 65535 / 2 + 4e-6
    assert abs(decoded - exact)[above].max() <= step
    result = evaluate(base, test)
    kl = special.rel_entr(np.exp(exact), special.softmax(other.astype(np.float64), -1)).sum(1)
    assert (result.columns["kl"] >= 0).all()
    assert result.columns["kl"][:5].max() == 0
    # Not above the true value, but for the rounding to 16 bits.
    assert (result.columns["kl"] <= 1.02 * kl + 2e-5).all()
    np.testing.assert_allclose(result.columns["kl"][:15], kl[:15], rtol=0.05, atol=1e-6)
    mixed = evaluate(base, other.reshape(5, 4, width))
    np.testing.assert_allclose(mixed.columns["kl"][:15], kl[:15], rtol=0.05, atol=1e-6)
    np.testing.assert_array_equal(mixed.columns["target"], result.columns["target"])
    assert evaluate(base, base).columns["kl"].max() == 0


def test_an_array_as_the_base(tmp_path: Path) -> None:
    logits = 5 * RANDOM.standard_normal((8, 50)).astype(np.float32)
    test = made(tmp_path / "test", logits, 10)
    result = evaluate(logits.reshape(2, 4, 50), test)
    assert result.columns["kl"].max() < 1e-5
    assert result.targets_from == str(test)
    assert result.noise_floor is not None


def test_noise_floor_is_what_16_bits_do(tmp_path: Path) -> None:
    logits = np.concatenate([s * RANDOM.standard_normal((64, 3000)) for s in (1, 2.5, 4)])
    base = made(tmp_path / "base", logits.astype(np.float32), 10)
    result = evaluate(base, logits.astype(np.float32).reshape(48, 4, 3000))
    floor = result.noise_floor
    assert floor is not None
    measured = result.columns["kl"].mean()
    assert measured / 2 < floor < 4 * measured
    assert "rounding logits to 16 bits" in str(result)


def test_flips_where_tops_are_at_the_other_floor(tmp_path: Path) -> None:
    logits = np.zeros((4, 40), np.float32)
    other = logits.copy()
    logits[:, 7], other[:, 9] = 20, 20  # either one's first choice is at the floor of the other
    tokens = np.tile([7], (1, 10))
    result = evaluate(
        made(tmp_path / "base", logits, 10, tokens), made(tmp_path / "test", other, 10, tokens)
    )
    assert result.columns["same_top"].tolist() == [0] * 4
    assert result.columns["flip"].tolist() == [1] * 4  # a right answer is lost


def test_rows_that_are_left_out() -> None:
    whole = evaluate(BASE, TEST)
    keep = np.arange(whole.rows) % 3 == 1
    targets = np.where(keep, whole.columns["target"], 10**6)
    for result in (evaluate(BASE, TEST, where=keep), evaluate(BASE, TEST, targets, where=keep)):
        for name, column in whole.columns.items():
            np.testing.assert_array_equal(result.columns[name], column[keep])
        assert result.row_numbers.tolist() == np.flatnonzero(keep).tolist()
        assert result.noise_floor == pytest.approx(whole.noise_floor, rel=0.5)


def test_the_accumulator_takes_the_file() -> None:
    evaluation = Evaluation()
    evaluation.update(open_logits(BASE), open_logits(TEST))
    expected = evaluate(BASE, TEST)
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(evaluation.columns[name], column)
    again = Evaluation.from_dict(evaluation.to_dict())
    assert again == evaluation
    assert evaluation.noise_floor == expected.noise_floor is not None
    again.merge(evaluation)
    assert again.noise_floor == pytest.approx(expected.noise_floor)
    assert again.summary().sequences == 2
    # Alone it comes from another kernel than with the other measures.
    compared = klfast.compare(open_logits(BASE), open_logits(TEST), ("kl", "reverse_kl", "tv"))
    np.testing.assert_allclose(compared["kl"].ravel(), expected.columns["kl"], rtol=1e-7)


def test_a_file_beside_arrays(tmp_path: Path) -> None:
    """One base in full precision, candidates of both kinds: each is compared as well as it can."""
    parquet = pytest.importorskip("pyarrow.parquet")
    logits = 5 * RANDOM.standard_normal((8, 50)).astype(np.float32)
    other = logits + 0.1 * RANDOM.standard_normal(logits.shape).astype(np.float32)
    test = made(tmp_path / "test", other, 10)
    arrays = logits.reshape(2, 4, 50), other.reshape(2, 4, 50)
    found = evaluate(arrays[0], [test, arrays[1]])
    alone = evaluate(*arrays, BaseLogits(test).targets)
    np.testing.assert_array_equal(found[1].columns["kl"], alone.columns["kl"])
    np.testing.assert_allclose(found[0].columns["kl"], alone.columns["kl"], rtol=0.05, atol=1e-5)
    assert found[0].versus(found[1]).rows == 8
    write_parquet(tmp_path / "o.parquet", found)
    masses = parquet.read_table(tmp_path / "o.parquet")["floor_mass_p"].to_pylist()
    assert masses == [*found[0].columns["floor_mass_p"], *[None] * 8]
    with pytest.raises(ValueError, match="these rows have the columns"):
        found[0].merge(found[1])
    with pytest.raises(SourceError, match="holds one array and no names, so no 'x'"):
        open_logits(test, "x")


# Written


@pytest.mark.parametrize("width", [1, 2, 7, 64, 1001])
def test_encoding_is_the_arithmetic_of_llama_cpp(width: int) -> None:
    f = np.float32
    rows = RANDOM.choice([0, 1e-4, 1, 9], (30, 1)) * RANDOM.standard_normal((30, width))
    rows[1:3, ::2] = -np.inf if width > 1 else 0
    rows = rows.astype(np.float32)
    for row, stored in zip(rows, encode(rows), strict=True):
        largest = row.max()
        lowest = max(row.min(), largest - f(16))
        total = 0.0
        for x in row:  # expf, summed up in double precision
            total += float(f(math.exp(x - largest)))
        least = f(f(lowest - largest) - f(math.log(total)))
        scale = f((largest - lowest) / f(65535))
        assert struct.unpack_from("<ff", stored) == (scale, least)
        words = stored[8:].view("<u2")
        assert len(words) == 2 * ((width + 1) // 2)
        assert not words[width:].any()
        for x, word in zip(row, words, strict=False):
            expected = 0
            if scale and x > lowest:  # to nearest, by adding 1.5 * 2^23
                shifted = f(f(f(1 / scale) * f(x - lowest)) + f(12582912))
                expected = (int(shifted.view(np.int32)) & 0x007FFFFF) - 0x00400000
            assert word == expected


def test_decoded_values_encode_to_the_same_file(tmp_path: Path) -> None:
    for name, path in (("real", BASE), ("made", made(
        tmp_path / "m", (RANDOM.choice([0, 1e-3, 1, 9], (40, 1))
        * RANDOM.standard_normal((40, 37))).astype("f4"), 10))):  # fmt: skip
        source = BaseLogits(path)
        np.save(tmp_path / "tokens.npy", source.tokens)
        for suffix in (".npy", ".safetensors"):
            array, again = tmp_path / f"{name}{suffix}", tmp_path / f"{name}.kld"
            convert(path, array)
            np.testing.assert_array_equal(open_logits(array).read(0, 23), source.read(0, 23))
            convert(array, again, tokens=tmp_path / "tokens.npy", context=source.n_ctx,
                    input="log_probs")  # fmt: skip
            found = BaseLogits(again)
            np.testing.assert_array_equal(found.tokens, source.tokens)
            np.testing.assert_array_equal(found.read(0, 23), source.read(0, 23))
            if path == BASE:  # where no step is below the resolution of float32
                assert again.read_bytes() == path.read_bytes()
        convert(path, again)
        assert again.read_bytes() == path.read_bytes()


def test_logits_to_a_file_and_back(tmp_path: Path) -> None:
    logits = 1.5 * RANDOM.standard_normal((3, 7, 45)).astype(np.float32)
    tokens = RANDOM.integers(0, 45, 48)
    np.save(tmp_path / "logits.npy", logits)
    convert(tmp_path / "logits.npy", tmp_path / "o", tokens=tokens, context=16)
    source = BaseLogits(tmp_path / "o")
    assert source.shape == logits.shape
    np.testing.assert_array_equal(source.tokens.ravel(), tokens)
    np.testing.assert_array_equal(source.targets, tokens.reshape(3, 16)[:, 9:])
    expected = special.log_softmax(logits.astype(np.float64), -1)
    np.testing.assert_allclose(source.read(0, 21).reshape(logits.shape), expected, atol=3e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "name tokens (--tokens) and context"),
        ({"tokens": np.zeros(48, int)}, "name tokens (--tokens) and context"),
        ({"tokens": np.zeros(47, int), "context": 16}, "has 21 rows, and tokens are 47 of int64"),
        ({"tokens": np.zeros(48), "context": 16}, "of float64; accepted"),
        ({"tokens": np.full(48, 45), "context": 16}, "token 45 is outside the vocabulary, 0 to 44"),
        ({"tokens": np.zeros(48, int), "context": 2}, "context is 2; accepted"),
    ],
)
def test_refused_conversions(tmp_path: Path, options: Any, reason: str) -> None:
    np.save(tmp_path / "logits.npy", np.zeros((3, 7, 45), np.float32))
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        convert(tmp_path / "logits.npy", tmp_path / "o", **options)
    assert "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["logits.npy"]


def test_values_that_cannot_be_written(tmp_path: Path) -> None:
    logits = np.zeros((7, 45), np.float32)
    logits[4, 5] = np.nan
    np.save(tmp_path / "logits.npy", logits)
    with pytest.raises(
        SourceError, match=r"logits\.npy: rows from 0: row 4 has the largest value n"
    ):
        convert(tmp_path / "logits.npy", tmp_path / "o", tokens=np.zeros(16, int), context=16)
    with pytest.raises(ValueError, match=r"accepted: \.npy"):
        convert(BASE, tmp_path / "o.npz")
    with pytest.raises(ValueError, match="holds logits alone"):
        convert(BASE, tmp_path / "o.npy", context=3)
    with pytest.raises(ValueError, match="has its own tokens"):
        convert(BASE, tmp_path / "o", tokens=np.zeros(48, int), context=48)


# Damaged, or of another job


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    rows = RANDOM.standard_normal((8, 9)).astype(np.float32)
    return made(tmp_path / "whole", rows, 10).read_bytes()


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        BaseLogits(path).read(0, 8)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_truncated_anywhere(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "cut"
    for length in range(len(whole)):
        message = refusal(path, whole[:length])
        if length == 0:
            assert "does not begin with _logits_" in message
        elif length < 20:
            assert f"its header has 20 bytes, {length} are there" in message
        else:
            assert f"truncated: {len(whole)} bytes promised, {length} there" in message
    assert "(1 of 2 chunks are whole)" in message
    assert "is damaged" in refusal(path, whole + b"\0")


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, b"_Logits_", "does not begin with _logits_"),
        (8, struct.pack("<I", 2), "header says n_ctx 2, n_vocab 9, n_chunk 2"),
        (8, struct.pack("<I", 2**32 - 1), "truncated"),
        (12, struct.pack("<i", -9), "n_vocab -9"),
        (12, struct.pack("<i", 0), "n_vocab 0"),
        (16, struct.pack("<i", -1), "n_chunk -1"),
        (16, struct.pack("<i", 2**31 - 1), "truncated"),
        (20 + 4 * 6, struct.pack("<i", 9), "token 9 in chunk 0 is outside the vocabulary, 0 to 8"),
        (100, struct.pack("<f", math.nan), "row 0 has scale nan"),
        (100, struct.pack("<f", -1.0), "row 0 has scale -1.0"),
        (104, struct.pack("<f", math.inf), "least log-probability inf"),
    ],
)
def test_damaged(tmp_path: Path, whole: bytes, at: int, value: bytes, reason: str) -> None:
    content = whole[:at] + value + whole[at + len(value) :]
    assert reason in refusal(tmp_path / "damaged", content)


def test_no_chunks(tmp_path: Path) -> None:
    path = made(tmp_path / "none", np.zeros((0, 9), np.float32), 10)
    assert open_logits(path).shape == (0, 4, 9)
    assert evaluate(path, path).rows == 0


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    rows = RANDOM.standard_normal((8, 9)).astype(np.float32)
    tokens = RANDOM.integers(0, 9, (2, 10))
    base = made(tmp_path / "base", rows, 10, tokens)
    changed = tokens.copy()
    changed[1, 3] += 1 if tokens[1, 3] < 8 else -1
    for other, reason in (
        (made(tmp_path / "a", rows, 10, changed), "made of another text.*token 3 of chunk 1"),
        (made(tmp_path / "b", rows, 9, None), r"n_ctx 9, but .*base has 10|shape"),
        (made(tmp_path / "c", rows[:, :8], 10, tokens % 8), "vocabulary of 8, but .*base has 9"),
        (made(tmp_path / "d", rows[:4], 10, tokens[:1]), "has shape"),
    ):
        for compare in (evaluate, lambda a, b: list(statistics(BaseLogits(a), open_logits(b)))):
            with pytest.raises(SourceError, match=reason) as caught:
                compare(base, other)
            assert str(caught.value).startswith(str(other))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": 2.0}, r"temperature is 2\.0; accepted, where a file of llama.cpp"),
        ({"vocab_size": 100}, "vocab_size is 100; accepted"),
        ({"input": "probs"}, "input is 'probs'; accepted"),
    ],
)
def test_options_that_make_no_sense(options: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        evaluate(BASE, TEST, **options)
