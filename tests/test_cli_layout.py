"""Layouts: which one `plan` chooses, what it would hold, and the commands that load a model on several ranks."""

import json

import gguf_file
import pytest
import test_gguf
from qwen35rs import RequestError, _core, demo
from qwen35rs.demo import make_checkpoint
from test_cli import as_json, invoke, ok


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("layout") / "demo", vocab="bytes").path)


def choice(*args):
    (found,) = as_json("plan", *args)["choices"]
    return found


def taken(*args):
    chosen = choice(*args)["chosen"]
    return chosen["scheme"], chosen["tensor_parallel_size"], chosen["replicas"], chosen["idle_cards"]


def test_a_layout_is_chosen():
    assert taken("122b", "--gpu", "h200", "--cards", 2, "--scheme", "bf16") == ("bf16", 2, 1, 0)
    assert choice("122b", "--gpu", "h200", "--cards", 1, "--scheme", "bf16")["chosen"] is None
    assert taken("122b", "--gpu", "h100", "--cards", 1, "--scheme", "int4") == ("int4", 1, 1, 0)
    assert taken("122b", "--gpu", "h100", "--cards", 2)[0] == "fp8-head"
    text = ok("plan", "122b", "--gpu", "h100", "--cards", 2)
    assert 'Take tensor_parallel_size=2, quantization="fp8", max_num_seqs=32: one replica.' in text
    assert "bf16 fit no sequence of 8192 tokens; fp8-head fits, 58." in text
    assert "Between cards two sums a layer are assumed to take 6 us over NVLink each." in text
    assert "Nothing fits" in ok("plan", "397b", "--gpu", "4090", "--cards", 1)
    # One request wants cards that share the model, many want replicas, where a card has room for one.
    few, many = (
        taken("122b", "--gpu", "h100", "--cards", 3, "--max-num-seqs", n, "--scheme", "int4") for n in (1, 32)
    )
    assert few == ("int4", 2, 1, 1) and many == ("int4", 1, 3, 0)
    assert choice("9b", "--gpu", "h100", "--cards", 8)["num_seqs"] == 32
    # Where no card or no number was said there is nothing to choose from.
    assert (
        as_json("plan", "9b", "--gpu", "h100")["choices"]
        == as_json("plan", "9b", "--cards", 2)["choices"]
        == []
    )


def take(*args):
    """The arguments that are printed, as `LLM` would take them."""
    (line,) = [line for line in ok("plan", *args).splitlines() if line.startswith("Take ")]
    return eval(f"dict({line.removeprefix('Take ').rpartition(': ')[0]})")


PRINTED = [
    ["27b", "--gpu", "5090", "--cards", 1],
    ["27b", "--gpu", "5090", "--cards", 1, "--fp8-kv", "--f16-state", "--mtp", "--context", 4096],
    ["122b", "--gpu", "h100", "--cards", 1, "--context", 65536, "--max-num-seqs", 256],
    ["35b", "--gpu", "4090", "--cards", 2, "--max-num-seqs", 1],
    ["9b", "--gpu", "dgx spark", "--cards", 2, "--mtp"],
]


@pytest.mark.parametrize("args", PRINTED)
def test_what_is_printed_can_be_loaded(args):
    found = take(*args)
    caches = {"fp8_kv": found.pop("kv_cache_dtype", "") == "fp8"}
    caches["f16_state"] = found.pop("state_dtype", "") == "float16"
    usual = {"quantization": None, "mtp": False, "max_model_len": None}
    usual |= {"max_num_batched_tokens": 512, "gpu_memory_utilization": 0.9}
    held = json.loads(_core.plan_memory(args[0], gpu=args[2], **{**usual, **found, **caches}))
    assert "error" not in held, (found, held["error"])
    assert caches["fp8_kv"] is ("--fp8-kv" in args) and caches["f16_state"] is ("--f16-state" in args)
    assert found.get("mtp") is (True if "--mtp" in args else None)
    context = args[args.index("--context") + 1] if "--context" in args else None
    assert found.get("max_model_len") == context
    assert 64 * held["num_pages"] >= found["max_num_seqs"] * (context or 8192)


