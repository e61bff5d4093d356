"""The command line: what it prints and writes, how it exits, and that it never shows a trace."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import klfast
from klfast import _peers
from klfast._job import evaluate
from klfast._machine import info
from klfast._options import parser_of_commands
from klfast.cli import main
from klfast.llama_cpp import BaseLogits, statistics

RANDOM = np.random.default_rng(5)
BASE = 3 * RANDOM.standard_normal((30, 80)).astype(np.float32)
TEST = BASE + 0.3 * RANDOM.standard_normal(BASE.shape).astype(np.float32)
TARGETS = RANDOM.integers(0, 80, 30)
OTHER = BASE + 0.6 * RANDOM.standard_normal(BASE.shape).astype(np.float32)
EXAMPLES = Path(__file__).parents[1] / "examples" / "data"
LIMIT = 0.08  # between the mean divergences of the two

Outcome = tuple[int, str, str]
Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in a folder that has inputs; return status, output and error stream."""
    monkeypatch.chdir(tmp_path)
    np.save("base.npy", BASE)
    np.save("test.npy", TEST)
    np.save("targets.npy", TARGETS)

    def outcome(*arguments: str) -> Outcome:
        try:
            status = main(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return outcome


def leftovers(*expected: str) -> set[str]:
    return set(os.listdir()) - {"base.npy", "test.npy", "targets.npy", *expected}  # noqa: PTH208


def test_rows_that_are_left_out(run: Run) -> None:
    keep = np.arange(30) % 4 > 1
    np.save("keep.npy", keep)
    np.save("padded.npy", np.where(keep, TARGETS, -100))
    files = ("compare", "base.npy", "test.npy", "--targets", "padded.npy", "--json", "-")
    status, out, err = run(*files, "--where", "keep.npy", "--columns")
    assert (status, err) == (0, "")
    content = json.loads(out)
    assert content["columns"]["row"] == np.flatnonzero(keep).tolist()
    assert content["rows"] == keep.sum()
    ignoring = json.loads(run(*files, "--ignore-index", "-100")[1])
    assert ignoring["measures"] == content["measures"]
    assert ignoring["worst_rows"] == content["worst_rows"]
    status, _, err = run(*files)
    assert (status, err.count("\n")) == (1, 1)
    assert "target -100 at row 0" in err
    np.save("none.npy", keep & False)
    status, _, err = run(*files, "--where", "none.npy")
    assert (status, err) == (1, "klfast: all 30 rows are left out; there is nothing to compare\n")
    status, _, err = run(*files, "--where", "padded.npy")
    assert (status, err) == (1, "klfast: padded.npy: holds int64; where must be booleans\n")
    status, _, err = run("compare", "base.npy", "test.npy", "--ignore-index", "x")
    assert (status, "'x' is not a whole number" in err) == (2, True)


def test_compare_prints_a_table(run: Run) -> None:
    status, out, err = run("compare", "base.npy", "test.npy", "--targets", "targets.npy")
    assert (status, err) == (0, "")
    expected = klfast.compare(BASE, TEST, ["kl"], dtype=np.float64)["kl"]
    (line,) = (line for line in out.splitlines() if line.startswith("kl "))
    assert float(line.split()[1]) == pytest.approx(expected.mean(), rel=1e-4)
    assert float(line.split()[-1]) == pytest.approx(expected.max(), rel=1e-3)
    worst = out.partition("worst rows by kl\n")[2].splitlines()[1]
    assert int(worst.split()[0]) == expected.argmax()
    for text in ("base.npy", "30 x 80", "median", "99.9 %", "same top token", "ratio test / base"):
        assert text in out


def test_json_has_everything(run: Run) -> None:
    status, out, _ = run(
        "compare", "base.npy", "test.npy", "--targets", "targets.npy", "--json", "o.json",
        "--columns", "--metrics", "kl,renyi:2", "--worst", "2", "--fail-above", "kl.max=100",
    )  # fmt: skip
    assert status == 0
    assert "renyi:2" in out
    content = json.loads(Path("o.json").read_text())
    expected = evaluate(BASE, TEST, TARGETS, metrics=["kl", "renyi:2"])
    assert content["columns"]["renyi:2"] == expected.columns["renyi:2"].tolist()
    assert content["perplexity"]["ratio"] == expected.summary().value("perplexity.ratio")
    assert len(content["worst_rows"]) == 2
    assert content["settings"]["targets"] == "targets.npy"
    assert content["limits"] == {"above": {"kl.max": 100.0}, "below": {}, "violations": []}
    assert {"versions", "machine", "seconds", "nan_rows"} <= content.keys()
    assert not leftovers("o.json")


def test_json_on_the_output_stream(run: Run) -> None:
    status, out, _ = run("compare", "base.npy", "test.npy", "--json", "-")
    assert status == 0
    assert json.loads(out)["rows"] == 30


def test_json_with_infinities_is_valid(run: Run) -> None:
    test = TEST.copy()
    test[4, 4] = -np.inf
    np.save("test.npy", test)
    status, out, _ = run("compare", "base.npy", "test.npy", "--json", "o.json")
    assert status == 0
    assert "kl is infinite in 1 of the rows" in out

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(Path("o.json").read_text(), parse_constant=refuse)
    assert content["measures"]["kl"]["mean"] == "Infinity"


def test_limits_and_names_that_json_has_not(run: Run) -> None:
    odd = os.fsdecode(b"\xff\xc3.npy")
    np.save(odd, TEST)
    arguments = ("compare", "base.npy", odd, "--json", "o.json", "--fail-above", "kl.max=inf")
    assert run(*arguments)[0] == 0
    content = json.loads(Path("o.json").read_text())
    assert content["limits"]["above"] == {"kl.max": "Infinity"}
    assert content["test"]["name"] == odd


def test_rows_with_nan_are_reported(run: Run) -> None:
    test = TEST.copy()
    test[[4, 9], 0] = np.nan
    np.save("test.npy", test)
    arguments = ("compare", "base.npy", "test.npy", "--json", "o.json")
    status, out, _ = run(*arguments)
    assert status == 0
    assert "2 rows left out of all statistics: 4, 9" in out
    assert json.loads(Path("o.json").read_text())["nan_rows"] == [4, 9]
    assert run(*arguments, "--fail-above", "nan_rows=1")[0] == 3


@pytest.mark.parametrize(
    ("limit", "status"),
    [
        (("--fail-above", "kl.mean=10"), 0),
        (("--fail-above", "kl.mean=1e-9"), 3),
        (("--fail-above", "kl.p99_9=1e-9", "--fail-above", "tv.mean=1"), 3),
        (("--fail-below", "same_top.mean=0.1"), 0),
        (("--fail-below", "same_top.mean=1.01"), 3),
    ],
)
def test_limits_decide_the_status(run: Run, limit: tuple[str, ...], status: int) -> None:
    found, out, err = run("compare", "base.npy", "test.npy", "--json", "o.json", *limit)
    assert found == status
    assert "worst rows" in out
    assert Path("o.json").exists()
    assert err.count("limit violated") == (status == 3)


def test_other_options(run: Run) -> None:
    np.savez("both.npz", logits=BASE, other=TEST)
    np.savez("again.npz", logits=TEST, other=TEST)
    status, out, _ = run(
        "compare", "both.npz", "again.npz", "--key", "other", "--temperature", "2,2",
        "--vocab-size", "70", "--input", "logits", "--chunk-rows", "4", "--backend", "reference",
    )  # fmt: skip
    assert status == 0
    (line,) = (line for line in out.splitlines() if line.startswith("kl "))
    assert line.split()[1:] == ["0"] * 9


def test_threads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(klfast, "set_num_threads", asked.append)
    assert run("compare", "base.npy", "test.npy", "--threads", "1")[0] == 0
    assert asked == [1]


def test_several_candidates(run: Run) -> None:
    np.save("other.npy", OTHER)
    status, out, err = run(
        "compare", "base.npy", "test.npy", "other.npy", "--targets", "targets.npy",
        "--json", "o.json", "--columns", "--fail-above", f"kl.mean={LIMIT}",
    )  # fmt: skip
    assert status == 3
    assert err.startswith("klfast: limit violated: other.npy: kl.mean = ")
    assert err.count("\n") == 1
    expected = evaluate("base.npy", ["test.npy", "other.npy"], "targets.npy")
    verdict = expected[0].versus(expected[1]).verdict
    assert out.endswith(f"{verdict}\n")
    assert verdict.startswith("test.npy is closer to the base than other.npy: mean kl ")
    content = json.loads(Path("o.json").read_text())
    assert content["differences"][0]["verdict"] == verdict
    assert content["limits"]["violations"] == [err.split("violated: ")[1].strip()]
    for found, each in zip(content["candidates"], expected, strict=True):
        assert found["test"]["name"] == each.test["name"]
        assert found["columns"]["kl"] == each.columns["kl"].tolist()
        assert found["measures"] == each.summary().to_dict()["measures"]


def test_sequences_and_bootstrap(run: Run) -> None:
    np.save("labels.npy", np.arange(30) // 3)
    arguments = ("compare", "base.npy", "test.npy", "--sequences", "labels.npy", "--json", "o.json")
    status, out, _ = run(*arguments, "--bootstrap", "200")
    assert status == 0
    assert "30 of 10 sequences" in out
    assert "200 bootstrap samples of the 10 sequences" in out
    assert "10 sequences are so few that intervals tell little" in out
    expected = evaluate("base.npy", "test.npy", sequences="labels.npy").summary(bootstrap=200)
    content = json.loads(Path("o.json").read_text())
    assert content["measures"]["kl"]["high"] == expected.measures["kl"].high
    assert content["by_position"] == expected.to_dict()["by_position"]
    status, out, _ = run(*arguments, "--bootstrap", "0")
    assert status == 0
    assert "bootstrap" not in out
    assert run(*arguments, "--fail-above", f"kl.high={expected.measures['kl'].mean}")[0] == 3


def test_metrics_all(run: Run) -> None:
    status, out, _ = run("compare", "base.npy", "test.npy", "--metrics", "all")
    assert status == 0
    for name in ("js", "renyi:0.5", "renyi:2", "entropy_p", "entropy_q", "topk_overlap:5"):
        assert f"\n{name} " in out


def test_markdown(run: Run) -> None:
    odd = "a|b<i>_[x](y).npy"
    np.save(odd, OTHER)
    status, _, _ = run(
        "compare", "base.npy", "test.npy", odd, "--targets", "targets.npy", "--markdown", "o.md",
        "--fail-above", "kl.mean=0",
    )  # fmt: skip
    assert status == 3
    text = Path("o.md").read_text()
    assert odd not in text
    assert r"a\|b\<i\>\_\[x\](y).npy" in text
    assert text.count("**limit violated**") == 2
    assert "is closer to the base than" in text
    for line in text.splitlines():
        if line.startswith("| measure"):
            cells = line.count(" | ")
    rows = [line for line in text.splitlines() if line.startswith("| kl ")]
    assert len(rows) == 2
    assert {row.count(" | ") for row in rows} == {cells}
    assert not leftovers("o.md", odd)


def test_parquet(run: Run) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run("compare", "base.npy", "test.npy", "test.npy", "--parquet", "o.parquet")[0] == 0
    table = parquet.read_table("o.parquet")
    expected = evaluate(BASE, TEST)
    np.testing.assert_array_equal(table["kl"].to_numpy(), np.tile(expected.columns["kl"], 2))
    assert not leftovers("o.parquet")


def test_parquet_without_pyarrow(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    outcome = run("compare", "base.npy", "test.npy", "--parquet", "o.parquet")
    assert outcome[:2] == (1, "")
    assert outcome[2].startswith("klfast: writing Parquet needs the package pyarrow: pip install")
    assert not leftovers()


def test_checkpoint_and_resume(run: Run) -> None:
    arguments = ("compare", "base.npy", "test.npy", "--checkpoint", "kept", "--json", "o.json")
    assert run(*arguments)[0] == 0
    first = json.loads(Path("o.json").read_text())
    status, _, err = run(*arguments)
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith("klfast: kept: holds a checkpoint; continue it with --resume")
    assert run(*arguments, "--resume")[0] == 0
    assert json.loads(Path("o.json").read_text()) == first
    status, _, err = run(*arguments, "--resume", "--temperature", "2")
    assert status == 1
    assert err == "klfast: kept: belongs to another job: temperature was 1.0, and is 2.0\n"


def test_interrupt_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, calls = klfast.compare, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compare(*arguments, **options)

    np.save("a b.npy", TEST)
    arguments = ("compare", "base.npy", "a b.npy", "--checkpoint", "kept", "--chunk-rows", "5")
    with monkeypatch.context() as patch:
        patch.setattr(klfast, "compare", interrupted)
        outcome = run(*arguments)
    again = "klfast compare base.npy 'a b.npy' --checkpoint kept --chunk-rows 5 --resume"
    message = f"klfast: interrupted; 10 of 30 rows are kept in kept; go on with: {again}\n"
    assert outcome == (130, "", message)
    status, out, _ = run(*shlex.split(again)[1:])
    assert status == 0
    assert "rows  30" in out


def test_llama_compat_prints_only_that(run: Run) -> None:
    base, test = (str(EXAMPLES / name) for name in ("base.kld", "q5_0.kld"))
    status, out, err = run("compare", base, test, "--llama-compat")
    assert (status, err) == (0, "")
    expected = "\n".join(statistics(BaseLogits(base), BaseLogits(test)))
    assert out == f"{expected}\n"
    status, out, _ = run("compare", base, test, base, "--llama-compat")
    assert (status, out.split("\n\n")[0]) == (0, f"{test}\n{expected}")
    outcome = run("compare", "base.npy", "test.npy", "--llama-compat")
    assert outcome[0] == 1
    assert outcome[2].startswith("klfast: base.npy: does not begin with _logits_")


def test_llama_files(run: Run) -> None:
    base, test = (str(EXAMPLES / name) for name in ("base.kld", "q5_0.kld"))
    status, out, err = run("compare", base, test, "--json", "o.json")
    assert (status, err) == (0, "")
    assert "16-bit log-probabilities, 1 x 23 x 30522" in out
    assert "rounding logits to 16 bits causes by itself a mean kl of about" in out
    content = json.loads(Path("o.json").read_text())
    assert content["measures"]["kl"]["min"] > 0
    assert content["measures"]["floor_mass_p"]["max"] < 1e-3
    assert content["noise_floor"] < 1e-5


def test_convert(run: Run) -> None:
    base = str(EXAMPLES / "base.kld")
    status, out, err = run("convert", base, "o.npy")
    assert (status, out, err.count("\n")) == (0, "", 1)
    _, words = zip(*(BaseLogits(base).stored(row, row + 1)[1:] for row in range(23)), strict=True)
    share = 100 * np.mean(np.concatenate(words) == 0)  # all rows are cut off at the bottom
    assert err.startswith(f"klfast: {share:.3g} % of the entries are at the floor of their row: ")
    np.save("tokens.npy", BaseLogits(base).tokens)
    arguments = ("o.npy", "o.kld", "--tokens", "tokens.npy", "--context", "48")
    assert run("convert", *arguments, "--input", "log_probs") == (0, "", "")
    assert Path("o.kld").read_bytes() == Path(base).read_bytes()
    status, _, err = run("convert", "base.npy", "base.npy")
    assert status == 2
    assert "is one of the inputs, which would be overwritten" in err
    outcome = run("convert", "base.npy", "new.kld")
    assert outcome == (1, "", "klfast: new.kld: a file of llama.cpp holds the text too: name "
                       "tokens (--tokens) and context (--context); or write a .npy or .safetensors "
                       "file\n")  # fmt: skip
    assert not leftovers("o.npy", "o.kld", "tokens.npy")


def test_hidden_states_and_heads(run: Run) -> None:
    weight = RANDOM.standard_normal((80, 16)).astype(np.float32)
    save_file({"weight": weight, "bias": weight[:, 0].copy()}, "head.safetensors")
    save_file({"lm_head.weight": weight, "norm.weight": weight[0].copy()}, "model.safetensors")
    for name in ("p", "q"):
        np.save(f"{name}.npy", RANDOM.standard_normal((30, 16)).astype(np.float32))
    p, q = np.load("p.npy"), np.load("q.npy")
    for files, base, test in (
        (("p.npy", "q.npy", "--head", "head.safetensors"),
         p @ weight.T + weight[:, 0], q @ weight.T + weight[:, 0]),
        (("p.npy", "q.npy", "--head", "model.safetensors", "--head", "head.safetensors"),
         p @ weight.T, q @ weight.T + weight[:, 0]),
        (("head.safetensors", "model.safetensors", "--hidden", "q.npy"),
         q @ weight.T + weight[:, 0], q @ weight.T),
    ):  # fmt: skip
        status, _, err = run("compare", *files, "--json", "o.json", "--columns")
        assert (status, err) == (0, "")
        found = json.loads(Path("o.json").read_text())["columns"]["kl"]
        np.testing.assert_allclose(found, klfast.kl_divergence(base, test), rtol=1e-3, atol=1e-9)
    assert run("compare", "p.npy", "q.npy", "--head", "no.npy")[2].startswith("klfast: no.npy: ")


def test_a_folder_of_shards(run: Run) -> None:
    Path("shards").mkdir()
    for i in range(3):
        np.save(f"shards/{i}.npy", TEST[10 * i : 10 * i + 10])
    expected = evaluate(BASE, TEST).summary().to_dict()["measures"]
    for name in ("shards", "shards/*.npy"):
        assert run("compare", "base.npy", name, "--json", "o.json")[0] == 0
        assert json.loads(Path("o.json").read_text())["measures"] == expected


def test_memory_is_said_up_front(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klfast.cli._LONG_JOB", 100)
    status, _, err = run("compare", "base.npy", "test.npy")
    assert status == 0
    assert err.startswith("klfast: 30 rows of 80, 19.2 kB to read; at most ")
    assert "of memory beside mapped files" in err


# Status 1: the job failed


def shorter() -> None:
    np.save("test.npy", TEST[:20])


def narrower() -> None:
    np.save("test.npy", TEST[:, :60])


def cut() -> None:
    content = Path("test.npy").read_bytes()
    Path("test.npy").write_bytes(content[:-1000])


def no_rows() -> None:
    np.save("base.npy", BASE[:0])
    np.save("test.npy", TEST[:0])
    np.save("targets.npy", TARGETS[:0])


FAILURES: list[tuple[str, Callable[[], object]]] = [
    ("test.npy: No such file or directory", lambda: Path("test.npy").unlink()),
    ("test.npy: is empty", lambda: Path("test.npy").write_bytes(b"")),
    ("test.npy: is truncated: 9600 bytes promised, 8600 there", cut),
    ("test.npy: holds pickled", lambda: np.save("test.npy", np.array([{}]), allow_pickle=True)),
    ("test.npy: has dtype int64", lambda: np.save("test.npy", TEST.astype(int))),
    ("test.npy: has shape (20, 80), but base.npy has (30, 80)", shorter),
    ("test.npy: has a vocabulary of 60, but base.npy has 80", narrower),
    ("base.npy: holds no rows", no_rows),
    ("targets.npy: has shape (29,)", lambda: np.save("targets.npy", TARGETS[1:])),
    ("targets.npy: target 172 at row 0", lambda: np.save("targets.npy", TARGETS * 0 + 172)),
    ("targets.npy: target -1 at row 0", lambda: np.save("targets.npy", TARGETS * 0 - 1)),
    ("targets.npy: holds float64; targets must", lambda: np.save("targets.npy", TARGETS / 1)),
]


@pytest.mark.parametrize(("reason", "spoil"), FAILURES)
def test_bad_files_are_one_line(run: Run, reason: str, spoil: Callable[[], object]) -> None:
    spoil()
    status, out, err = run(
        "compare", "base.npy", "test.npy", "--targets", "targets.npy", "--json", "o.json"
    )
    assert status == 1
    assert out == ""
    assert err.startswith(f"klfast: {reason}")
    assert err.count("\n") == 1
    assert not leftovers()


def test_missing_key(run: Run) -> None:
    np.savez("x.npz", a=BASE, b=TEST)
    status, _, err = run("compare", "x.npz", "x.npz", "--key", "c")
    assert (status, err) == (1, "klfast: x.npz: holds no array named 'c'; there are: 'a', 'b'\n")


def test_backend_that_is_missing(run: Run) -> None:
    status, _, err = run("compare", "base.npy", "test.npy", "--backend", "cuda")
    assert status == 1
    assert err.startswith("klfast: backend 'cuda' cannot be used")
    assert err.count("\n") == 1


def test_disk_full_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    Path("o.json").write_text("before")
    status, _, err = run("compare", "base.npy", "test.npy", "--json", "o.json")
    assert (status, err) == (1, "klfast: o.json: cannot be written (No space left on device)\n")
    assert Path("o.json").read_text() == "before"
    assert not leftovers("o.json")


def test_what_is_synced_can_be_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows syncs no other file."""
    fsync, synced = os.fsync, []

    def sync(descriptor: int) -> None:
        synced.append(os.write(descriptor, b""))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    assert run("compare", "base.npy", "test.npy", "--json", "o.json")[0] == 0
    assert synced


def test_interrupt_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = klfast.compare
    calls = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compare(*arguments, **options)

    monkeypatch.setattr(klfast, "compare", interrupted)
    outcome = run("compare", "base.npy", "test.npy", "--json", "o.json", "--chunk-rows", "5")
    assert outcome == (130, "", "klfast: interrupted; nothing was written\n")
    assert not leftovers()


# Status 2: bad arguments


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "required"),
        (("compare", "base.npy"), "required: TEST"),
        (("compare", "base.npy", "test.npy", "--metrics", "kk"), "did you mean 'kl'"),
        (("compare", "base.npy", "test.npy", "--metrics", "renyi:-1"), "alpha is -1"),
        (("compare", "base.npy", "test.npy", "--metrics", "nll_p"), "needs targets"),
        (("compare", "base.npy", "test.npy", "--metrics", ","), "metrics is empty"),
        (("compare", "base.npy", "test.npy", "--temperature", "0"), "positive"),
        (("compare", "base.npy", "test.npy", "--temperature", "1,2,3"), "one or two"),
        (("compare", "base.npy", "test.npy", "--vocab-size", "0"), "a whole number from 1"),
        (("compare", "base.npy", "test.npy", "--chunk-rows", "x"), "a whole number from 1"),
        (("compare", "base.npy", "test.npy", "--threads", "-1"), "a whole number from 1"),
        (("compare", "base.npy", "test.npy", "--backend", "tpu"), "invalid choice"),
        (("compare", "base.npy", "test.npy", "--fail-above", "kl.mean"), "not NAME=X"),
        (("compare", "base.npy", "test.npy", "--fail-above", "kl.mean=x"), "not a number"),
        (("compare", "base.npy", "test.npy", "--fail-above", "kl.men=1"), "nearest is 'kl.me"),
        (("compare", "base.npy", "test.npy", "--fail-above", "foo=1"), "noise_floor, {kl,rev"),
        (
            ("compare", "base.npy", "test.npy", "--fail-above", "perplexity.ratio=1"),
            "needs targets",
        ),
        (("compare", "base.npy", "test.npy", "--columns"), "--columns needs --json"),
        (("compare", "base.npy", "test.npy", "--resume"), "--resume needs --checkpoint"),
        (("compare", "base.npy", "test.npy", "--checkpoint", "base.npy"), "is not a folder"),
        (("compare", "base.npy", "test.npy", "--report", "base.npy"), "is not a folder"),
        (("compare", "base.npy", "test.npy", "--checkpoint", "base.npy/x"), "base.npy is not a fo"),
        (("compare", "base.npy", "test.npy", "--report", "base.npy/x/y"), "base.npy is not a fold"),
        (("compare", "base.npy", "test.npy", "--fail-above", "kl=1"), "nearest is 'kl.mean'"),
        (("compare", "base.npy", "test.npy", "--bootstrap", "1"), "0 or a number from 2"),
        (("compare", "base.npy", "test.npy", "--bootstrap", "x"), "a whole number from 0"),
        (("compare", "base.npy", "test.npy", "--checkpoint-every", "-1"), "seconds from 0"),
        (("compare", "base.npy", "test.npy", "--vocab-size", "81"), "accepted: 1 to 80"),
        (("compare", "base.npy", "test.npy", "--parquet", "test.npy"), "is one of the inputs"),
        (("compare", "base.npy", "test.npy", "--markdown", "no/o.md"), "there is no folder no"),
        (("compare", "base.npy", "test.npy", "--tokenizer", "x"), "--tokenizer needs --report"),
        (("compare", "b", "t", "--llama-compat", "--json", "o"), "does not go with --json"),
        (("compare", "b", "t", "--llama-compat", "--fail-above", "kl.mean=1"), "does not go with"),
        (("compare", "base.npy", "t", "--head", "h", "--hidden", "h"), "give only one"),
        (("compare", "base.npy", "t", "u", "--head", "h", "--head", "h"), "accepted: 1 or 3 times"),
        (("compare", "base.npy", "test.npy", "--json", "no/o.json"), "there is no folder no"),
        (("compare", "base.npy", "test.npy", "--json", "."), "is not a regular file"),
        (("compare", "base.npy", "test.npy", "--json", "base.npy"), "is one of the inputs"),
        (("compare", "base.npy", "test.npy", "--worst", "-1"), "is not a whole number from 0"),
        (("compare", "base.npy", "test.npy", "--chunk-rows", "0"), "is not a whole number from 1"),
        (("bench", "--dtype", "int8"), "invalid choice"),
        (("bench", "--metrics", "nll_p"), "needs targets"),
        (("bench", "--metrics", "kk"), "did you mean 'kl'"),
    ],
)
def test_bad_arguments(run: Run, arguments: tuple[str, ...], reason: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert reason in err.splitlines()[-1]
    assert not leftovers()


def test_folders_that_cannot_be_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before the job, for any folder above; made if it can be."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for option in ("--report", "--checkpoint"):
        status, out, err = run("compare", "base.npy", "test.npy", option, "no/such")
        assert (status, out) == (2, "")
        assert f"the folder {Path.cwd()} is not writable; see" in err
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "the name of a file of logits is empty"),
        ("empty.kld", "empty.kld: is empty (0 bytes)"),
        ("empty.npy", "empty.npy: is empty (0 bytes)"),
        ("empty.json", "empty.json: is not JSON"),
    ],
)
def test_files_of_nothing(run: Run, name: str, reason: str) -> None:
    if name:
        Path(name).touch()
    status, out, err = run("compare", "base.npy", name)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert reason in err


def test_a_full_disk_is_named_with_its_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, out, err = run("compare", "base.npy", "test.npy", "--checkpoint", "kept")
    assert (status, out) == (1, "")
    assert err == "klfast: kept/job.json: cannot be written (No space left on device)\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize("command", ["info", "compare base.npy test.npy"])
def test_an_output_stream_that_is_full_is_named(run: Run, command: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "klfast", *command.split()], stdout=full, stderr=subprocess.PIPE
        )
    message = b"klfast: standard output: cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_signs_that_the_output_stream_has_not(run: Run) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "klfast", "compare", "base.npy", "test.npy"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = (each for each in done.stdout.splitlines() if each.startswith("same top token"))
    assert " % +- " in line
    assert "\\x" not in done.stdout


def test_no_worst_rows(run: Run) -> None:
    status, out, err = run(
        "compare", "base.npy", "test.npy", "--worst", "0", "--markdown", "o.md", "--report", "page"
    )
    assert (status, err) == (0, "")
    assert "worst" not in out.lower()
    assert "<h2>Worst" not in Path("page/index.html").read_text()
    assert "worst" not in Path("o.md").read_text().lower()
    with pytest.raises(ValueError, match="worst is -1; accepted: 0 or a positive whole number"):
        evaluate(BASE, TEST).summary(-1)


@pytest.mark.parametrize(("option", "status"), [((), 1), (("--fail-above", "kl.mean=1"), 3)])
def test_rows_of_nothing_but_nan_do_not_pass(
    run: Run, option: tuple[str, ...], status: int
) -> None:
    """What there is to see is shown, but nothing was found out."""
    np.save("broken.npy", TEST * np.nan)
    found, out, err = run("compare", "base.npy", "test.npy", "broken.npy", "--json", "o.json",
                          *option)  # fmt: skip
    assert found == status
    assert "30 rows left out of all statistics" in out
    message = "klfast: broken.npy: every row has a measure that is NaN; there are no statistics"
    assert message in err.splitlines()
    assert json.loads(Path("o.json").read_text())["candidates"][1]["nan_rows"] == list(range(30))


@pytest.mark.parametrize("other", [BASE[:, :60], TARGETS])
def test_a_folder_of_what_does_not_belong_together(run: Run, other: Any) -> None:
    Path("mixed").mkdir()
    np.save("mixed/a.npy", BASE)
    np.save("mixed/b.npy", other)
    status, _, err = run("compare", "mixed", "test.npy")
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith("klfast: mixed/b.npy: has ")
    assert "all files of mixed are read as shards" in err
    assert "name some of them with a quoted pattern, such as 'base-*.npy'" in err


def test_one_row_has_no_errors(run: Run) -> None:
    np.save("one.npy", BASE[:1])
    np.save("other.npy", TEST[:1])
    np.save("t.npy", [3])
    status, out, err = run("compare", "one.npy", "other.npy", "--targets", "t.npy")
    assert (status, err) == (0, "")
    assert "interval" not in out
    assert " ± " not in out
    line = next(each for each in out.splitlines() if each.startswith("kl  "))
    assert "nan" not in line


def test_sequences_of_hidden_states(run: Run) -> None:
    """Those that the shape of the file tells, as of logits."""
    for name in ("p", "q"):
        np.save(f"{name}.npy", RANDOM.standard_normal((4, 6, 16)).astype(np.float32))
    np.save("head.npy", RANDOM.standard_normal((80, 16)).astype(np.float32))
    status, out, err = run("compare", "p.npy", "q.npy", "--head", "head.npy")
    assert (status, err) == (0, "")
    assert "rows  24 of 4 sequences" in out
    np.save("head.npy", np.ones(16, np.float32))
    status, out, err = run("compare", "p.npy", "q.npy", "--head", "head.npy")
    assert (status, out) == (1, "")
    assert "weight has shape (16,), but hidden has (4, 6, 16)" in err


# The progress bar


def test_bar_on_a_terminal_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = run("compare", "base.npy", "test.npy", "--chunk-rows", "1")
    assert status == 0
    assert "rows/s, " in err
    assert "GB/s" in err
    assert "left" in err
    assert "measure" in out


def test_missing_rich_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich", None)
    status, _, err = run("compare", "base.npy", "test.npy")
    assert (status, err.count("\n")) == (0, 2)
    assert "memory" in err
    assert 'pip install "klfast[eval]"' in err


# info and bench


def test_info(run: Run) -> None:
    status, out, err = run("info")
    assert (status, err) == (0, "")
    for text in (
        "klfast",
        klfast.__version__,
        "numba",
        "processor",
        "cores",
        "reference",
        "usable",
    ):
        assert text in out
    content = json.loads(run("info", "--json", "-")[1])
    assert content["backends"]["reference"] == "usable"
    assert content == json.loads(json.dumps(info()))


def test_bench(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("no compiler")

    peers = (
        *(peer for peer in _peers.PEERS if peer.package == "numpy"),
        _peers.Peer("absent", "no_such_package", np.asarray, lambda name: None),
        _peers.Peer("broken", "numpy", np.asarray, broken),
    )
    monkeypatch.setattr("klfast._bench.PEERS", peers)
    status, out, err = run(
        "bench", "--rows", "3", "--vocab", "500", "--rounds", "1", "--metrics", "kl,topk_overlap:5",
        "--json", "o.json", "--dtype", "bfloat16",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "broken failed at kl: RuntimeError: no compiler" in out
    timings = json.loads(Path("o.json").read_text())["timings"]
    who = [(each["metric"], each["contender"]) for each in timings]
    assert who[:4] == [("kl", name) for name in ("plain read", "klfast", "numpy", "broken")]
    assert ("topk_overlap:5", "numpy") not in who
    assert timings[1]["error"] < 2e-6
    assert timings[2]["error"] < 1e-2


# As a process


def test_as_a_module(run: Run) -> None:
    command = [sys.executable, "-m", "klfast"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"klfast {klfast.__version__}\n"
    done = subprocess.run(
        [*command, "compare", "--help"], capture_output=True, text=True, check=True
    )
    assert "Exit status: 0 done, 1 the job failed" in done.stdout


def test_reader_that_goes_away(run: Run) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as closed:
        done = subprocess.run(
            [sys.executable, "-m", "klfast", "info"], stdout=closed, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "base.npy"], "klfast compare: the following arguments are required: TEST; "),
        (
            ["compare", "a.npy", "b.npy", "--resume"],
            "klfast compare: --resume needs --checkpoint; ",
        ),
        (["convert"], "klfast convert: the following arguments are required: IN, OUT; "),
        ([], "klfast: the following arguments are required: COMMAND; "),
    ],
)
def test_bad_arguments_are_said_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{said}see {said.partition(':')[0]} --help"


@pytest.mark.parametrize(("command", "width"), [("compare", "40"), ("convert", "200")])
def test_help_shows_commands_that_can_be_parsed(
    command: str, width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out.partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(shown) >= 2
    for line in shown:
        words = shlex.split(line)
        assert words[:2] == ["klfast", command]
        parser_of_commands().parse_args(words[1:])


def test_errors_of_files_name_the_options_that_mend_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, several, targets = (str(tmp_path / name) for name in ("b.npy", "s.npz", "t.npy"))
    np.save(logits, np.zeros((2, 5), np.float32))
    np.savez(several, a=np.zeros((2, 5)), b=np.zeros((2, 5)))
    np.save(targets, np.array([1, -100]))
    for arguments, option in (
        ([logits, several], "--key"),
        ([logits, logits, "--targets", targets], "--ignore-index -100"),
    ):
        assert main(["compare", *arguments]) == 1
        assert option in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", logits, logits, "--ignore-index", "-100"])
    assert "--targets" in capsys.readouterr().err
    assert main(["convert", logits, str(tmp_path / "out.kld")]) == 1
    assert "--tokens" in capsys.readouterr().err
