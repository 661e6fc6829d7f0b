"""`benches/figures.py`, which makes the engine's figures: a small model's, on the CPU."""

import sys
from pathlib import Path

from golden.cases import DATA

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benches"))
import figures


def test_a_figure_says_where_it_comes_from():
    options = ["-m", str(DATA / "dense_bf16"), "--quantization", "int4", "--batch", "1", "--batch", "2"]
    options += ["--steps", "2", "--context", "16", "--prefill", "32"]
    found = figures.measure(options, "cpu")
    assert found["command"].startswith("qwen35rs bench engine --load-format dummy --device cpu --json -m ")
    assert found["quantization"] == "int4" and found["activation_dtype"] == "auto" and found["cpu"]
    assert [row["batch"] for row in found["decode"]] == [1, 2]
    assert [row["num_tokens"] for row in found["prefill"]] == [32]
    assert 0 < found["import_to_loaded_seconds"] < found["import_to_first_token_seconds"]


def test_one_that_fails_leaves_no_file(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(figures.FIGURES, "engine_35b", "-m 35b-a3b --quantization int5")
    monkeypatch.setattr(
        sys, "argv", ["figures.py", str(tmp_path / "out"), "--only", "engine_35b", "--device", "cpu"]
    )
    try:
        figures.main()
    except SystemExit as end:
        assert end.code == "error: failed: engine_35b"
    else:
        raise AssertionError("it went through")
    assert list((tmp_path / "out").iterdir()) == [] and "int5" in capfd.readouterr().err


def test_the_options_of_all_figures_are_options():
    from qwen35rs.cli.bench import engine

    names = {name.replace("_", "-") for name in engine.__annotations__}
    for options in figures.FIGURES.values():
        given = {word.removeprefix("--") for word in options.split() if word.startswith("--")}
        assert given <= names, given - names
