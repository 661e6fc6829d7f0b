#!/usr/bin/env python3
"""Write or check src/tokenizer/unicode.rs against the regex engine and the NFC tables of Hugging Face `tokenizers`.

usage: unicode_classes.py [--check]     (pip install tokenizers unicodedata2)

Every code point is asked of `tokenizers` itself: its class by matching \\p{L}, \\p{M}, \\p{N} and \\s with
`pre_tokenizers.Split`, its part in NFC with `normalizers.NFC`. --check writes nothing and fails on a difference.
"""

import argparse
import pathlib
import re
import sys

import unicodedata2
from tokenizers import Regex, normalizers, pre_tokenizers

OUT = pathlib.Path(__file__).parent.parent / "src" / "tokenizer" / "unicode.rs"
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
NFC = normalizers.NFC().normalize_str

OTHER, LETTER, MARK, NUMBER, WHITE = range(5)
# Parts in NFC: TRIVIAL neither changes, reorders nor joins what stands before it; MARK_OK is a mark that can only
# reorder; SUSPECT may change or compose; INERT is trivial in `tokenizers` but not in newer Unicode data.
TRIVIAL, MARK_OK, SUSPECT, INERT = range(4)


def matched(pattern):
    """The code points that a one-character pattern matches."""
    split = pre_tokenizers.Split(Regex(pattern), "removed")
    found = set()
    for i in range(0, len(CODE_POINTS), 4096):
        chunk = CODE_POINTS[i : i + 4096]
        text = "".join(map(chr, chunk))
        left = set("".join(piece for piece, _ in split.pre_tokenize_str(text)))
        found.update(c for c in chunk if chr(c) not in left)
    return found


def classes():
    table = {}
    for pattern, kind in [(r"\p{L}", LETTER), (r"\p{M}", MARK), (r"\p{N}", NUMBER), (r"\s", WHITE)]:
        for c in matched(pattern):
            assert c not in table, f"U+{c:04X} is in two classes"
            table[c] = kind
    return table


def reorders(c):
    """Whether `tokenizers` gives this character a combining class other than 0."""
    return any(
        NFC(text) != NFC(text[:2]) + text[2:] or NFC(text) != text
        for text in ("a" + chr(c) + "\u0334", "a\u0345" + chr(c))
        if NFC(chr(c)) == chr(c)
    )


def composition_seconds():
    """Characters that can join the one before them: second of a canonical pair, and Hangul vowels and finals."""
    seconds = set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))
    for c in CODE_POINTS:
        whole = chr(c)
        parts = normalizers.NFD().normalize_str(whole)
        if len(parts) > 1 and NFC(parts) == whole and not 0xAC00 <= c < 0xD7A4:
            # The last step of the composition joins the whole but its last mark with that mark.
            seconds.update(map(ord, parts[1:]))
    return seconds


def nfc_parts():
    seconds, table = composition_seconds(), {}
    for c in CODE_POINTS:
        if c in seconds or NFC(chr(c)) != chr(c):
            table[c] = SUSPECT
        elif reorders(c):
            table[c] = MARK_OK
    return table


def newer(known):
    """Code points that newer Unicode data reorder, decompose or compose and `tokenizers` does not."""
    found = set()
    for c in CODE_POINTS:
        if unicodedata2.combining(chr(c)) and c not in known:
            found.add(c)
        parts = unicodedata2.decomposition(chr(c))
        if parts and "<" not in parts and normalizers.NFD().normalize_str(chr(c)) == chr(c):
            found.update({c, *(int(part, 16) for part in parts.split())} - known.keys())
    return found


def ranges():
    kinds, parts = classes(), nfc_parts()
    parts.update(dict.fromkeys(newer(parts), INERT))
    out, previous = [], 0
    for c in range(0x110000):
        value = kinds.get(c, OTHER) | parts.get(c, TRIVIAL) << 3
        if value != previous:
            out.append((c, value))
            previous = value
    return out


def rust(found):
    lines, line = [], "   "
    for c, value in found:
        item = f" (0x{c:x}, {value}),"
        if len(line) + len(item) > 110:
            lines.append(line)
            line = "   "
        line += item
    lines.append(line)
    return (
        "//! Class and part in NFC of every code point, as Hugging Face `tokenizers` sees them.\n"
        "//! Written by tests/unicode_classes.py; do not edit.\n\n"
        "/// First code point of a range, and the value that holds up to the next range: bits 0..3 are the class (0\n"
        "/// other, 1 letter, 2 mark, 3 number, 4 white space), bits 3..5 the part in NFC (0 trivial, 1 a mark that can\n"
        "/// only reorder, 2 suspect, 3 inert: newer than the reference's tables).\n"
        "#[rustfmt::skip]\n"
        f"pub(super) static RANGES: [(u32, u8); {len(found)}] = [\n" + "\n".join(lines) + "\n];\n"
    )


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--check", action="store_true")
    args = args.parse_args()
    found = ranges()
    if args.check:
        have = [(int(a, 16), int(b)) for a, b in re.findall(r"\(0x([0-9a-f]+), (\d+)\)", OUT.read_text())]
        if have != found:
            sys.exit(f"{OUT.name} differs from tokenizers: {sorted(set(have) ^ set(found))[:10]}")
    else:
        OUT.write_text(rust(found))
    print(
        f"{len(CODE_POINTS)} code points, {len(found)} ranges, newer data: Unicode {unicodedata2.unidata_version}"
    )


if __name__ == "__main__":
    main()
