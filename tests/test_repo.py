"""ARCHITECTURE.md against the tree, and the rules that text can show."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("src", "python", "cuda", "benches", "tests", "examples", "training")
MAX_LINES = 600
LONG = {"src/tokenizer/unicode.rs"}  # generated tables
# Where `unsafe` may be, with ARCHITECTURE.md's reasons.
UNSAFE = (
    "src/backend/cpu/",
    "src/backend/cuda/",
    "src/mapped.rs",
    "src/tokenizer/window.rs",
    "src/tokenizer/pieces.rs",
    "src/tokenizer/vocab.rs",
    "src/python/ops.rs",
    "src/python/dlpack.rs",
    "src/python/tokenizer.rs",
)
VAGUE = {"util", "utils", "common", "misc", "manager", "helper", "helpers"}
SOURCE = {".rs", ".py", ".pyi", ".cu", ".cuh", ".h", ".jinja", ".toml", ".md"}


def tracked():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


FILES = tracked() if (ROOT / ".git").exists() else []
# What is checked is the repository; an archive of the sources does not say which files are the project's.
pytestmark = pytest.mark.skipif(not FILES, reason="not in a git checkout")


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def rust_code(name):
    """Lines of a Rust file without comments."""
    return [re.sub(r"//.*", "", line) for line in text(name).splitlines()]


def sources(*suffixes, under=""):
    return [f for f in FILES if Path(f).suffix in suffixes and f.startswith(under)]


def is_mapped(name):
    """Every source file; data of the tests is named by the script that makes it."""
    parts = Path(name).parts
    return (
        parts[0] in MAPPED and "data" not in parts and "results" not in parts and parts[-1] != "__init__.py"
    )


def test_every_file_is_on_the_map():
    named = set(re.findall(r"^\| `([^`]+)` \|", text("ARCHITECTURE.md"), re.MULTILINE))
    files = {f for f in FILES if is_mapped(f)} | {
        f for f in FILES if f.startswith("python/") and is_mapped(f)
    }
    folders = tuple(name for name in named if name.endswith("/"))
    files = {f for f in files if not f.startswith(folders)}
    assert sorted(files - named) == [], "in the tree, not in ARCHITECTURE.md"
    assert sorted(f for f in named if not (ROOT / f).exists()) == [], "in ARCHITECTURE.md, not in the tree"


def test_other_paths_in_the_documents_exist():
    for document in [f for f in FILES if f.endswith(".md") and "/" not in f]:
        for path in re.findall(r"`((?:src|python|tests|benches|cuda|training)/[\w./-]+)`", text(document)):
            assert (ROOT / path).exists(), f"{document}: {path}"


def test_no_file_is_too_long():
    long = {
        f: len(text(f).splitlines()) for f in sources(".rs", ".py", ".pyi", ".cu", ".cuh") if f not in LONG
    }
    assert {f: n for f, n in long.items() if n > MAX_LINES} == {}


def test_names_say_something():
    for f in FILES:
        words = {w for part in Path(f).parts for w in re.split(r"[^a-z]+", part.lower())}
        assert not words & VAGUE, f


def test_rust_files_say_what_they_are():
    for f in sources(".rs", under="src/"):
        if not f.endswith("tests.rs"):
            assert text(f).startswith("//!"), f


def test_who_knows_whom():
    for f in sources(".rs", under="src/"):
        code = "\n".join(rust_code(f))
        if not f.startswith("src/python/"):
            assert not re.search(r"\bpyo3\b|\bnumpy::", code), f"{f}: pyo3 is known in src/python alone"
            assert "crate::python" not in code, f
        if re.search(r"\bunsafe\b", code):
            assert f.startswith(UNSAFE), f"{f}: unsafe"
        if f.startswith("src/backend/") and "tests" not in f:
            forbidden = r"crate::(engine|scheduler|cache|request|service|model|sampler|tokenizer)\b"
            assert not re.search(forbidden, code), f
        if f in ("src/scheduler.rs", "src/cache.rs", "src/request.rs", "src/batch.rs"):
            assert not re.search(r"crate::(backend|model|engine|tokenizer|weights)\b", code), f
        if f.startswith(("src/weights/", "src/config")) and "tests" not in f:
            assert not re.search(r"crate::(backend|model|engine|tokenizer)\b", code), f
    model = "\n".join(rust_code("src/model.rs"))
    assert "Request" not in model and "crate::request" not in model
    assert "Tokenizer" not in "\n".join(rust_code("src/engine.rs"))


def test_nothing_is_left_undone():
    for f in sources(".rs"):
        code = "\n".join(rust_code(f))
        assert not re.search(r"\b(todo|unimplemented|dbg)!", code), f
    for f in FILES:
        if Path(f).suffix in SOURCE and f != "tests/test_repo.py":
            assert not re.search(r"\b(FIXME|XXX)\b|\bTODO\b(?!\(#)", text(f)), f


def test_nothing_names_a_machine():
    # Paths that only somebody's own machine has. /tmp and /proc are everybody's.
    own = re.compile(r"(?<![\w.])/(?:home|root|Users|work|opt|mnt|data|workspace)/[\w.-]")
    for f in FILES:
        if (
            Path(f).suffix in SOURCE | {".sh", ".json", ""}
            and "golden/data" not in f
            and f != "tests/test_repo.py"
        ):
            found = own.search(text(f))
            assert not found, f"{f}: {found.group()}"


def test_the_version_is_one():
    (version,) = re.findall(r'^version = "([^"]+)"', text("Cargo.toml"), re.MULTILINE)
    import qwen35rs

    assert qwen35rs.__version__ == version
