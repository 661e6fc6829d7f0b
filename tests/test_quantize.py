"""Quantising at load and in a file: the numbers against numpy, the command, what is refused, and what it costs in accuracy."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import quantised as q
import tiny
from golden.cases import Golden
from qwen35rs import LLM, ConfigError, RequestError, _core, hub
from qwen35rs.bench import measure
from qwen35rs.cli import app
from qwen35rs.demo import make_checkpoint
from test_quantised import FORMATS, KEPT, pair
from typer.testing import CliRunner

SCHEMES = ["int4", "fp8", "mixed"]
IDS = [7, 300, 45, 12, 900, 4, 4, 77, 512, 33]


def tensors(folder):
    """Every tensor of a checkpoint of one file, as `(dtype name, shape, bytes)`."""
    return tiny.read_safetensors(folder / "model.safetensors")


GGUF = Path(__file__).resolve().parent / "golden" / "gguf" / "dense-f32.gguf"


def convert(out, scheme, group_size=32, source=hub.EMBEDDED, progress=None):
    text = _core.quantize_checkpoint(source, out, scheme=scheme, group_size=group_size, progress=progress)
    return json.loads(text)


def source_matrix(before, module):
    """The matrix that a module was made from; experts are stacked before."""
    if f"{module}.weight" in before:
        return q.numbers(before[f"{module}.weight"])
    base, expert, kind = module.rsplit(".", 2)
    if kind == "down_proj":
        return q.numbers(before[f"{base}.down_proj"])[int(expert)]
    both = q.numbers(before[f"{base}.gate_up_proj"])[int(expert)]
    return np.split(both, 2)[kind == "up_proj"]


def candidates(w):
    """The bf16 scales that int4 may have, of the groups in the last dimension: [..., 8]."""
    most = np.abs(w).max(-1, keepdims=True)
    steps = (np.float32(1) - np.arange(8, dtype=np.float32) / np.float32(32)) * most / np.float32(7)
    return q.numbers(q.tensor("BF16", steps))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_is_what_the_method_says(scheme, tmp_path):
    out = tmp_path / "out"
    summary = convert(out, scheme)
    before, after = tensors(hub.EMBEDDED), tensors(out)
    packed = [name.removesuffix(".weight_packed") for name in after if name.endswith(".weight_packed")]
    floats = [name.removesuffix(".weight") for name in after if after[name][0] == "F8_E4M3"]
    assert summary["num_quantised"] == len(packed) + len(floats)
    assert (len(packed) > 0, len(floats) > 0) == (scheme != "fp8", scheme != "int4")
    for module in packed:
        w = source_matrix(before, module)
        parts = {
            part: after[f"{module}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")
        }
        scales = q.numbers(parts["weight_scale"])
        groups = w.reshape(len(w), -1, 32)
        codes = np.clip(np.rint(groups / scales[..., None]), -8, 7)
        assert (q.decode_packed(parts, 32).reshape(groups.shape) == codes * scales[..., None]).all()
        # Of the candidates the one of the least error, up to the rounding of its sum.
        allowed = candidates(groups)
        rounded = np.clip(np.rint(groups[..., None, :] / allowed[..., None]), -8, 7) * allowed[..., None]
        errors = ((groups[..., None, :].astype(np.float64) - rounded) ** 2).sum(-1)
        own = ((groups.astype(np.float64) - codes * scales[..., None]) ** 2).sum(-1)
        assert (scales[..., None] == allowed).any(-1).all()
        assert (own <= errors.min(-1) * (1 + 1e-5)).all()
    for module in floats:
        w = source_matrix(before, module)
        scale_name = "weight_scale_inv" if scheme == "fp8" else "weight_scale"
        scales = q.numbers(after[f"{module}.{scale_name}"])
        spread = q.spread(scales, (128, 128), w.shape)
        rows, cols = (np.arange(size) // 128 for size in w.shape)
        for (i, j), scale in np.ndenumerate(scales):
            assert scale == np.abs(w[np.ix_(rows == i, cols == j)]).max() / np.float32(448)
        codes = np.frombuffer(after[f"{module}.weight"][2], np.uint8).reshape(w.shape)
        steps = w / spread
        nearest = q.E4M3[q.to_e4m3(steps)]  # of two that are as near, the other may be right
        assert (np.abs(q.E4M3[codes] - steps) <= np.abs(nearest - steps)).all()
    plain = [name for name in after if after[name][0] == "BF16" and not name.endswith("weight_scale")]
    assert all(after[name] == before[name] for name in plain) and len(plain) > 50


def test_a_file_computes_what_loading_computes(tmp_path):
    """But for the head, and in `mixed` the shared experts: a model without the former, and a dense one."""
    for name, scheme in [("dense_bf16", "fp8"), ("dense_bf16", "mixed"), ("moe_bf16", "fp8")]:
        path = Golden(name).path
        out = tmp_path / f"{name}_{scheme}"
        convert(out, scheme, source=path)
        ids = [i % 50 for i in IDS]
        tied = json.loads((path / "config.json").read_text())["tie_word_embeddings"]
        loaded = LLM(path, device="cpu", quantization=scheme).logits(ids)
        if tied:
            assert (LLM(out, device="cpu").logits(ids) == loaded).all()
        # Loading what is quantised does not quantise it again, and does what is left.
        assert (LLM(out, device="cpu", quantization=scheme).logits(ids) == loaded).all()
        assert (LLM(path, device="cpu").logits(ids) != loaded).any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_weights_and_the_module_are_quantised(scheme):
    llm = LLM(hub.EMBEDDED, load_format="dummy", device="cpu", quantization=scheme, mtp=True)
    plain = LLM(hub.EMBEDDED, load_format="dummy", device="cpu", mtp=True)
    for name in ("logits", "mtp_logits"):
        got, want = getattr(llm, name)(IDS), getattr(plain, name)(IDS)
        error = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
        assert 0.005 < error < 0.6, (name, error)


# Of 64 questions each; the floor is the accuracy of the published weights less what may be lost.
ACCURACY = {"int4": 0.03, "fp8": 0.01, "mixed": 0.03}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_embedded_model_still_answers(scheme):
    """`benches/results/cpu/quantised.txt` has all tasks; these are the two quickest with numbers and tools."""
    names = ["arithmetic", "talk"]
    plain = {r.task: r for r in measure(LLM(device="cpu"), names, num_items=64)}
    for result in measure(LLM(device="cpu", quantization=scheme), names, num_items=64):
        before = plain[result.task]
        assert result.accuracy >= before.accuracy - ACCURACY[scheme] - 1e-9, result
        assert result.perplexity <= before.perplexity * 1.01, result


def test_what_is_refused(tmp_path):
    for call in (
        lambda: LLM(device="cpu", quantization="int8"),
        lambda: convert(tmp_path / "out", "int8"),
    ):
        with pytest.raises(RequestError, match="quantization: found int8; allowed: int4, fp8, mixed"):
            call()
    with pytest.raises(RequestError, match="group_size: found 48; allowed: 32, 64, 128"):
        convert(tmp_path / "out", "int4", 48)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RequestError, match="OUT: found .*, which is no directory; allowed: a directory that is"
    ):
        convert(tmp_path / "file", "fp8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(
        RequestError, match="OUT: found .*link, a symbolic link; allowed: a directory that is"
    ):
        convert(tmp_path / "link", "fp8")
    with pytest.raises(
        RequestError, match="IN: found .*dense-f32.gguf, a GGUF file; allowed: the directory of"
    ):
        convert(tmp_path / "out", "fp8", source=GGUF)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link"]


def test_what_the_command_refuses(tmp_path):
    def run(*args):
        done = CliRunner().invoke(
            app, ["quantize", str(hub.EMBEDDED), str(tmp_path / "out"), *map(str, args)]
        )
        assert done.exit_code == 1 and not list(tmp_path.iterdir())
        return " ".join(done.output.split())

    for size in (-1, 0, 48, 2**70):
        text = run("--scheme", "int4", "--group-size", size)
        assert text == f"error: --group-size: found {size}; allowed: 32, 64, 128"
    text = run("--scheme", "fp8", "--group-size", 64)
    assert text.startswith("error: --group-size: found 64 with --scheme fp8; allowed: it with int4 and mixed")
    assert run("--scheme", "int4").endswith(
        "found rows of 32; expected rows of whole groups of 128 (--group-size); --group-size 32 does for all"
    )


def test_groups_that_no_size_divides(tmp_path):
    make_checkpoint(tmp_path / "odd", vocab="bytes", hidden=72, layers=4)
    assert LLM(tmp_path / "odd", device="cpu", quantization="mixed").logits([1]).size
    with pytest.raises(
        ConfigError, match='no --group-size does for all; --scheme fp8, or quantization="mixed" at load'
    ):
        convert(tmp_path / "out", "mixed", 64, source=tmp_path / "odd")
    convert(tmp_path / "out", "fp8", source=tmp_path / "odd")


def test_errors_of_writing_name_out(tmp_path):
    out = tmp_path / "missing" / "out"
    (tmp_path / "missing").write_text("a file")
    with pytest.raises(OSError, match=rf"^{out}: OUT could not be made: ") as caught:
        convert(out, "fp8")
    assert "partial" not in str(caught.value)
    code = (
        "import resource, signal, sys; from qwen35rs import _core;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "_core.quantize_checkpoint(*sys.argv[1:], scheme='fp8', group_size=128, progress=None)"
    )
    out = tmp_path / "full"
    command = [sys.executable, "-c", code, hub.EMBEDDED, out]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert (
        f"{out}: OUT could not be written: model.safetensors: File too large" in last
        and "partial" not in last
    )
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1


def test_its_own_output_is_quantised_again(tmp_path):
    """Experts of the embedded model are smaller than a block of fp8."""

    def logits(name):
        return LLM(tmp_path / name, device="cpu").logits(IDS)

    convert(tmp_path / "fp8", "fp8")
    again = convert(tmp_path / "again", "fp8", source=tmp_path / "fp8")
    assert again["num_quantised"] == 0 and again["num_kept"] > 300
    assert np.array_equal(logits("again"), logits("fp8"))
    before = tensors(tmp_path / "fp8")
    for scheme in ("mixed", "int4"):
        other = convert(tmp_path / scheme, scheme, source=tmp_path / "fp8")
        after = tensors(tmp_path / scheme)
        kept = [name for name, (dtype, *_) in after.items() if dtype == "F8_E4M3"]
        assert all(after[name] == before[name] for name in kept) and len(kept) == other["num_kept"]
        assert other["num_quantised"] > 300 and (len(kept) > 10) == (scheme == "mixed")
        assert np.isfinite(logits(scheme)).all()
    with pytest.raises(ConfigError, match="found int4 .*; expected a matrix in more bits than it is to have"):
        convert(tmp_path / "out", "fp8", source=tmp_path / "mixed")
    third = convert(tmp_path / "third", "mixed", source=tmp_path / "mixed")
    assert third["num_quantised"] == 0 and tensors(tmp_path / "third") == tensors(tmp_path / "mixed")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("third", "mixed")]
    assert configs[0] == configs[1]


# ------------------------------------------------------------------- checkpoints that have four bits already

DENSE = (*KEPT, "self_attn", "linear_attn")  # routed and shared experts in four bits, the rest in bf16
ROUTED = (*DENSE, "shared_expert")
FOUR_BITS = {
    "gptq": (8, False),
    "gptq, symmetric": (None, True),
    "awq": (8, False),
    "pack-quantized": (8, True),
    "pack-quantized, asymmetric": (8, False),
}


def stored(found, module):
    """The parts of a module."""
    ends = (
        "qweight",
        "qzeros",
        "scales",
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
    )
    return {end: found[f"{module}.{end}"] for end in ends if f"{module}.{end}" in found}


@pytest.mark.parametrize(
    ("name", "scheme", "kept"),
    [(name, "mixed", DENSE) for name in FOUR_BITS]
    + [("gptq", "int4", DENSE), ("awq", "int4", DENSE), ("gptq", "mixed", KEPT)],
)
def test_four_bits_are_written_as_they_are(name, scheme, kept, tmp_path):
    one, _, count = pair(tmp_path, hub.EMBEDDED, name, kept=kept)
    out = tmp_path / "out"
    summary = convert(out, scheme, 128, source=one)
    assert (summary["num_kept"], summary["num_quantised"]) == (count, 30 * (kept != KEPT))
    before, after = tensors(one), tensors(out)
    group, symmetric = FOUR_BITS[name]
    modules = [key.rpartition(".")[0] for key in before if key.endswith(("qweight", "weight_packed"))]
    assert len(modules) == count
    for module in modules:
        old, new = stored(before, module), stored(after, module)
        assert ("weight_zero_point" in new) == (not symmetric)
        assert np.array_equal(q.decode_packed(new, group), FORMATS[name][2](old))
        scales = q.numbers(old.get("weight_scale", old.get("scales")))
        assert np.array_equal(q.numbers(new["weight_scale"]), scales if "weight_scale" in old else scales.T)
        assert new["weight_scale"][0] == old.get("weight_scale", old.get("scales"))[0]
    # The head is quantised at load only.
    got, want = (LLM(path, device="cpu", quantization=scheme) for path in (out, one))
    assert np.array_equal(got.logits(IDS), want.logits(IDS))
    assert not np.array_equal(got.logits(IDS), LLM(one, device="cpu").logits(IDS))


def test_the_configuration_tells_forms_apart(tmp_path):
    """By patterns; by name where modules of one pattern differ."""
    experts = r"re:.*mlp\.experts\..*(gate|up|down)_proj$"

    def groups(name, scheme, kept):
        one, _, _ = pair(tmp_path / name / scheme, hub.EMBEDDED, name, kept=kept)
        out = tmp_path / name / f"{scheme} out"
        convert(out, scheme, source=one)
        said = json.loads((out / "config.json").read_text())["quantization_config"]
        found = list(said["config_groups"].values())
        claims_are_true(found, said["ignore"], tensors(out))
        keys = ("num_bits", "symmetric", "strategy", "group_size")
        return [(tuple(g["weights"].get(key) for key in keys), g["targets"]) for g in found]

    (fp8, rest), (int4, targets) = groups("gptq", "mixed", ROUTED)
    assert fp8[:3] == (8, True, "block") and len(rest) == 3
    assert int4 == (4, False, "group", 8) and targets == [experts]
    ((int4, targets),) = groups("gptq, symmetric", "int4", KEPT)
    assert int4 == (4, True, "channel", None) and targets == ["Linear"]
    (new, usual), (old, named) = groups("awq", "int4", (*ROUTED, "experts.3."))
    assert new == (4, True, "group", 32) and old == (4, False, "group", 8)
    assert experts not in usual + named and len(usual) == 3 + 9 * 3 and len(named) == 9 * 3 * 15
    assert all(".experts.3." in target for target in usual if not target.startswith("re:"))


def claims_are_true(groups, ignored, found):
    """As other programs read it: each module that is quantised is of one group, which says what its tensors are."""
    for name, entry in found.items():
        module, _, part = name.rpartition(".")
        if part != "weight_packed" and entry[0] != "F8_E4M3":
            continue
        own = [
            group["weights"]
            for group in groups
            if any(
                target in ("Linear", module) or target[:3] == "re:" and re.match(target[3:], module)
                for target in group["targets"]
            )
        ]
        assert len(own) == 1 and module not in ignored, module
        (weights,) = own
        assert weights["num_bits"] == (4 if part == "weight_packed" else 8), module
        assert weights["symmetric"] == (f"{module}.weight_zero_point" not in found), module
        if part == "weight_packed":
            num_groups, (_, columns) = found[f"{module}.weight_scale"][1][1], entry[1]
            assert num_groups * (weights["group_size"] or 8 * columns) == 8 * columns, module


def test_other_four_bits_are_refused(tmp_path):
    one, _, _ = pair(tmp_path, hub.EMBEDDED, "nvfp4 of modelopt")
    for scheme in ("int4", "mixed"):
        with pytest.raises(
            ConfigError, match="found nvfp4 .modelopt.; expected .* for int4 and mixed, 4-bit"
        ):
            convert(tmp_path / "out", scheme, 32, source=one)
    ragged, _, _ = pair(tmp_path / "ragged", "dense_bf16", "gptq")
    found = tensors(ragged)
    for module in [key.removesuffix(".qweight") for key in found if key.endswith(".qweight")]:
        parts = q.make_gptq(q.decode_gptq(stored(found, module), 8), 32)
        found |= {f"{module}.{part}": value for part, value in parts.items()}
    tiny.write_safetensors(ragged / "model.safetensors", found)
    config = json.loads((ragged / "config.json").read_text())
    config["quantization_config"]["group_size"] = 32
    (ragged / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"found int4 \(gptq\), groups of 32; expected .* in whole groups"):
        convert(tmp_path / "out", "mixed", 32, source=ragged)


def test_experts_in_four_bits_with_projections_in_eight(tmp_path):
    """`mixed` at load, of a checkpoint with experts in GPTQ and attention in bf16: codes of the former are kept, the
    latter becomes fp8."""
    one, other, _ = pair(tmp_path, hub.EMBEDDED, "gptq", kept=DENSE)
    convert(tmp_path / "fp8", "fp8", source=hub.EMBEDDED)
    floats, decoded = tensors(tmp_path / "fp8"), tensors(other)
    replaced = 0
    for name, entry in floats.items():
        if entry[0] == "F8_E4M3" and "_attn." in name:
            parts = {"weight": entry, "weight_scale_inv": floats[f"{name}_scale_inv"]}
            decoded[name], replaced = q.tensor("F32", q.decode_fp8(parts, (128, 128))), replaced + 1
    assert replaced == 6 * 3 + 2 * 4 + 4
    tiny.write_safetensors(other / "model.safetensors", decoded)
    one, other = tied(one), tied(other)
    got, plain = (LLM(one, device="cpu", quantization=scheme, mtp=True) for scheme in ("mixed", None))
    want = LLM(other, device="cpu", mtp=True)
    for name in ("logits", "mtp_logits"):
        found = getattr(got, name)(IDS)
        assert np.array_equal(found, getattr(want, name)(IDS)), name
        assert not np.array_equal(found, getattr(plain, name)(IDS))


def tied(folder):
    """With its embedding as the head, which stays as it is."""
    left = {name: entry for name, entry in tensors(folder).items() if name != "lm_head.weight"}
    tiny.write_safetensors(folder / "model.safetensors", left)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_ctrl_c_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", "fp8", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path):
    def run(*args):
        return CliRunner().invoke(app, ["quantize", *map(str, args)])

    out = tmp_path / "out"
    done = run(hub.EMBEDDED, out, "--scheme", "mixed", "--group-size", 64, "--json")
    # Experts of the embedded model have 32 inputs.
    assert done.exit_code == 1 and "expected rows of whole groups of 64" in done.stderr
    done = run(hub.EMBEDDED, out, "--scheme", "mixed", "--group-size", 32, "--json")
    found = json.loads(done.stdout)
    assert found["scheme"] == "mixed" and found["bytes_after"] < 0.6 * found["bytes_before"]
    assert found == {**found, **json.loads((out / "quantization_report.json").read_text())["summary"]}
    text = run(hub.EMBEDDED, tmp_path / "fp8", "--scheme", "fp8").stdout
    assert f"{found['num_quantised']} matrices quantised; 15.1 MiB became" in text
    assert run(hub.EMBEDDED, out, "--scheme", "fp8").exit_code == 1
    assert run(hub.EMBEDDED, tmp_path / "new").exit_code == 2
