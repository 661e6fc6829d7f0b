"""The task suite: splits, checks, templates, seeds."""

import itertools
import json
import random

import pytest
from qwen35rs import Tokenizer, tasks, vocabulary
from qwen35rs.tasks import arithmetic, item, numbers, toolcalls

NUM = 150


def drawn(task, split="test", seed=0, num=NUM):
    return list(itertools.islice(tasks.items(task, split=split, seed=seed), num))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    vocabulary.write(path, vocabulary.byte_ranks())
    return Tokenizer(path)


@pytest.mark.parametrize("task", tasks.SUITE)
def test_the_splits_share_nothing(task):
    keys = {split: {i.key for i in drawn(task, split)} for split in tasks.SPLITS}
    for split, found in keys.items():
        assert {tasks.split_of(key) for key in found} == {split}
    assert not keys["train"] & keys["test"]


def test_one_content_in_ten_is_held_out():
    held = sum(
        tasks.split_of(f"{a} {sign} {b}") == "test" for a in range(100) for b in range(100) for sign in "+-*"
    )
    assert 2800 < held < 3200


@pytest.mark.parametrize("task", tasks.SUITE)
def test_a_seed_gives_the_same_questions(task):
    def shown(seed):
        return [(i.kind, i.messages, i.tools, i.completion) for i in drawn(task, seed=seed, num=20)]

    assert shown(3) == shown(3)
    assert shown(3) != shown(4)


@pytest.mark.parametrize("task", tasks.SUITE)
def test_the_expected_answer_is_accepted_and_others_are_not(task):
    found = drawn(task)
    assert {i.thinking for i in found} == {True, False}
    for one in found:
        assert one.check(one.completion), one
        assert not one.check(""), one
        assert not one.check(one.completion.replace("</think>", "")) or not one.thinking, one
        assert not one.check("<tool_call>\n<function=none>\n</function>\n</tool_call>"), one
    wrong = 0
    for one, other in itertools.pairwise(found):
        same = one.expected["content"] == other.expected["content"] and not one.expected.get("tool_calls")
        if one.thinking == other.thinking and not same and one.key != other.key:
            wrong += one.check(other.completion)
    assert wrong <= 3  # two questions may have one answer: a count of five words


@pytest.mark.parametrize("task", tasks.SUITE)
def test_the_completion_is_what_the_template_prints(task, tokenizer):
    for one in drawn(task, "train", num=40):
        options = {"tools": one.tools, "tokenize": False}
        prompt = tokenizer.apply_chat_template(one.messages, enable_thinking=one.thinking, **options)
        whole = tokenizer.apply_chat_template(
            [*one.messages, one.expected], add_generation_prompt=False, **options
        )
        assert whole == prompt + one.completion + "\n"
        # No token spans the border, so that generating and training see the same tokens.
        assert tokenizer.encode(whole) == tokenizer.encode(prompt) + tokenizer.encode(one.completion + "\n")


def test_perturbed_answers_are_refused():
    rng = random.Random(0)
    for one in drawn("arithmetic"):
        content = one.expected["content"]
        digits = [i for i, c in enumerate(content) if c.isdigit()]
        if digits:
            last = digits[-1]
            other = content[:last] + str((int(content[last]) + rng.randint(1, 9)) % 10) + content[last + 1 :]
            assert not one.check(one.completion.replace(content + "<|im_end|>", other + "<|im_end|>")), one
    for one in drawn("json"):
        if one.kind != "sentence":
            facts = json.loads(one.expected["content"])
            (facts[0] if isinstance(facts, list) else facts)["name"] = "Nobody"
            text = one.completion.replace(one.expected["content"], json.dumps(facts))
            assert not one.check(text), one
    for one in drawn("recall"):
        wrong = one.completion.replace(
            one.expected["content"], one.expected["content"].replace(" is ", " is not ")
        )
        value = one.expected["content"].split()[-1].rstrip(".")
        assert one.check(wrong) and not one.check(wrong.replace(value, "nothing")), one
    for one in drawn("tools"):
        if one.kind.startswith("call"):
            name = one.expected["tool_calls"][0]["function"]["name"]
            assert not one.check(one.completion.replace(f"<function={name}>", "<function=other>")), one
            assert not one.check(one.completion.replace("\n</parameter>", "x\n</parameter>", 1)), one
            assert not one.check(one.completion.replace("</tool_call>", "")), one


def test_arithmetic_is_right():
    for one in drawn("arithmetic, three digits", num=400):
        a, sign, b = one.key.split()
        result = arithmetic.solve(int(a), sign, int(b))
        if one.thinking:
            steps = one.expected["reasoning_content"].splitlines()
            assert steps[0] == f"{a} {sign} {b}" and steps[-1] == f"{a} {sign} {b} = {result}"
            for line in steps[1:]:
                left, equals, right = line.partition(" = ")
                if equals and not line.endswith(("borrow 1",)):
                    assert eval(left) == int(right.partition(",")[0]), line
        assert (
            one.expected["content"]
            .rstrip(".。")
            .endswith((str(result), numbers.english(result), numbers.chinese(result)))
        )


def test_numbers_as_words():
    assert numbers.english(-998001) == "minus nine hundred ninety-eight thousand one"
    found = {0: "零", 10: "十", 15: "十五", 20: "二十", 101: "一百零一", 110: "一百一十", 1005: "一千零五"}
    found |= {10010: "一万零一十", 100000: "十万", 998001: "九十九万八千零一", -7: "负七"}
    assert {n: numbers.chinese(n) for n in found} == found
    assert len({numbers.english(n) for n in range(2000)}) == 2000
    assert len({numbers.chinese(n) for n in range(20000)}) == 20000


def test_tool_calls_are_read_back():
    one = next(i for i in drawn("tools") if i.kind.startswith("call"))
    reply = item.parse(one.completion, thinking=one.thinking)
    assert reply.tool_calls == item.calls(one.expected)
    assert reply.content == ""
    assert toolcalls.TASK == one.task
    assert item.parse("no end of the thought", thinking=True) is None
    assert item.parse("Sure.\n\n<tool_call>\n<function=f>\n", thinking=False) is None


def test_recall_keeps_to_its_length(tmp_path):
    tokenizer = Tokenizer(vocabulary.make(tmp_path, 3000))
    for task, limit in (("recall", 1060), ("recall, long", 4096)):
        lengths = [
            len(tokenizer.apply_chat_template(i.messages, enable_thinking=i.thinking)) for i in drawn(task)
        ]
        assert max(lengths) <= limit, task
        assert max(lengths) > 0.85 * limit
