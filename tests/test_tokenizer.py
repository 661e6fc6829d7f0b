"""The tokenizer against Hugging Face `tokenizers`, on the real vocabulary and on hostile files."""

import copy
import json
import pathlib
import random
import time

import pytest
import qwen35rs
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qwen35rs import vocabulary
from tokenizer_text import texts

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))

# Text and ids, as the family's own tokenizer gives them.
VECTORS = [
    ("a", [64]),
    (" a", [264]),
    ("  a", [220, 264]),
    ("Hello, world!", [9419, 11, 1814, 0]),
    ("12345", [16, 17, 18, 19, 20]),
    ("3.14159", [18, 13, 16, 19, 16, 20, 24]),
    ("\n", [198]),
    ("\n\n", [271]),
    ("\n\n\n", [1358]),
    ("\r\n", [317]),
    (" \n\n  x", [4558, 220, 830]),
    ("a\n\nb", [64, 271, 65]),
    ("x=1;\n\ty=2", [87, 28, 16, 26, 198, 14104, 28, 17]),
    ("\t\tx", [197, 9921]),
    ("\u00a0x", [3966, 87]),
    ("a\u200bb", [64, 15231, 65]),
    ("don't I'LL", [14572, 914, 353, 6, 3950]),
    ("I'm can't WE'LL it'S", [40, 2688, 628, 914, 19076, 6, 3950, 424, 12887]),
    ("naïve café e\u0301", [3267, 36328, 571, 50203, 3825]),
    ("e\u0301", [933]),
    ("\u0301", [52033]),
    ("\u00c5", [169111]),
    ("\u212b", [169111]),
    ("\u1e9b\u0323", [6315, 249, 136, 96]),
    ("\ufb01", [169752]),
    ("１２３", [19496, 24128, 32405]),
    ("²³", [28495, 41776]),
    ("Ⅷ", [68086, 100]),
    ("…", [1873]),
    ("——", [8283]),
    ("日本語テスト", [247359, 181801]),
    ("한국어", [174675, 30061]),
    ("العربية", [179415, 151479]),
    ("नमस्ते", [58069, 84237, 150104, 153348]),
    ("हिन्दी", [215989, 150127, 177453]),
    ("ไทย", [149826]),
    ("👩\u200d👩\u200d👧", [9008, 239, 102, 373, 235, 9008, 239, 102, 373, 235, 9008, 239, 100]),
    ("🇫🇷", [9008, 229, 104, 9008, 229, 115]),
    ("foo_bar", [7724, 13975]),
    ("CamelCase", [24601, 300, 4068]),
    ("https://example.com/a?b=c", [2349, 1074, 8422, 877, 13780, 30, 65, 18941]),
    ("def f(x):\n    return x+1\n", [727, 281, 2007, 1590, 198, 262, 460, 830, 10, 16, 198]),
    ("<1.5 seconds>", [27, 16, 13, 20, 6283, 29]),
    ("<|im_start|>assistant\n<think>\n", [248045, 74455, 198, 248068, 198]),
    ("<tool_response>\nok\n</tool_response>", [248066, 198, 547, 198, 248067]),
    # No merge makes these as one token, though the vocabulary has them.
    ("毛泽东", [97008, 98340, 96265]),
    ("俱乐部", [98112, 96404, 95938]),
]


@pytest.fixture(scope="module")
def directory():
    return vocabulary.make(ROOT / "models" / "qwen3_5-tokenizer")


@pytest.fixture(scope="module")
def ours(directory):
    return qwen35rs.Tokenizer(directory)


@pytest.fixture(scope="module")
def reference(directory):
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.mark.parametrize(("text", "ids"), VECTORS, ids=[ascii(text) for text, _ in VECTORS])
def test_vectors(ours, text, ids):
    assert ours.encode(text) == ids


def test_vocabulary(ours, reference):
    assert (len(ours), ours.vocab_size) == (248077, 248044)
    assert (ours.eos_token_id, ours.pad_token_id) == (248046, 248044)
    assert len(ours.added_tokens) == 33 and ours.added_tokens["<think>"] == 248068
    assert 248046 in ours.special_ids and 248068 not in ours.special_ids and len(ours.special_ids) == 21
    for token_id in range(len(ours)):
        token = ours.id_to_token(token_id)
        assert token == reference.id_to_token(token_id)
        assert ours.token_to_id(token) == token_id
    assert ours.token_bytes(264) == b" a" and ours.id_to_token(264) == "Ġa"
    assert ours.token_to_id("no such token") is None


