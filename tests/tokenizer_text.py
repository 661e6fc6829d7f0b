"""Text that is hard on a tokenizer, as hypothesis strategies and as a plain random generator."""

import random

from hypothesis import strategies as st

ADDED = [
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "<tool_response>",
    "<|endoftext|>",
    "<|fim_pad|>",
    "<tts_pad>",
]
FRAGMENTS = [
    *ADDED, "<|im_", "|>", "<", "</", "<think", "think>", "'s", "'S", "'ſ", "'ll", "'rE", "'v", "'", "ſ", "İ", "ß", "K", "\r\n", "\n",
    "\r", "\n\n", " \n", "  ", "\t", "\v", "\x85", "\xa0", "\u2028", "\u3000", "\u200b", "\u0301", "\u0323\u0301", "\u0301\u0323",
    "e\u0301", "a\u030a\u0301", "\u1100\u1161\u11a8", "\uac00\u11a8", "\u0915\u093c", "\u0958", "\u2126", "\u212b", "\ufb01", "\u0344",
    "\u1e9b\u0323", "\u3099", "か\u3099", "\u0f71\u0f72", "\U0001d15e", "\U000105d2\u0307", "\u08d3\u0334", "\U00016d67\U00016d67",
    "毛泽东", "俱乐部", "日本語", "привет", "Ελλάδα", "עברית", "हिन्दी", "ไทย", "한국어", "👩\u200d👩\u200d👧", "🇫🇷", "²³", "Ⅷ", "１２", "٣",
    "the", " and", "function", "(x)", "==", "://", "...", "—", "0", "42", "\0", "\x7f", "\ufffd", "\uffff", "\U0010ffff",
]  # fmt: skip
RANGES = [
    (0, 0x7F), (0x80, 0x2FF), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x8FF), (0x900, 0xDFF), (0xE00, 0x11FF), (0x1E00, 0x20FF),
    (0x2100, 0x2FFF), (0x3000, 0x33FF), (0x4E00, 0x9FFF), (0xA000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x10FFFF),
]  # fmt: skip


def texts():
    """Any Unicode text, and text made of fragments."""
    mixed = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=24).map("".join)
    ascii_text = st.text(alphabet=" \n\r\t'aAsStTlLrReE1.(<|>_", max_size=200)
    return st.text(max_size=60) | mixed | ascii_text


def random_text(rng: random.Random, num_parts):
    """Fragments, runs and characters from a few blocks at a time."""
    parts = []
    while len(parts) < num_parts:
        kind = rng.random()
        if kind < 0.4:
            parts.append(rng.choice(FRAGMENTS))
        elif kind < 0.5:
            parts.append(rng.choice(FRAGMENTS) * rng.randrange(1, 40))
        else:
            low, high = rng.choice(RANGES)
            for _ in range(rng.randrange(1, 30)):
                code = rng.randint(low, high)
                parts.append(chr(code) if not 0xD800 <= code < 0xE000 else " ")
    return "".join(parts)