def test_what_fewer_run_is_not_said_of_more():
    text = ok("plan", "27b", "--gpu", "5090", "--cards", 1, "--max-num-seqs", 256)
    running = take("27b", "--gpu", "5090", "--cards", 1, "--max-num-seqs", 256)["max_num_seqs"]
    assert 1 < running < 10 and f"{running} of 256 requests fit at once; int4 would run " in text
    assert f"{running} requests at once: at most" in text and "256 requests at once" not in text
    assert "1 requests" not in ok("plan", "27b", "--gpu", "5090", "--cards", 1, "--max-num-seqs", 1)
    # What fits for some tokens and not for a sequence has no speed.
    text = ok("plan", "27b", "--gpu", "l4", "--cards", 1, "--scheme", "int4", "--context", 131072)
    (row,) = [line for line in text.splitlines() if "does not fit" in line]
    assert "tok/s" not in row
    assert "GiB of weights on the card of 22.5 GiB, which leaves " in text
    assert "for sequences; one of 131072 tokens needs 8.1" in text


def test_what_must_be_published_is_said():
    for scheme, needs in (("fp8", "fp8, as the official -FP8 ones"), ("nvfp4", "nvfp4"), ("int4", None)):
        text = ok("plan", "35b", "--gpu", "h100", "--cards", 1, "--scheme", scheme)
        assert ("needs a checkpoint published in" in text) is (needs is not None)
        assert needs is None or f"This needs a checkpoint published in {needs}: another" in text


def test_sums_take_what_the_link_takes():
    def sums(*args):
        return ok("plan", "9b", "--scheme", "bf16", *args)

    assert "take 20 us over PCIe each" in sums("--gpu", "4090", "--cards", 2)
    assert "take 6 us over NVLink bridges, 20 us over PCIe each" in sums(
        "--gpu", "h100 nvl", "--cards", 2, "--cards", 4
    )
    assert "take 60 us over a network each" in sums("--gpu", "dgx spark", "--cards", 2)
    assert "take 11.5 us over PCIe each" in sums("--gpu", "l40s", "--cards", 2, "--all-reduce-us", 11.5)
    assert "Between cards" not in sums("--gpu", "4090", "--cards", 1)
    fast, slow = (
        as_json("plan", "9b", "--gpu", "4090", "--cards", 2, "--scheme", "bf16", "--all-reduce-us", us)
        for us in (0, 100)
    )
    fast, slow = (1 / found["rows"][0]["decode_limit_tokens_per_s"] for found in (fast, slow))
    assert slow - fast == pytest.approx(64 * 100e-6)


def test_more_cards_that_cannot_share_are_not_advised(tmp_path):
    # Four key heads: four cards share it, eight cannot.
    (tmp_path / "config.json").write_text(json.dumps(demo.config(400)))
    rows = as_json("plan", tmp_path / "config.json", "--gpu", "1GiB", "--scheme", "bf16")["rows"]
    able = [row["num_cards"] for row in rows if not row["refused"]]
    assert able == [1, 2, 4] and not any(row["max_seqs"] for row in rows)
    text = ok("plan", tmp_path / "config.json", "--gpu", "1GiB", "--scheme", "bf16")
    assert "more than" not in text and "does not fit" in text


def test_sizes_that_do_not_divide_are_explained():
    text = ok("plan", "35b", "--gpu", "h100", "--cards", 3, "--scheme", "bf16")
    assert (
        "tensor_parallel_size cannot be 3; allowed: 1, 2, 4, 8, 16, which divide 16 key and 32 value" in text
    )
    assert "cannot share it" in text and "(1 idle)" in text
    (refused,) = choice("35b", "--gpu", "h100", "--cards", 3)["refused"]
    assert refused["tensor_parallel_size"] == 3 and refused["why"].startswith(
        "tensor_parallel_size: found 3;"
    )


def test_a_card_may_be_an_amount_of_memory():
    found = as_json("plan", "35b", "--gpu", "48GiB", "--cards", 4, "--scheme", "bf16")
    assert {row["gpu"] for row in found["rows"]} == {"48.0 GiB"}
    assert found["choices"][0]["chosen"]["tensor_parallel_size"] == 2
    assert found["rows"][0]["decode_limit_tokens_per_s"] is None
    assert "bandwidth is not known" in ok("plan", "35b", "--gpu", "48GiB", "--cards", 4, "--scheme", "bf16")


