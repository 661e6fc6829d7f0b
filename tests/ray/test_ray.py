"""Replicas of the embedded model on a local Ray cluster: answers, streams, conversations, failures, updates."""

import asyncio
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from qwen35rs import LLM, Delta, Logprob, Qwen35Error, RankError, RequestError, SamplingParams

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of Ray's import
    import ray
    from qwen35rs import ray as replicas
    from qwen35rs.ray import build_app
    from qwen35rs.ray_router import ranked
    from ray import serve

GREEDY = SamplingParams(temperature=0, max_tokens=40)
LONG = SamplingParams(max_tokens=8000, ignore_eos=True, seed=5)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def llm():
    return LLM()


@pytest.fixture(scope="module")
def handle(cluster):
    return deploy("two", num_replicas=2)


def deploy(name, **options):
    app = build_app(**{"device": "cpu", **options})
    return serve.run(app, name=name, route_prefix=None).options(stream=True)


def user(text):
    return [{"role": "user", "content": text}]


def joined(deltas):
    """Of a stream with one sample: its text, tokens, end, and the replicas that it came from."""
    deltas = list(deltas)
    assert [d["finish_reason"] for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    (replica_id,) = {d["replica_id"] for d in deltas}
    tokens = [t for d in deltas for t in d["token_ids"]]
    return "".join(d["text"] for d in deltas), tokens, deltas[-1]["finish_reason"], replica_id


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def actor_of(replica_id):
    (name,) = (
        a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].endswith(f"#{replica_id}")
    )
    return ray.get_actor(**name)


# ------------------------------------------------------------------------------------- answers and streams


def test_answers_are_those_of_an_llm(handle, llm):
    for text in ("What is 17 + 25?", "Who are you?", "What is 8 * 7?"):
        (want,) = llm.chat(user(text), GREEDY, enable_thinking=False)
        got = joined(handle.chat.remote(user(text), GREEDY, enable_thinking=False))
        assert got[:3] == (want.text, want.token_ids, want.finish_reason)
    params = SamplingParams(seed=11, n=3, logprobs=2, max_tokens=12)
    want = llm.generate("Once upon a time", params)[0].outputs
    deltas = list(handle.generate.remote("Once upon a time", params))
    for sample in want:
        of_it = [d for d in deltas if d["index"] == sample.index]
        assert [t for d in of_it for t in d["token_ids"]] == sample.token_ids
        logprobs = [x for d in of_it for x in d["logprobs"]]
        assert [sorted(x) for x in logprobs] == [sorted(x) for x in sample.logprobs]
        assert logprobs[0] == {i: vars(p) for i, p in sample.logprobs[0].items()}


def test_a_stream_arrives_in_pieces(handle):
    params = SamplingParams(max_tokens=600, ignore_eos=True, seed=1)
    start = time.perf_counter()
    stream = iter(handle.generate.remote("a", params))
    first = next(stream)
    at_first = time.perf_counter() - start
    rest = list(stream)
    assert first["finish_reason"] is None and rest[-1]["finish_reason"] == "length"
    assert sum(len(d["token_ids"]) for d in (first, *rest)) == 600
    assert len(rest) > 10 and at_first < (time.perf_counter() - start) / 2


def test_what_came_together_is_joined():
    logprob = [{4: Logprob(-0.5, 1, "x")}]
    deltas = [
        Delta("a", [1], 0, None, None),
        Delta("x", [4], 1, None, logprob),
        Delta("b", [2], 0, "stop", None),
        Delta("y", [4], 1, None, logprob),
    ]
    assert replicas._joined(deltas) == [
        Delta("ab", [1, 2], 0, "stop", None),
        Delta("xy", [4, 4], 1, None, logprob * 2),
    ]
    assert replicas._joined([]) == []


def test_many_at_once(handle, llm):
    texts = [f"What is {i} + {2 * i}?" for i in range(24)]
    streams = [handle.chat.remote(user(t), GREEDY, enable_thinking=False) for t in texts]
    got = [joined(s) for s in streams]
    want = llm.chat([user(t) for t in texts], GREEDY, enable_thinking=False)
    assert [(text, tokens) for text, tokens, _, _ in got] == [(w.text, w.token_ids) for w in want]
    assert len({replica_id for *_, replica_id in got}) == 2


