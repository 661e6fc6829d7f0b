"""Replicas on the machine at hand, or on the Ray cluster that RAY_ADDRESS names: `python examples/replicas.py`.

Streams from two replicas, keeps conversations where they are, and replaces the replicas while an answer is on its way.
Needs Ray: pip install 'qwen35rs[ray]'.
"""

import argparse

from qwen35rs import SamplingParams
from qwen35rs.ray import build_app
from ray import serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, GGUF file or hub name; the embedded model by default")
    parser.add_argument("--num-replicas", type=int, default=2)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    args = parser.parse_args()
    options = vars(args)

    serve.start(proxy_location="Disabled")  # a handle needs no HTTP
    handle = serve.run(build_app(**options), name="qwen", route_prefix=None).options(stream=True)

    for name, question in (("ann", "What is 17 + 25?"), ("bob", "Who are you?"), ("ann", "What is 8 * 7?")):
        messages = [{"role": "user", "content": question}]
        replica = ""
        print(f"{name}: {question}\n  ", end="")
        for delta in handle.chat.remote(messages, conversation_id=name, enable_thinking=False):
            print(delta["text"], end="", flush=True)
            replica = delta["replica_id"]
        print(f"  (replica {replica})")

    # The same name, another option: Serve replaces the replicas one by one, and lets each finish what it has begun.
    stream = handle.generate.remote("Once upon a time", SamplingParams(max_tokens=400, ignore_eos=True))
    first = next(stream)
    serve.run(build_app(**options, max_model_len=4096), name="qwen", route_prefix=None)
    rest = list(stream)
    num_tokens = sum(len(d["token_ids"]) for d in (first, *rest))
    print(
        f"replaced; the answer that was on its way has its {num_tokens} tokens: {rest[-1]['finish_reason']}"
    )

    # A stream that is left early is cancelled, which ends its request; otherwise it would go on to its max_tokens.
    stream = handle.generate.remote("Once upon a time", SamplingParams(max_tokens=4000, ignore_eos=True))
    next(stream)
    stream.cancel()
    serve.shutdown()


if __name__ == "__main__":
    main()