def test_the_layout_of_what_is_quantised_already(model, tmp_path):
    _core.quantize_checkpoint(model, tmp_path / "fp8", scheme="fp8", group_size=128, progress=None)
    found = choice(tmp_path / "fp8", "--gpu", "4090", "--cards", 2)
    assert found["chosen"]["scheme"] == "stored"
    one, two = (layout["weights_gib_per_card"] for layout in found["layouts"])
    assert 0.5 * one < two < one
    # Its parts are cut out of the files, and counted as they are loaded.
    alone, both = (held(tmp_path / "fp8", "--gpu", "4090", "--tensor-parallel-size", n) for n in (1, 2))
    (first, second), (whole,) = both["ranks"], alone["ranks"]
    assert first == second and whole["weights"] / 2 < first["weights"] < whole["weights"]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_the_layout_of_gguf(kind, tmp_path):
    # Rows of 256 are halved: blocks of 32 are cut between, those of 256 through, which makes bf16 of them.
    values, tensors, _ = test_gguf.wide(kind)
    path = gguf_file.write(tmp_path / "wide.gguf", values, tensors)
    layouts = choice(path, "--gpu", "4090", "--cards", 2)["layouts"]
    assert [layout["scheme"] for layout in layouts] == ["stored"] * 2
    one, two = (layout["weights_gib_per_card"] * 2**30 for layout in layouts)
    alone, shared = (
        held(path, "--gpu", "4090", "--tensor-parallel-size", n)["memory"]["weights"] for n in (1, 2)
    )
    # Beside the matrices a card holds small things that are not counted.
    assert one < alone < 1.01 * one and two < shared < 1.01 * two


def held(*args):
    (found,) = as_json("plan", *args, "--dry-run")["memory"].values()
    return found


def test_a_dry_run_says_what_each_rank_holds():
    one = held("35b", "--gpu", "h200")
    two = held("35b", "--gpu", "h200", "--tensor-parallel-size", 2, "--max-num-seqs", 32)
    assert one["ranks"] == [one["memory"]] and two["ranks"] == [two["memory"]] * 2
    assert "sums over ranks" not in one["memory"] and two["memory"]["sums over ranks"] > 2**20
    # Half of all but the embedding, routers and norms; heads, slots and pages of its own.
    both, embedding = 2 * two["memory"]["weights"] - one["memory"]["weights"], 2 * 248320 * 2048
    assert embedding < both < 1.06 * embedding
    assert 2 * two["memory"]["recurrent states"] == one["memory"]["recurrent states"]
    assert 2 * two["page_bytes"] == one["page_bytes"]
    pages = two["memory"]["pages of keys"] + two["memory"]["pages of values"]
    assert pages == two["num_pages"] * two["page_bytes"]
    assert sum(two["memory"].values()) < 140.4 * 2**30
    small = held("35b", "--gpu", "h200", "--tensor-parallel-size", 2, "--max-num-seqs", 8)
    assert 4 * small["memory"]["recurrent states"] == two["memory"]["recurrent states"]
    text = ok("plan", "35b", "--gpu", "h200", "--memory", "--tensor-parallel-size", 2)
    for part in ("Each of 2 x H200", "ranks 0 to 1, GiB", "weights", "sums over ranks", "all of it"):
        assert part in text
    arguments = ["plan", "122b", "--gpu", "h100", "--dry-run", "--tensor-parallel-size", "2"]
    result = invoke(*arguments)
    assert "does not fit: weights (114.5 GiB on each device; the device has 78.9 GiB free)" in result.stdout
    assert result.exit_code == 1, result.output
    # What each would have to hold.
    for part in ("Each of 2 x H100 80GB, if it were large enough", "ranks 0 to 1, GiB", "114.5", "all of it"):
        assert part in result.stdout
    assert "Pages are those of one sequence of 64 tokens." in result.stdout
    result = invoke(*arguments, "--json")
    needed = json.loads(result.stdout)["memory"]["h100"]
    assert len(needed["ranks"]) == 2 and needed["ranks"][0]["weights"] > 114 * 2**30 and needed["error"]