# ------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize("named", [True, False])
def test_a_conversation_stays_with_its_replica(handle, named):
    seen = {}
    conversations = {f"c{i}": user(f"What is {i} + {i}?") for i in range(20)}
    short = SamplingParams(temperature=0, max_tokens=6)
    for _ in range(3):
        streams = {}
        for name, messages in conversations.items():
            about = {"conversation_id": name} if named else {}
            streams[name] = handle.chat.remote(messages, short, enable_thinking=False, **about)
            text, _, _, replica_id = joined(streams[name])
            seen.setdefault(name, set()).add(replica_id)
            conversations[name] = [*messages, {"role": "assistant", "content": text}, *user("And doubled?")]
    assert {name: len(ids) for name, ids in seen.items()} == dict.fromkeys(conversations, 1)
    assert len(set.union(*seen.values())) == 2


def test_a_busy_conversation_does_not_fill_one_replica(handle):
    # 30 at once of one conversation: fewer than a replica takes, but too much of the load.
    streams = [handle.generate.remote("a", LONG, conversation_id="busy") for _ in range(30)]
    ids = [next(s)["replica_id"] for s in streams]
    for stream in streams:
        stream.cancel()
    assert len(set(ids)) == 2


def test_ranked():
    names = [f"r{i}" for i in range(5)]
    idle = dict.fromkeys(names, 0)
    keys = [f"k{i}" for i in range(1000)]
    first = {k: ranked(k, idle)[0] for k in keys}
    counts = [list(first.values()).count(n) for n in names]
    assert all(140 <= n <= 260 for n in counts)  # 200 expected, standard deviation 12.6
    for k in keys:
        assert sorted(ranked(k, idle)) == names
        # One that goes takes only its own conversations along; they go where they would have gone next.
        left = {n: 0 for n in names if n != "r2"}
        order = [n for n in ranked(k, idle) if n != "r2"]
        assert ranked(k, left) == order
    # A mean of 10 with this request, so at most 13 + 8: one with 21 is last, one with 20 is not.
    key = next(k for k in keys if first[k] == "r0")
    loads = {"r0": 21, "r1": 7, "r2": 7, "r3": 7, "r4": 7}
    assert ranked(key, loads)[-1] == "r0"
    assert ranked(key, {**loads, "r0": 20, "r1": 8})[0] == "r0"
    assert ranked(key, {}) == []


# ------------------------------------------------------------------------------------------------- refusals


def test_bad_requests_are_refused_as_by_an_llm(handle, llm):
    cases = [
        ("generate", "stream", ([],), {}),
        ("generate", "stream", ({"prompt": "a", "text": "b"},), {}),
        ("generate", "stream", ("a", "greedy"), {}),
        ("generate", "stream", ("a " * 9000,), {}),
        ("chat", "stream_chat", ("hello",), {}),
        ("chat", "stream_chat", ([],), {}),
        ("chat", "stream_chat", (user("a"),), {"chat_template_kwargs": {"tools": []}}),
    ]
    for ours, theirs, args, options in cases:
        with pytest.raises(RequestError) as want:
            getattr(llm, theirs)(*args, **options)
        with pytest.raises(RequestError) as got:
            list(getattr(handle, ours).remote(*args, **options))
        assert str(got.value.cause) == str(want.value)
    with pytest.raises(RequestError, match="conversation_id: found 7; allowed: text, or None"):
        list(handle.chat.remote(user("a"), conversation_id=7))
    with pytest.raises(TypeError, match="thinking"):
        list(handle.chat.remote(user("a"), thinking=True))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_replicas": 0}, "num_replicas: found 0; allowed: at least 1"),
        ({"num_replicas": True}, "num_replicas: found True; allowed: at least 1"),
        ({"max_num_seqs": 0}, "max_num_seqs: found 0; allowed: at least 1"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size: found 0; allowed: at least 1"),
        ({"device": "cuda:1"}, "device: found 'cuda:1'; allowed: auto, cpu, cuda"),
        ({"device": "cpu", "gpus_per_replica": 1}, "gpus_per_replica: found 1; allowed: 0$"),
        (
            {"device": "cuda", "gpus_per_replica": 0},
            "gpus_per_replica: found 0; allowed: 1, or a share of one GPU",
        ),
        (
            {"device": "cuda", "gpus_per_replica": 1.5},
            "gpus_per_replica: found 1.5; allowed: 1, or a share of one GPU",
        ),
        (
            {"device": "cuda", "gpus_per_replica": 0.5, "tensor_parallel_size": 2},
            "gpus_per_replica: found 0.5; allowed: 2$",
        ),
        (
            {"deployment_config": {"ray_actor_options": {"num_gpus": 2}}},
            "ray_actor_options: found num_gpus = 2; allowed: gpus_per_replica",
        ),
    ],
)
def test_bad_arguments_are_refused(options, error):
    with pytest.raises(RequestError, match=error):
        build_app(**options)