def test_every_token_alone_encodes_as_the_reference_does(ours, reference):
    found = [ours.token_bytes(i).decode("utf-8", "replace") for i in range(0, len(ours), 5)]
    expected = [encoding.ids for encoding in reference.encode_batch(found, add_special_tokens=False)]
    assert ours.encode_batch(found) == expected


@SETTINGS
@given(text=texts())
def test_encode_equals_the_reference(ours, reference, text):
    reference.encode_special_tokens = False
    ids = ours.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert ours.encode_array(text).tolist() == ids
    assert ours.decode(ids, skip_special_tokens=False) == reference.decode(ids, skip_special_tokens=False)
    reference.encode_special_tokens = True
    expected = reference.encode(text, add_special_tokens=False).ids
    reference.encode_special_tokens = False
    assert ours.encode(text, split_special_tokens=True) == expected


@SETTINGS
@given(ids=st.lists(st.integers(0, 248076) | st.integers(0, 300) | st.integers(248040, 248076), max_size=40))
def test_decode_and_stream_equal_the_reference(ours, reference, ids):
    for skip in (True, False):
        expected = reference.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip) == expected
        stream = ours.decode_stream(skip_special_tokens=skip)
        parts = [stream.push(token_id) for token_id in ids]
        assert "".join(parts) + stream.finish() == expected
        assert stream.finish() == ""


def test_stream_holds_back_half_a_character(ours):
    stream = ours.decode_stream()
    ids = ours.encode("🇫🇷x")
    assert [stream.push(token_id) for token_id in ids] == ["", "", "🇫", "", "", "🇷", "x"]
    stream.push(ids[0])
    assert stream.finish() == "\ufffd"


def test_round_trip_of_real_files(ours, reference):
    paths = sorted(pathlib.Path(json.__file__).parent.parent.glob("*.py"))[::4]
    found = [path.read_text(encoding="utf-8") for path in paths]
    batch = ours.encode_batch(found)
    assert batch == [ours.encode(text) for text in found]
    assert [array.tolist() for array in ours.encode_batch_array(found)] == batch
    assert ours.decode_batch(batch, False) == found
    for text, ids in list(zip(found, batch))[::4]:
        assert ids == reference.encode(text, add_special_tokens=False).ids


def test_new_words_near_and_far_equal_the_reference(directory, reference):
    """More words than the caches begin with room for, each again next to itself and after many others."""
    rng = random.Random(7)
    letters = "abcdefghijklmnopqrstuvwxyzABCäжя中0_"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 40))) for _ in range(12_000)]
    tokenizer = qwen35rs.Tokenizer(directory / "tokenizer.json")
    for end in (" ", "\0 "):  # a NUL at the end of a word is not the padding of a short key
        text = "".join(f" {word}{end}{word}{end} {word}" for word in words) + " ".join(words)
        ids = reference.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(text) == ids


@pytest.mark.parametrize(
    "unit", ["a", " ", "\n", "=", "é", "日", "अ", "\u0301", "ab ", "\t ", "<", "<|", "'", "e\u0301"]
)
def test_long_runs_take_linear_time(ours, reference, unit):
    short, long = unit * 20_000, unit * 200_000

    def seconds(text):
        return min(timed(ours.encode_array, text) for _ in range(3))

    # Ten times the text: 100 times the time if it were quadratic.
    assert seconds(long) < 40 * seconds(short) + 0.05
    assert ours.encode(unit * 3000) == reference.encode(unit * 3000, add_special_tokens=False).ids


def timed(work, *args):
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def test_arguments_that_cannot_be_served(ours):
    for token_id in (248077, -1, 1 << 40):
        for call in (
            ours.id_to_token,
            ours.token_bytes,
            ours.decode_stream().push,
            lambda i: ours.decode([i]),
        ):
            with pytest.raises(ValueError, match="token id"):
                call(token_id)
    with pytest.raises(TypeError):
        ours.encode(b"bytes")
    for call in (ours.encode, ours.encode_array, ours.token_to_id):
        with pytest.raises(qwen35rs.RequestError, match="lone surrogates"):
            call("\ud800")
    for call in (ours.encode_batch, ours.encode_batch_array):
        with pytest.raises(qwen35rs.RequestError, match="lone surrogates"):
            call(["x", "\ud800"])
    assert ours.encode("") == [] and ours.decode([]) == "" and ours.encode_batch([]) == []