REFUSED = [
    (["--tensor-parallel-size", "2"], "tensor_parallel_size: found it without --memory; allowed: with it"),
    (["--expert-parallel"], "expert_parallel: found it without --memory; allowed: with it"),
    (
        ["--dry-run", "--tensor-parallel-size", "3"],
        "tensor_parallel_size: found 3; allowed: 1, 2, 4, 8, 16, which",
    ),
    (["--dry-run", "--tensor-parallel-size", "0"], "tensor_parallel_size: found 0; allowed: at least 1"),
    (
        ["--dry-run", "--tensor-parallel-size", "16"],
        "tensor_parallel_size: found 16; allowed: at most 8 in a plan",
    ),
    (
        ["--dry-run", "--expert-parallel"],
        "expert_parallel: found True with one rank; allowed: False, or a tensor_",
    ),
    (
        ["--dry-run", "--cards", "2"],
        "cards: found it with --memory; allowed: without (no vision; cards are --tensor-",
    ),
    (["--all-reduce-us", "-1"], "all_reduce_us: found -1; allowed: 0 or more"),
    (["--dry-run", "--all-reduce-us", "0"], "all_reduce_us: found it with --memory; allowed: without"),
    (["--gpu", "h100", "--cards", "2", "--max-num-seqs", "0"], "max_num_seqs: found 0; allowed: 1 or more"),
    (["--gpu", "3GB RAM"], "gpu: found 3GB RAM; allowed: RTX 3090, "),
    # Also on a card that is too small for the weights.
    (
        ["--gpu", "24GiB", "--memory", "--max-model-len", "10000000"],
        "max_model_len: found 10000000; allowed: 2 to 262144",
    ),
    (["--gpu", "2TiB"], "or 1 GiB to 1024 GiB of memory, as in 48GiB"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_is_refused_is_named(arguments, message):
    result = invoke("plan", "35b", *arguments)
    assert result.exit_code == 1 and message in result.stderr and result.stdout == "", result.output


# ------------------------------------------------------------------------------- commands that load a model


def test_a_command_loads_a_model_on_ranks(model):
    args = ["--model", model, "Hello", "--temperature", 0, "--max-tokens", 8, "--device", "cpu"]
    want = as_json("generate", *args)["outputs"]
    for shared in (["--tensor-parallel-size", 2], ["--tensor-parallel-size", 2, "--expert-parallel"]):
        found = as_json("generate", *args, *shared)["outputs"]
        assert [s["token_ids"] for o in found for s in o["samples"]] == [
            s["token_ids"] for o in want for s in o["samples"]
        ]


@pytest.mark.parametrize(
    "command", [["generate", "x"], ["chat"], ["bench", "tasks", "--n", "1"], ["bench", "engine"]]
)
def test_every_command_that_loads_a_model_takes_ranks(command, model):
    for more, message in (
        (["--tensor-parallel-size", 3], "tensor_parallel_size: found 3; allowed: 1, 2, 4, which divide"),
        (["--tensor-parallel-size", 0], "tensor_parallel_size: found 0; allowed: 1 to 1024"),
        (
            ["--expert-parallel"],
            "expert_parallel: found True with one rank; allowed: False, or a tensor_parallel",
        ),
    ):
        result = invoke(*command, "--model", model, "--device", "cpu", *more, input="x\n")
        assert result.exit_code == 1 and message in result.stderr, result.output


def test_the_floor_of_a_benchmark_is_that_of_one_rank(tmp_path):
    sizes = {"num_hidden_layers": 4, "vocab_size": 512, "mtp_num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(demo.config(400, **sizes)))
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]

    def bench(*more):
        args = ["-m", tmp_path / "config.json", "--load-format", "dummy", "--device", "cpu"]
        args += ["--context", 64, "--steps", 2, "--prefill", 64]
        return as_json("bench", "engine", *args, *more)

    one, two = bench(), bench("--tensor-parallel-size", 2)
    assert (one["tensor_parallel_size"], two["tensor_parallel_size"]) == (1, 2)
    assert two["expert_parallel"] is False
    hidden, layers = text["hidden_size"], 4
    attention = sum(kind == "full_attention" for kind in text.get("layer_types") or ["full_attention"])
    every = (text["num_experts"] + 1) * hidden * layers + (2 * layers + 1) * hidden
    every += 2 * text["head_dim"] * attention + text["linear_value_head_dim"] * (layers - attention)
    whole, part = one["decode"][0]["bytes"], two["decode"][0]["bytes"]
    assert 2 * part - whole == pytest.approx(2 * every, abs=1)
    assert 2 * two["prefill"][0]["flops"] - one["prefill"][0]["flops"] == 2 * 64 * every
    with pytest.raises(RequestError, match="max_num_seqs: found 0; allowed: 1 or more"):
        _core.plan_model(
            "9b",
            gpus=["h100"],
            cards=[1],
            schemes=[],
            context=1,
            fp8_kv=False,
            f16_state=False,
            with_vision=False,
            with_mtp=False,
            num_seqs=0,
        )