def test_replicas_that_serve_counts():
    scaled = build_app(device="cpu", deployment_config={"autoscaling_config": {"max_replicas": 3}})
    config = scaled._bound_deployment._deployment_config
    assert config.autoscaling_config.max_replicas == 3 and config.max_ongoing_requests == 32


@pytest.mark.parametrize(("options", "count"), [({}, 1), ({"num_replicas": 3}, 3)])
def test_replicas_that_the_deployment_counts(options, count):
    config = build_app(device="cpu", deployment_config=options)._bound_deployment._deployment_config
    assert config.num_replicas == count


def test_an_argument_that_an_llm_does_not_have():
    with pytest.raises(TypeError, match="max_tokens"):
        build_app(max_tokens=3)


@pytest.mark.parametrize(
    ("options", "gpus", "device"),
    [
        ({"device": "cpu", "tensor_parallel_size": 2}, 0, "cpu"),
        ({"device": "auto"}, 0, "cpu"),  # what the environment of these tests says
        ({"device": "cuda"}, 1, "cuda"),
        ({"device": "cuda", "tensor_parallel_size": 4}, 4, "cuda"),
        ({"device": "cuda", "gpus_per_replica": 0.5}, 0.5, "cuda"),
    ],
)
def test_what_a_replica_holds(options, gpus, device):
    deployment = build_app(**options)._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == gpus
    assert deployment.init_args[1]["device"] == device


def test_where_nothing_says_the_device(monkeypatch):
    # This cluster has no GPU.
    monkeypatch.delenv("QWEN35RS_DEVICE")
    assert build_app()._bound_deployment.init_args[1]["device"] == "cpu"


def test_a_model_that_cannot_be_loaded(tmp_path):
    with pytest.raises(RuntimeError, match="none"):
        deploy("none", model=tmp_path, deployment_config={"max_constructor_retry_count": 1})
    with pytest.raises((Qwen35Error, OSError)) as want:
        LLM(tmp_path)
    (deployment,) = serve.status().applications["none"].deployments.values()
    assert f"{type(want.value).__name__}: {want.value}" in deployment.message
    serve.delete("none")


# ------------------------------------------------------------------------------- ends, failures, updates


class Ended:
    """In place of an LLM whose engine's thread has ended."""

    @property
    def memory(self):
        raise RankError("rank 1: lost")


@pytest.fixture(scope="module")
def one(cluster):
    """One replica with one seat in its engine, whose engine can be made to end."""

    class Mortal(replicas.LLMReplica):
        async def end(self):
            self._llm = Ended()
            yield self._replica_id

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "LLMReplica", Mortal)
        return deploy("one", max_num_seqs=1, deployment_config={"max_ongoing_requests": 4})


def test_a_stream_that_is_cancelled_frees_its_seat(one):
    # With one seat, whoever comes next waits in the engine for the one before.
    short = SamplingParams(max_tokens=2, ignore_eos=True)
    stream = one.generate.remote("a", LONG)
    for _ in range(20):
        next(stream)
    other = one.generate.remote("a", short)
    answered = threading.Event()
    threading.Thread(target=lambda: (next(other), answered.set()), daemon=True).start()
    assert not answered.wait(1.5)
    stream.cancel()
    assert answered.wait(3)
    # The same before its first token.
    stream = one.generate.remote([1] * 4000, LONG)
    time.sleep(0.2)
    stream.cancel()
    start = time.perf_counter()
    assert len(joined(one.generate.remote("a", short))[1]) == 2
    assert time.perf_counter() - start < 3


def test_a_replica_whose_engine_has_ended_is_replaced(one):
    (gone,) = one.end.remote()

    def replaced():
        try:
            return joined(one.generate.remote("a", SamplingParams(max_tokens=1)))[3] != gone
        except (AttributeError, ray.exceptions.RayActorError):  # `Ended` does not generate
            return False

    until(replaced)


