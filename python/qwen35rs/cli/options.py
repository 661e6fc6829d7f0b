"""Options that several commands share, and what they make."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from .._core import RequestError

if TYPE_CHECKING:
    from ..sampling import SamplingParams

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Directory of a checkpoint, a GGUF file, or a name on the Hugging Face hub such as Qwen/Qwen3.5-35B-A3B; the "
        "embedded model by default.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]

_SAMPLING, _LOADING = "Sampling (default: what the checkpoint's generation_config.json says)", "Loading"


def _sampling(name: str, help: str) -> object:
    return typer.Option(name, help=help, show_default=False, rich_help_panel=_SAMPLING)


Temperature = Annotated[float | None, _sampling("--temperature", "0 takes the most likely token.")]
TopP = Annotated[float | None, _sampling("--top-p", "Keep the likeliest tokens up to this share, in (0, 1].")]
TopK = Annotated[int | None, _sampling("--top-k", "Keep this many of the likeliest tokens; 0 for all.")]
MinP = Annotated[float | None, _sampling("--min-p", "Keep tokens this likely against the best, in [0, 1].")]
MaxTokens = Annotated[
    int | None, _sampling("--max-tokens", "Most tokens to generate; else as far as the context goes.")
]
MinTokens = Annotated[int, _sampling("--min-tokens", "Least tokens to generate.")]
Presence = Annotated[float | None, _sampling("--presence-penalty", "Off each token in the output, -2 to 2.")]
Frequency = Annotated[float | None, _sampling("--frequency-penalty", "The same, times its count, -2 to 2.")]
Repetition = Annotated[float | None, _sampling("--repetition-penalty", "Over all tokens so far; 1 is none.")]
Seed = Annotated[int | None, _sampling("--seed", "Same seed, same text.")]
Stop = Annotated[list[str] | None, _sampling("--stop", "Text that ends the output; may be repeated.")]
IgnoreEos = Annotated[bool, _sampling("--ignore-eos", "Go on past the end of the text.")]
SampleN = Annotated[int, _sampling("--n", "Samples of each prompt.")]
Logprobs = Annotated[
    int | None, _sampling("--logprobs", "With --json: log-probabilities of the chosen and the best K tokens.")
]

Device = Annotated[
    str, typer.Option(help="Where it runs: auto, cpu, cuda, cuda:1, ...", rich_help_panel=_LOADING)
]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        help="Ranks that share the model: as many GPUs, from the one of --device on or those of --device cuda:0,2; threads "
        "on the CPU.",
        rich_help_panel=_LOADING,
    ),
]
ExpertParallel = Annotated[
    bool,
    typer.Option(
        "--expert-parallel",
        help="Give each rank some of the experts whole, and not a slice of each.",
        rich_help_panel=_LOADING,
    ),
]
LoadFormat = Annotated[
    str,
    typer.Option(
        help="auto reads the checkpoint; dummy takes random weights, and the model may be a size of the family, as in "
        "-m 35b-a3b.",
        rich_help_panel=_LOADING,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="How matrices are held: auto (as stored), float32, bfloat16, float16.", rich_help_panel=_LOADING
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="Quantise matrices while they are loaded: int4, fp8, or mixed (experts int4, the rest fp8); as published "
        "by default.",
        show_default=False,
        rich_help_panel=_LOADING,
    ),
]
KvCacheDtype = Annotated[
    str,
    typer.Option(
        help="How keys and values are held: auto (as they are computed), fp8 (a byte each).",
        rich_help_panel=_LOADING,
    ),
]
ActivationDtype = Annotated[
    str,
    typer.Option(
        help="What products of many tokens with quantised weights take: auto (bfloat16), fp8 (rounded, on Hopper).",
        rich_help_panel=_LOADING,
    ),
]
StateDtype = Annotated[
    str,
    typer.Option(help="How recurrent states are held: float32, float16.", rich_help_panel=_LOADING),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Longest prompt plus output, in tokens; the model's context by default.",
        show_default=False,
        rich_help_panel=_LOADING,
    ),
]


def sampling(stop: list[str] | None, **fields: object) -> SamplingParams:
    """Sampling parameters of the options that were given. Raises RequestError."""
    from ..sampling import SamplingParams

    stop = [check_text("stop", text) for text in stop or []]
    return SamplingParams(stop=stop, **fields)  # type: ignore[arg-type]


def parse_ids(text: str) -> list[int]:
    """Token ids between spaces or commas. Raises RequestError."""
    ids = []
    for word in text.replace(",", " ").split():
        if not (word.isascii() and word.isdigit()):
            raise RequestError(f'token_ids: found {word!r}; allowed: whole numbers, as in "1 2 3"')
        if len(word) > 20:  # more digits than Python turns into a number, at some length
            raise RequestError(f"token_ids: found a number of {len(word)} digits; allowed: token ids")
        ids.append(int(word))
    return ids


def check_text(name: str, text: str) -> str:
    """The text, if it is one: bytes that are no UTF-8 reach python as lone surrogates. Raises RequestError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}: found bytes that are not UTF-8 at character {error.start}") from None
    return text


def stdin_bytes() -> BinaryIO:
    """Stdin. Raises RequestError where the caller closed it."""
    if sys.stdin is None:
        raise RequestError("stdin: found it closed; allowed: an open file, a pipe or a terminal")
    return sys.stdin.buffer


def read_text(name: str, data: bytes) -> str:
    """Text of a file or of stdin. Raises RequestError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name}: found bytes that are not UTF-8 at byte {error.start}") from None
