"""qwen35rs against Transformers as installed here: the goldens made again, fresh geometries, fresh ops."""

import zlib

import numpy as np
import pytest
import torch
import transformers
from golden import geometries, ops_checks
from golden import make_goldens as goldens
from golden.cases import CASES, Golden
from qwen35rs import LLM, RequestError, ops
from qwen35rs.demo import make_checkpoint

TOLERANCE = Golden.TOLERANCE
RNG = np.random.default_rng(20260301)


@pytest.fixture(autouse=True, scope="module")
def quiet_and_small():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------- the committed goldens hold


def test_the_script_makes_the_committed_cases():
    assert sorted(case.name for case in geometries.CASES) == CASES


@pytest.mark.parametrize("case", geometries.CASES, ids=lambda case: case.name)
def test_golden_is_reproduced(case, tmp_path):
    golden = Golden(case.name)
    goldens.write_checkpoint(case, tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (golden.path / file.name).read_bytes(), file.name
    model = goldens.load(golden.path)
    for prompt in golden.prompts:
        logits, _ = goldens.forward(model, prompt.sequence)
        ops_checks.close(logits.numpy()[prompt.rows], prompt.logits, 5e-5)
        assert goldens.greedy(model, prompt.tokens, len(prompt.greedy)) == prompt.greedy


def test_ops_are_reproduced():
    fresh, committed = goldens.make_ops(), np.load(ops_checks.OPS_FILE)
    assert sorted(fresh) == sorted(committed)
    for name, values in fresh.items():
        ops_checks.close(values, committed[name], 2e-5)


# --------------------------------------------------------------------------------- fresh geometries


def pick(*options):
    return options[RNG.integers(len(options))]


def random_case(number):
    """A geometry that no committed case has: every size drawn, some layouts and dtypes too."""
    kind = pick(geometries.MOE, geometries.DENSE)
    num_layers, kv_heads, k_heads = int(RNG.integers(1, 6)), pick(1, 2, 3), pick(1, 2, 3)
    pairs, rotating = int(RNG.integers(1, 7)), pick(1.0, 0.5, 0.25)
    height, width = (int(RNG.integers(0, pairs // 3 + 1)) for _ in range(2))
    ffn = int(RNG.integers(8, 60))
    if kind == geometries.MOE:
        experts = int(RNG.integers(2, 20))
        ffn = (
            experts,
            int(RNG.integers(1, min(experts, 8) + 1)),
            int(RNG.integers(3, 20)),
            int(RNG.integers(3, 20)),
        )
    more = {"tie_word_embeddings": pick(True, False)}
    more |= pick(
        {"full_attention_interval": int(RNG.integers(1, 5))},
        {"layer_types": [pick(geometries.FULL, geometries.LINEAR) for _ in range(num_layers)]},
        {},
    )
    rope = geometries.rope([pairs - height - width, height, width], pick(1e4, 1e6, 1e7), rotating)
    if pick(True, False, False):
        rope |= {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 70}
    delta = (k_heads, k_heads * pick(1, 2, 3, 4), int(RNG.integers(4, 30)), int(RNG.integers(4, 30)))
    text = geometries.dims(
        int(RNG.integers(24, 90)),
        num_layers,
        int(RNG.integers(50, 400)),
        (kv_heads * pick(1, 2, 4, 5), kv_heads),
        int(2 * pairs / rotating),
        delta,
        ffn,
        conv=pick(2, 3, 4, 4, 5),
        rope_parameters=rope,
        **more,
    )
    nested = pick(True, False)
    return geometries.Case(
        f"live_{number}",
        "drawn",
        kind,
        text,
        prompts=[1, int(RNG.integers(2, 60)), int(RNG.integers(61, 140))],
        dtype=pick("float32", "float32", "bfloat16", "float16"),
        nested=nested,
        per_expert=pick(True, False),
        shards=pick(1, 2),
        f32_decay=pick(True, False),
        num_greedy=12,
    )


@pytest.mark.parametrize("case", [random_case(number) for number in range(12)], ids=lambda case: case.name)
def test_fresh_geometry(case, tmp_path):
    from qwen35rs import LLM, SamplingParams

    goldens.write_checkpoint(case, tmp_path)
    model, text, seed = goldens.load(tmp_path), goldens.base_config(case), zlib.crc32(case.name.encode())
    found = [goldens.clear_prompt(model, text, length, case.num_greedy, seed) for length in case.prompts]
    llm = LLM(str(tmp_path))
    for prompt, tokens, logits, *_ in found:
        ours = llm.logits([*prompt.tolist(), *tokens.tolist()[:-1]])
        assert np.abs(ours - logits).max() <= TOLERANCE * np.abs(logits).max(), case
    params = SamplingParams(temperature=0, max_tokens=case.num_greedy, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt.tolist()} for prompt, *_ in found], params)
    assert [list(out.outputs[0].token_ids) for out in outputs] == [
        tokens.tolist() for _, tokens, *_ in found
    ], case


# ------------------------------------------------------------------------------------------ fresh ops


@pytest.mark.parametrize("seed", range(3))
def test_ops(seed):
    from qwen35rs import ops

    for case, (arrays, settings) in ops_checks.load_cases(goldens.make_ops(seed)).items():
        check = ops_checks.CHECKS.get(case.split("/")[0])
        if check:
            check(ops, arrays, settings)


def test_the_demo_checkpoint(tmp_path):
    demo = make_checkpoint(tmp_path / "demo", vocab="bytes").path
    model = transformers.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    llm, text = LLM(demo), "Hello, the wörld and 123 in 🦀"
    ids = llm.tokenizer.encode(text)
    assert tokenizer(text)["input_ids"] == ids
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(llm.logits(ids) - want).max() < 2e-4 * np.abs(want).max()


def test_torch_tensors_cross_without_a_copy():
    x = torch.randn(5, 7)
    array = ops._array("x", x)
    assert array.ctypes.data == x.data_ptr() and array.dtype == np.float32
    y = torch.from_dlpack(ops.rms_norm(x, torch.zeros(7)))
    assert torch.allclose(y, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), atol=1e-6)
    with pytest.raises(RequestError, match="x: found Tensor"):
        ops.rms_norm(x.to(torch.bfloat16), torch.zeros(7))