# Files, on a small vocabulary of the same shape.


@pytest.fixture(scope="module")
def small():
    return vocabulary.tokenizer_files(vocabulary.real_ranks(600))


def load(path, tokenizer, config=None):
    (path / "tokenizer.json").write_text(tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer))
    if config is not None:
        (path / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return qwen35rs.Tokenizer(path)


def changed(tokenizer, where, value):
    tokenizer = copy.deepcopy(tokenizer)
    inner = tokenizer
    for key in where[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return tokenizer


SPLIT = ("pre_tokenizer", "pretokenizers", 0)
REFUSED = [
    (("normalizer",), {"type": "NFKC"}, "normalizer"),
    (("normalizer",), {"type": "Sequence", "normalizers": []}, "normalizer"),
    (("pre_tokenizer",), None, "pre_tokenizer"),
    ((*SPLIT, "pattern"), {"Regex": r"\s+"}, "pattern"),
    ((*SPLIT, "pattern"), {"String": " "}, "pattern"),
    ((*SPLIT, "behavior"), "Removed", "pretokenizers"),
    ((*SPLIT, "invert"), True, "pretokenizers"),
    (("pre_tokenizer", "pretokenizers", 1, "add_prefix_space"), True, "pretokenizers"),
    (("pre_tokenizer", "pretokenizers", 1, "use_regex"), True, "pretokenizers"),
    (("post_processor",), {"type": "TemplateProcessing"}, "post_processor"),
    (("decoder",), None, "decoder"),
    (("decoder",), {"type": "WordPiece"}, "decoder"),
    (("model", "type"), "Unigram", "model.type"),
    (("model", "dropout"), 0.1, "dropout"),
    (("model", "continuing_subword_prefix"), "##", "continuing_subword_prefix"),
    (("model", "end_of_word_suffix"), "</w>", "end_of_word_suffix"),
    (("model", "byte_fallback"), True, "byte_fallback"),
    (("model", "ignore_merges"), True, "ignore_merges"),
    (("model",), KeyError, "model"),
    (("model", "vocab"), KeyError, "vocab"),
    (("model", "vocab"), [], "map"),
    (("model", "vocab", "new"), -1, "integer"),
    (("model", "vocab", "new"), 1 << 33, "integer"),
    (("model", "vocab", "new"), 1 << 20, "below 1048576"),
    (("model", "vocab", "new"), 5, "id 5 has two tokens"),
    (("model", "vocab", "a"), KeyError, "single byte 97"),
    (("model", "merges"), {}, "list of merges"),
    (("model", "merges", 3), ["a"], "fewer than two"),
    (("model", "merges", 3), ["a", "b", "c"], "more than two"),
    (("model", "merges", 3), "a b c", "a b c"),
    (("model", "merges", 3), ["", "a"], "empty"),
    (("model", "merges", 3), ["qqq", "zzz"], "merges\\[3\\]"),
    (("model", "merges", 3), 7, "merge"),
    (("added_tokens", 0, "single_word"), True, "single_word"),
    (("added_tokens", 0, "content"), "", "content"),
    (("added_tokens", 0, "id"), 3, "id"),
    (("added_tokens", 1, "content"), "<|endoftext|>", "two entries"),
]


@pytest.mark.parametrize(
    ("where", "value", "said"), REFUSED, ids=[f"{'.'.join(map(str, r[0]))}={r[1]}" for r in REFUSED]
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, small, where, value, said):
    with pytest.raises(ValueError, match=said):
        load(tmp_path, changed(small[0], where, value))


def test_malformed_files(tmp_path, small):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        qwen35rs.Tokenizer(tmp_path)
    whole = json.dumps(small[0])
    for text in (
        "",
        "{",
        "[]",
        "null",
        whole[: len(whole) // 2],
        whole + "x",
        whole.replace('"merges"', '"merge"'),
    ):
        with pytest.raises(ValueError, match="tokenizer.json"):
            load(tmp_path, text)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8 at byte 0"):
        qwen35rs.Tokenizer(tmp_path)
    twice = whole.replace('"vocab": {', '"vocab": {"a": 5, ')
    with pytest.raises(ValueError, match="two tokens|same token"):
        load(tmp_path, twice)
    for config in ("{", '{"added_tokens_decoder": {"x": {"content": "y"}}}', '{"eos_token": "<none>"}'):
        with pytest.raises(ValueError, match="tokenizer_config.json"):
            load(tmp_path, small[0], config)


def test_random_damage_never_crashes(tmp_path, small):
    whole, rng = json.dumps(small[0]), random.Random(7)
    for _ in range(150):
        at = rng.randrange(len(whole))
        damaged = (
            whole[:at]
            + rng.choice(["", "{", '"', "\\", "0", "null", "\\ud800"])
            + whole[at + rng.randrange(3) :]
        )
        try:
            load(tmp_path, damaged)
        except ValueError:
            pass


def test_other_spellings_of_the_same_file(tmp_path, small):
    text = "The theory: 123 naïve e\u0301tudes.\n  <think>it's</think>"
    expected = load(tmp_path, small[0]).encode(text)
    joined = changed(
        small[0], ("model", "merges"), ["#version: 0.2", *map(" ".join, small[0]["model"]["merges"])]
    )
    assert load(tmp_path, joined).encode(text) == expected
    backwards = changed(small[0], ("model",), dict(reversed(small[0]["model"].items())))
    assert load(tmp_path, backwards).encode(text) == expected
    assert load(tmp_path, changed(small[0], ("post_processor",), None)).encode(text) == expected


def test_tokens_of_the_config_alone_are_added(tmp_path, small):
    fewer = changed(small[0], ("added_tokens",), small[0]["added_tokens"][:-7])
    tokenizer = load(tmp_path, fewer, small[1])
    assert tokenizer.encode("<|audio_pad|>") == [632] and len(tokenizer) == 633
    assert tokenizer.eos_token_id == tokenizer.token_to_id("<|im_end|>")
    (tmp_path / "tokenizer_config.json").unlink()
    assert load(tmp_path, fewer).eos_token_id is None and len(load(tmp_path, fewer)) == 626
    as_object = changed(small[1], ("eos_token",), {"content": "<think>", "special": False})
    assert load(tmp_path, fewer, as_object).eos_token_id == tokenizer.token_to_id("<think>")


@SETTINGS
@given(text=st.text(alphabet="ab<>sx \n\u3000e\u0301é\u212bÅ", max_size=30))
def test_flags_of_added_tokens_equal_the_reference(small, tmp_path_factory, text):
    ours, reference = flagged(small, tmp_path_factory)
    for plain in (False, True):
        reference.encode_special_tokens = plain
        ids = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, split_special_tokens=plain) == ids
        assert ours.decode(ids) == reference.decode(ids)


FLAGGED = []


def flagged(small, tmp_path_factory):
    """Overlapping added tokens with every flag, in both implementations."""
    if not FLAGGED:
        plain = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
        tokens = [
            ("<a>", {"lstrip": True}),
            ("<b>", {"rstrip": True, "special": True}),
            ("<s", {"special": True}),
            ("<s>", {"lstrip": True, "rstrip": True}),
            (">x", {}),
            ("a\u212b", {"normalized": True}),
            ("e\u0301b", {"normalized": True, "lstrip": True}),
            ("éb ", {"normalized": True, "special": True}),
            (" ", {"normalized": True, "rstrip": True}),
        ]
        base = len(small[0]["model"]["vocab"])
        added = [
            {"id": base + i, "content": content, **plain, **flags}
            for i, (content, flags) in enumerate(tokens[:8])
        ]
        tokenizer = changed(small[0], ("added_tokens",), added)
        directory = tmp_path_factory.mktemp("flagged")
        FLAGGED.append(load(directory, tokenizer))
        FLAGGED.append(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")))
    return FLAGGED


@SETTINGS
@given(text=texts())
def test_the_older_pattern_equals_the_reference(small, tmp_path_factory, text):
    ours, reference = older(small, tmp_path_factory)
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids


OLDER = []


def older(small, tmp_path_factory):
    """A tokenizer with the pattern of Qwen2 and without a normalizer, in both implementations."""
    if not OLDER:
        pattern = vocabulary.PATTERN.replace(r"[\p{L}\p{M}]+", r"\p{L}+").replace(r"\p{M}", "")
        tokenizer = changed(small[0], (*SPLIT, "pattern"), {"Regex": pattern})
        directory = tmp_path_factory.mktemp("older")
        OLDER.append(load(directory, changed(tokenizer, ("normalizer",), None)))
        OLDER.append(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")))
    return OLDER
