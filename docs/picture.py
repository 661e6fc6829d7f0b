"""Draws docs/chat.svg, a conversation with the embedded model: python docs/picture.py"""

from pathlib import Path

from qwen35rs import LLM, hub
from rich.console import Console
from rich.text import Text

QUESTIONS = (
    "Hello",
    "What is 17 + 25?",
    "Sort these words alphabetically: river garden bread",
    "What is 12 * 34?",
)


def main() -> None:
    llm, messages = LLM(hub.EMBEDDED), []
    screen = Console(record=True, width=96, file=open("/dev/null", "w"))  # noqa: SIM115
    screen.print(Text("$ qwen35rs chat", style="bold"))
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        text = llm.chat(messages)[0].outputs[0].text
        reasoning, _, answer = text.partition("</think>")
        messages.append(
            {"role": "assistant", "content": answer.strip(), "reasoning_content": reasoning.strip()}
        )
        screen.print(Text(f"\n> {question}"))
        screen.print(Text(reasoning.strip(), style="dim"))
        screen.print(Text(f"\n{answer.strip()}"))
    screen.save_svg(str(Path(__file__).with_name("chat.svg")), title="qwen35rs", unique_id="chat")


if __name__ == "__main__":
    main()
