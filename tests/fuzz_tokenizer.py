#!/usr/bin/env python3
"""Compare the tokenizer with Hugging Face `tokenizers` on random text for as long as wanted.

usage: fuzz_tokenizer.py [--characters N] [--seed S]
"""

import argparse
import pathlib
import random
import sys

import qwen35rs
import tokenizers
from qwen35rs import vocabulary
from tokenizer_text import random_text


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--characters", type=int, default=10_000_000)
    args.add_argument("--seed", type=int, default=0)
    args = args.parse_args()
    directory = vocabulary.make(pathlib.Path(__file__).parent.parent / "models" / "qwen3_5-tokenizer")
    ours = qwen35rs.Tokenizer(directory)
    reference = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    rng, done, tokens = random.Random(args.seed), 0, 0
    while done < args.characters:
        texts = [random_text(rng, rng.choice([4, 30, 300, 3000])) for _ in range(64)]
        plain = rng.random() < 0.2
        reference.encode_special_tokens = plain
        expected = [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]
        for text, ids, found in zip(texts, expected, ours.encode_batch(texts, split_special_tokens=plain)):
            if ids != found:
                sys.exit(f"seed {args.seed}: ids differ for {text!r}")
            stream = ours.decode_stream(skip_special_tokens=False)
            streamed = "".join(map(stream.push, ids)) + stream.finish()
            if not streamed == ours.decode(ids, False) == reference.decode(ids, skip_special_tokens=False):
                sys.exit(f"seed {args.seed}: text differs for the ids of {text!r}")
            done += len(text)
            tokens += len(ids)
    print(f"{done} characters, {tokens} tokens: no difference")


if __name__ == "__main__":
    main()
