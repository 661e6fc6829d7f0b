"""A mixed corpus from what a machine already has: code, documentation and the messages of its programs in many languages.

Deterministic for one machine: files in the order of their names' hashes, each document kept once, a fixed share of each kind as long as
it lasts. Nothing is downloaded; another machine gives another corpus of the same kind.
"""

import gzip
import hashlib
import pathlib
import struct
import sysconfig

MAX_DOCUMENT = 1 << 18  # bytes; longer files are cut at a line end, because data tables are not text


def text_of(path):
    """A file's text, at most MAX_DOCUMENT bytes of it; None where it is not UTF-8."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            raw = file.read(MAX_DOCUMENT + 1)
        if len(raw) > MAX_DOCUMENT:
            raw = raw[: raw.rindex(b"\n", 0, MAX_DOCUMENT) + 1]
        return raw.decode("utf-8")
    except (OSError, ValueError, EOFError):
        return None


def messages_of(path):
    """The translations in a gettext catalogue, one per line, long enough to be sentences."""
    raw = path.read_bytes()
    if raw[:4] != b"\xde\x12\x04\x95":
        return None
    count, _, table = struct.unpack_from("<3I", raw, 8)
    found = []
    for i in range(1, count):  # the first is the header
        length, offset = struct.unpack_from("<2I", raw, table + 8 * i)
        try:
            message = raw[offset : offset + length].decode("utf-8")
        except ValueError:
            return None
        if length > 24:
            found.append(message.replace("\0", "\n"))
    return "\n".join(found)


def files(roots, suffixes):
    found = {path for root in roots for path in pathlib.Path(root).rglob("*") if path.suffix in suffixes}
    for path in sorted(found, key=lambda path: hashlib.blake2b(str(path).encode()).digest()):
        if path.is_file() and not path.is_symlink():
            yield path


def kinds():
    """(name, share of the corpus, documents)"""
    code = dict.fromkeys(sysconfig.get_paths()[k] for k in ("purelib", "platlib", "stdlib"))
    code = [
        *code,
        *(line for line in site_directories() if line not in code),
        "/usr/include",
        "/usr/lib/python3",
    ]
    home = pathlib.Path.home() / ".cargo" / "registry" / "src"
    documents = files(
        ["/usr/share/doc", "/usr/share/man", "/usr/share/perl"],
        {".gz", ".txt", ".html", ".md", ".rst", ".pod"},
    )
    yield "code", 0.45, filter(None, map(text_of, files(code, {".py", ".h", ".hpp", ".pyi", ".cuh"})))
    yield "rust", 0.10, filter(None, map(text_of, files([home], {".rs", ".md"})))
    yield "docs", 0.25, filter(None, map(text_of, documents))
    yield "languages", 0.20, filter(None, map(messages_of, files(["/usr/share/locale"], {".mo"})))


def site_directories():
    import sys

    return [path for path in sys.path if path.endswith("site-packages")]


def corpus(num_bytes):
    """Distinct documents, about `num_bytes` bytes in all, kinds interleaved; and the bytes of each kind."""
    seen, by_kind, sizes = set(), {}, {}
    for name, share, documents in kinds():
        kept, size = by_kind.setdefault(name, []), 0
        for text in documents:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                kept.append((digest, text))
                size += len(text.encode())
                if size >= share * num_bytes:
                    break
        sizes[name] = size
    # In the order of their hashes: a fixed shuffle.
    return [text for _, text in sorted(pair for kept in by_kind.values() for pair in kept)], sizes
