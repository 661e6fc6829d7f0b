"""`plan`: tables, what is quantised already, cards by name; and Ctrl-C while any command starts."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from qwen35rs import _core
from qwen35rs.demo import make_checkpoint
from test_cli import DATA, SCRIPT, as_json, invoke, ok


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("plan") / "demo", vocab="bytes").path)


def test_plan(demo):
    text = ok("plan", "122b-a10b")
    for part in ["122.1 B", "9.0 B", "24.0 KiB per token", "227.5 GiB", "H100 80GB", "tok/s", "more than 8"]:
        assert part in text
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines()[:-1])) <= 120
    for name in ("Qwen/Qwen3.5-122B-A10B", "122B"):
        assert ok("plan", name).splitlines()[1:] == text.splitlines()[1:]
    found = as_json(
        "plan", "35b-a3b", "--gpu", "4090", "--gpu", "h100", "--cards", 1, "--cards", 3, "--scheme", "int4"
    )
    rows = [(r["gpu"], r["num_cards"], r["scheme"]) for r in found["rows"]]
    assert rows == [(g, c, "int4") for g in ("RTX 4090", "H100 80GB") for c in (1, 3)]
    options = as_json("plan", "35b", "--context", 32768, "--fp8-kv", "--vision", "--mtp")["options"]
    assert (
        options["context"] == 32768 and options["fp8_kv"] and options["with_vision"] and options["with_mtp"]
    )
    schemes = {r["scheme"] for r in as_json("plan", "9b", "--gpu", "l40s")["rows"]}
    assert schemes == {"bf16", "fp8", "fp8-head", "int4", "int4-experts", "nvfp4", "mixed"}
    assert "does not fit" in ok("plan", "397b", "--gpu", "4090", "--cards", 1, "--scheme", "bf16")
    for path in (demo, f"{demo}/config.json"):
        assert as_json("plan", path)["config"]["hidden"] == 128
    # A context shorter than the default.
    assert as_json("plan", DATA / "dense_r3")["options"]["context"] == 2048


def test_plan_of_what_is_quantised_already(demo, tmp_path):
    def sizes(path, *more):
        return {row["scheme"]: row["resident"] for row in as_json("plan", path, *more)["weights"]}

    plain = sizes(demo)
    assert list(plain) == ["bf16", "fp8", "int4"]
    for scheme in ("fp8", "int4", "mixed"):
        out = tmp_path / scheme
        _core.quantize_checkpoint(demo, out, scheme=scheme, group_size=32, progress=None)
        stored = sizes(out)
        assert list(stored) == list(sizes(out, "--gpu", "h100")) == ["stored"]
        # What a card holds, small things aside: matrices as small as some of these are bf16 there.
        held = as_json("plan", out, "--gpu", "h100", "--memory")["memory"]["h100"]["memory"]["weights"]
        assert stored["stored"] < held < 1.02 * stored["stored"]
        assert stored["stored"] < plain["bf16"] and sizes(out, "--scheme", "bf16") == {"bf16": plain["bf16"]}
        row = as_json("plan", out, "--gpu", "h100", "--cards", 1)["rows"][0]
        assert row["weights_gib_per_card"] == pytest.approx(stored["stored"] / 2**30)
        # Its config.json alone says no sizes.
        alone = tmp_path / f"{scheme}.json"
        alone.write_bytes((out / "config.json").read_bytes())
        done = invoke("plan", alone, "--json")
        assert [row["scheme"] for row in json.loads(done.stdout)["weights"]] == [scheme]
        assert "its weights cannot be counted" in done.stderr and f"this counts {scheme}" in done.stderr
    done = invoke("plan", "9b", "--scheme", "stored")
    assert done.exit_code == 1 and "9b" in done.stderr


def test_plan_says_which_card_it_took():
    def notes(*names):
        args = [part for name in names for part in ("--gpu", name)]
        return invoke("plan", "9b", *args, "--cards", 1, "--scheme", "bf16").stderr

    assert notes("a100") == "note: --gpu a100 is taken as A100 80GB; there is A100 40GB too\n"
    assert "h100 is taken as H100 80GB; there is H100 PCIe and H100 NVL too" in notes("h100")
    assert notes("a100-40", "A100 80GB", "4090", "l4", "h200") == ""


@pytest.mark.parametrize("name", ["9b", "config.json"])
def test_only_a_checkpoint_has_stored_weights(name, demo, monkeypatch):
    monkeypatch.chdir(demo)
    done = invoke("plan", name, "--scheme", "stored")
    assert done.exit_code == 1
    assert f"scheme: found stored, of {name}; allowed: that of a checkpoint with its weights" in done.stderr


def test_ctrl_c_while_it_starts():
    """In the middle of an import: an end, one line at most, and no traceback."""
    ended = set()
    for delay in (0, 0.01, 0.03, 0.06, 0.1, 0.2):
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen([*SCRIPT, "plan", "122b"], **pipes) as child:
            maps, until = Path(f"/proc/{child.pid}/maps"), time.monotonic() + 20
            while "_core.abi3" not in maps.read_text() and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(delay)
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=20)
        # Killed by it where it was at its end already, with nothing of python's left to handle it.
        assert child.returncode in (0, 130, -signal.SIGINT), delay
        assert errors in (b"", b"interrupted\n"), (delay, errors)
        ended.add((child.returncode, errors))
    assert (130, b"interrupted\n") in ended
