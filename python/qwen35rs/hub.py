"""Where a model's files are: a directory, a GGUF file, a name on the Hugging Face hub, or here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ._core import ConfigError

EMBEDDED = Path(__file__).parent / "model"
"""The small model that comes with the package. `training/README.md` of the project says how it was made."""

#: What a checkpoint needs; other files of a repository are not fetched.
FILES = ["*.json", "*.safetensors", "*.jinja"]
TOKENIZER_FILES = ["tokenizer*.json", "*.jinja", "config.json", "generation_config.json"]

#: What the sizes of the family are called.
_SIZE = re.compile(r"[\d.]+b(-a\d+b)?", re.IGNORECASE)


def resolve(
    model: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    patterns: list[str] | None = None,
) -> Path:
    """The directory of a model, or its GGUF file: itself, or the hub's snapshot of that name (downloaded where needed);
    of none, the embedded model's.

    Downloads show huggingface_hub's progress bar, use its cache and its token, and honour HF_HUB_OFFLINE.

    Raises FileNotFoundError for a path that does not exist, ConfigError for a name that the hub cannot give.
    """
    if model is None:
        return EMBEDDED
    path, name = Path(model), os.fspath(model)
    if name and (path.is_dir() or path.is_file() and is_gguf(path)):
        return path
    check_gguf(path)
    if not isinstance(model, str) or os.path.lexists(path) or not _is_hub_id(name):
        size = (
            f'; of the size {name}, load_format="dummy" makes random weights' if _SIZE.fullmatch(name) else ""
        )
        raise FileNotFoundError(
            f"{name or 'an empty name'}: {_what_is(path)}; give the directory of a checkpoint (with config.json and *.safetensors), "
            f"a GGUF file, or a name on the Hugging Face hub like Qwen/Qwen3.5-35B-A3B{size}"
        )
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, token=token, allow_patterns=patterns or FILES
            )
        )
    except Exception as error:
        reason = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
        )
        raise ConfigError(
            f"{name}: no such directory, and the Hugging Face hub could not give it ({reason}). "
            "Without network, give the path of a directory that holds the checkpoint "
            "(config.json, *.safetensors, tokenizer.json), for example one made by "
            f"`hf download {name} --local-dir DIR` on a machine that has it."
        ) from error


def passed_over(path: Path) -> list[str]:
    """Names of the GGUF models in a folder whose safetensors are taken."""
    names = sorted(os.listdir(path)) if path.is_dir() else []
    if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return []
    return [n for n in names if is_gguf(Path(n)) and not n.startswith(("mmproj", "mtp-"))]


def _what_is(path: Path) -> str:
    """What there is in place of a model."""
    if path.is_symlink() and not path.exists():
        return "is a link to nothing"
    if not path.exists():
        return "does not exist"
    return "is a file" if path.is_file() else "is neither a directory nor a regular file"


def is_gguf(path: Path) -> bool:
    """Whether a path's name is that of a GGUF file."""
    return path.suffix.lower() == ".gguf"


def check_gguf(path: Path) -> None:
    """Raises FileNotFoundError for a GGUF file that is not there, or not called one."""
    if is_gguf(path) and not path.exists():
        around = "" if path.is_symlink() else f"; {_beside(path)}"
        raise FileNotFoundError(f"{path}: {_what_is(path)}{around}")
    if not is_gguf(path) and _begins_as_gguf(path):
        raise FileNotFoundError(
            f"{path}: is a GGUF file under another name; give it one that ends in .gguf (a link will do)"
        )


def _begins_as_gguf(path: Path) -> bool:
    """Whether a path is that of a file which begins as GGUF does."""
    try:
        if not path.is_file():  # a FIFO would be waited for
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _beside(path: Path) -> str:
    """What there is in place of a GGUF file that is missing."""
    folder = path.parent
    if not folder.is_dir():
        return f"nor does its directory {folder}"
    others = sorted(other.name for other in folder.iterdir() if is_gguf(other))
    found = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "") if others else "no GGUF file"
    return f"{folder} has {found}"


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    plain = all(p and not p.startswith((".", "-", "~")) and not set(p) & set('\\ :*?"<>|') for p in parts)
    return len(parts) == 2 and plain