def test_the_check_of_an_engine_that_has_ended(monkeypatch):
    # An engine that ends by itself: of two processes that are its ranks, the other is killed.
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1] - 1  # ranks take the one after it
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    code = "from qwen35rs import LLM; LLM(device='cpu', tensor_parallel_size=2)"
    other = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **ranks, "RANK": "1", "LOCAL_RANK": "1"}
    )
    for name, value in {**ranks, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    replica = object.__new__(replicas.LLMReplica)
    replica._llm = LLM(device="cpu", tensor_parallel_size=2)
    asyncio.run(replica.check_health())
    other.kill()
    other.wait()
    with pytest.raises(RankError):
        replica._llm.generate("a", LONG)
    with pytest.raises(RankError, match="rank 1 has ended"):
        asyncio.run(replica.check_health())


def test_replicas_are_no_ranks_of_what_started_ray(llm, monkeypatch):
    # As `srun -N2 ray start` and torchrun leave it for every actor; the program itself may be such a process, too.
    started = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
    }
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    actor = {"num_cpus": 1, "runtime_env": {"env_vars": started}}
    shared = deploy("shared", tensor_parallel_size=2, deployment_config={"ray_actor_options": actor})
    text = "What is 17 + 25?"
    (want,) = llm.chat(user(text), GREEDY, enable_thinking=False)
    assert joined(shared.chat.remote(user(text), GREEDY, enable_thinking=False))[0] == want.text
    serve.delete("shared")


def test_a_killed_replica_is_replaced(handle):
    streams = {}
    for i in range(20):
        stream = handle.generate.remote("a", LONG, conversation_id=f"k{i}")
        replica_id = next(stream)["replica_id"]
        if replica_id in streams:
            stream.cancel()
        streams.setdefault(replica_id, stream)
        if len(streams) == 2:
            break
    (dead, cut), (alive, other) = streams.items()
    ray.kill(actor_of(dead))
    with pytest.raises(ray.exceptions.RayActorError):
        list(cut)
    # What is asked meanwhile is answered, at first by the other one.
    short = SamplingParams(max_tokens=2, ignore_eos=True)
    assert joined(handle.generate.remote("a", short))[3] == alive
    assert next(other)["replica_id"] == alive
    other.cancel()
    seen = set()

    def replaced():
        seen.add(joined(handle.generate.remote("a", short))[3])
        return len(seen) == 2

    until(replaced)
    assert dead not in seen


def test_an_update_loses_no_request(handle, llm):
    short = SamplingParams(max_tokens=4, ignore_eos=True)
    before = {joined(handle.generate.remote("a", short, conversation_id=f"u{i}"))[3] for i in range(20)}
    long = [
        handle.generate.remote("a", SamplingParams(max_tokens=800, ignore_eos=True, seed=i)) for i in range(4)
    ]
    firsts = [next(s) for s in long]
    ended, answers, errors = threading.Event(), [], []

    def ask():
        while not ended.is_set():
            try:
                answers.append(joined(handle.generate.remote("a", short)))
            except Exception as error:  # noqa: BLE001  which one is the test's report
                errors.append(error)

    askers = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for asker in askers:
        asker.start()
    deploy("two", num_replicas=2, max_model_len=2048, tensor_parallel_size=2)
    ended.set()
    for asker in askers:
        asker.join(30)
    assert not any(asker.is_alive() for asker in askers)
    assert errors == [] and len(answers) > 3
    assert all(len(tokens) == 4 and finish == "length" for _, tokens, finish, _ in answers)
    for first, stream in zip(firsts, long, strict=True):
        assert len(first["token_ids"]) + sum(len(d["token_ids"]) for d in stream) == 800
    after = {joined(handle.generate.remote("a", short, conversation_id=f"u{i}"))[3] for i in range(20)}
    assert len(before) == len(after) == 2 and not before & after
    with pytest.raises(RequestError, match="2048"):
        list(handle.generate.remote([1] * 3000))
    # And two ranks, threads on the CPU, say what one did.
    (want,) = llm.chat(user("What is 17 + 25?"), GREEDY, enable_thinking=False)
    got = joined(handle.chat.remote(user("What is 17 + 25?"), GREEDY, enable_thinking=False))
    assert got[1] == want.token_ids


def test_the_example(capsys, monkeypatch):
    # Last: it ends Serve.
    example = Path(__file__).resolve().parent.parent.parent / "examples" / "replicas.py"
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    assert "17 + 25 = 42  (replica " in said and "8 * 7 = 56  (replica " in said
    assert "has its 400 tokens: length" in said
