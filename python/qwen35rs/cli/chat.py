"""`qwen35rs chat`: a conversation in the terminal, or over a pipe with one message on each line."""

from __future__ import annotations

import re
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._core import Qwen35Error, RequestError
from . import options
from .options import Device, Dtype, Json, KvCacheDtype, MaxModelLen, Model, Quantization, StateDtype
from .terminal import DIM, FAILED, error_line, guarded, load, note, write, write_json

if TYPE_CHECKING:
    from ..llm import LLM
    from ..sampling import SamplingParams

_END = "</think>"
_HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer, /help shows this."


@guarded
def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    no_thinking: Annotated[
        bool, typer.Option("--no-thinking", help="Answer without reasoning first.")
    ] = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    presence_penalty: options.Presence = None,
    frequency_penalty: options.Frequency = None,
    repetition_penalty: options.Repetition = None,
    device: Device = "auto",
    tensor_parallel_size: options.TensorParallelSize = 1,
    expert_parallel: options.ExpertParallel = False,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    state_dtype: StateDtype = "float32",
    activation_dtype: options.ActivationDtype = "auto",
    max_model_len: MaxModelLen = None,
    json: Json = False,
) -> None:
    """Talk to a model.

    \b
    qwen35rs chat
    qwen35rs chat --model ./demo --system "Be brief." --no-thinking
    printf 'Hello\\nAnd then?\\n' | qwen35rs chat --json

    \b
    Ctrl-C stops an answer, Ctrl-D ends; /clear, /exit and /help are
    commands. Over a pipe each line is a message, reasoning is printed
    between <think> and </think>, and --json prints a line for each turn;
    the exit code is 1 if a line could not be answered.
    """
    options.stdin_bytes()  # a closed one is refused before a model is loaded
    params = options.sampling(
        stop,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
    )
    first = [] if system is None else [{"role": "system", "content": options.check_text("system", system)}]
    llm = load(
        model,
        device=device,
        tensor_parallel_size=tensor_parallel_size,
        expert_parallel=expert_parallel,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        state_dtype=state_dtype,
        activation_dtype=activation_dtype,
        max_model_len=max_model_len,
    )
    llm.tokenizer.chat_template  # noqa: B018  a missing tokenizer or a bad template is refused here
    session = _Session(llm, params, first, not no_thinking, json)
    if not session.run():
        raise typer.Exit(FAILED)


class _Session:
    def __init__(
        self, llm: LLM, params: SamplingParams, first: list[dict[str, Any]], thinking: bool, json: bool
    ) -> None:
        self.llm, self.params, self.first, self.thinking, self.json = llm, params, first, thinking, json
        self.messages = list(first)
        self.turn = 0
        #: Whether someone sits there. A pipe gets no decoration.
        self.talks = sys.stdin.isatty() and sys.stdout.isatty() and not json

    def run(self) -> bool:
        """Answers until the input ends. Returns whether every turn was answered."""
        good = True
        if self.talks:
            note(f"{self.llm.model}: {self.llm.max_model_len:,} tokens of context. {_HELP}")
            self._edit_lines()
        while True:
            try:
                line = self._read()
                if line is None or line.strip() in ("/exit", "/quit"):
                    return good or self.talks
                if not self._command(line):
                    self._answer(options.check_text("message", line))
            except Qwen35Error as error:
                error_line(error)
                good = False
            except KeyboardInterrupt:  # before its answer began, or behind it
                if not self.talks:
                    raise
                write("\n")
                note("(stopped)")

    def _command(self, line: str) -> bool:
        """Whether a line is no message; does what it says. Raises RequestError for an unknown command."""
        command = line.strip()
        if command == "/clear":
            self.messages = list(self.first)
            note("note: the conversation is forgotten")
        elif command == "/help":
            note(_HELP)
        elif re.match(r"/[A-Za-z]+(\s|$)", line):
            raise RequestError(
                f"command: found {command.split()[0]}; allowed: /clear, /exit, /quit, /help; "
                "a line that starts with a space is a message"
            )
        else:
            return not command
        return True

    def _edit_lines(self) -> None:
        try:
            import readline  # noqa: F401  input() uses it once it is there
        except ImportError:
            pass

    def _read(self) -> str | None:
        """The next message; None at the end."""
        if self.talks:
            try:
                return input("\n> ")
            except EOFError:
                write("\n")
                return None
            except KeyboardInterrupt:
                write("\n")
                note("(Ctrl-D or /exit ends)")
                return ""
            except UnicodeDecodeError as error:
                raise RequestError(
                    f"message: found bytes that are not {error.encoding} at byte {error.start}; allowed: text in the "
                    "encoding of the terminal, which PYTHONIOENCODING or the locale names"
                ) from None
        data = options.stdin_bytes().readline()
        return options.read_text("stdin", data).rstrip("\r\n") if data else None

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.llm.tokenizer.apply_chat_template(messages, enable_thinking=self.thinking)
        if len(prompt) >= self.llm.max_model_len:
            raise RequestError(
                f"conversation: found {len(prompt)} tokens; allowed: below {self.llm.max_model_len}; "
                "/clear starts a new one"
            )
        split = _Split(self.thinking)
        show = None if self.json else _Show(self.talks)
        token_ids: list[int] = []
        finish_reason: str | None = "interrupted"
        started = time.perf_counter()
        first_s = None
        deltas = self.llm.stream({"prompt_token_ids": prompt}, self.params)
        try:
            for delta in deltas:
                first_s = first_s or time.perf_counter() - started
                token_ids += delta.token_ids
                finish_reason = delta.finish_reason
                for is_reasoning, piece in split.push(delta.text, last=finish_reason is not None):
                    if show is not None:
                        show.piece(is_reasoning, piece)
        except KeyboardInterrupt:
            if not self.talks:
                raise
            finish_reason = "interrupted"
        finally:
            close = getattr(deltas, "close", None)
            if close is not None:
                close()
        total_s = time.perf_counter() - started
        if show is not None:
            show.end()
        if self.talks and finish_reason != "stop":
            why = {"length": "cut at the limit of tokens", "interrupted": "stopped"}
            note(f"({why.get(finish_reason or '', finish_reason)})")
        answer = {"role": "assistant", "content": split.content, "reasoning_content": split.reasoning}
        self.messages = [*messages, answer]
        self.turn += 1
        if self.json:
            timing = {
                "time_to_first_token_s": first_s,
                "total_s": total_s,
                "output_tokens_per_s": len(token_ids) / total_s,
            }
            write_json(
                {
                    "turn": self.turn,
                    "user": text,
                    "reasoning": split.reasoning if self.thinking else None,
                    "content": split.content,
                    "finish_reason": finish_reason,
                    "token_ids": token_ids,
                    "num_prompt_tokens": len(prompt),
                    "timing": timing,
                },
                indent=None,
            )


class _Split:
    """Reasoning and answer of a stream: reasoning until `</think>`, which may come in parts."""

    def __init__(self, thinking: bool) -> None:
        self.in_reasoning = thinking
        self.reasoning, self.content = "", ""
        self._held = ""

    def push(self, text: str, last: bool) -> list[tuple[bool, str]]:
        """What is certain now: pairs of whether it is reasoning, and text."""
        pieces: list[tuple[bool, str]] = []
        self._held += text
        if self.in_reasoning:
            before, end, after = self._held.partition(_END)
            if end:
                pieces.append((True, before))
                self.in_reasoning, self._held = False, after
            else:
                keep = 0 if last else _overlap(self._held)
                pieces.append((True, self._held[: len(self._held) - keep]))
                self._held = self._held[len(self._held) - keep :]
        if not self.in_reasoning:
            # The blank line between the two is neither's.
            answer = self._held if self.content else self._held.lstrip("\n")
            pieces.append((False, answer))
            self._held = ""
        for is_reasoning, piece in pieces:
            if is_reasoning:
                self.reasoning += piece
            else:
                self.content += piece
        return [pair for pair in pieces if pair[1]]


def _overlap(text: str) -> int:
    """Length of the longest end of the text that could start `</think>`."""
    return next((n for n in range(min(len(text), len(_END) - 1), 0, -1) if _END.startswith(text[-n:])), 0)


class _Show:
    """An answer on stdout: reasoning dimmed on a terminal, between tags in a pipe."""

    def __init__(self, talks: bool) -> None:
        self.talks = talks
        self.was_reasoning: bool | None = None

    def piece(self, is_reasoning: bool, text: str) -> None:
        if not self.talks and is_reasoning and self.was_reasoning is None:
            write("<think>\n")
        if not is_reasoning and self.was_reasoning:
            write("\n\n" if self.talks else f"\n{_END}\n\n")
        self.was_reasoning = is_reasoning
        write(text, DIM if is_reasoning else "")

    def end(self) -> None:
        if self.was_reasoning and not self.talks:
            write(f"\n{_END}")
        write("\n")
