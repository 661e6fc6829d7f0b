"""Which replica of `qwen35rs.ray` a request goes to."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

LOAD_FACTOR = 1.25
LOAD_SLACK = 8
"""A replica with `LOAD_FACTOR` times the mean load and `LOAD_SLACK` requests gets no conversation that can go elsewhere:
the slack because few requests more in a batch cost less than a prompt that is computed again."""


class ConversationRouter(RequestRouter):  # type: ignore[misc]
    """Which replica a request goes to; Serve asks it in every process that has a handle.

    Rendezvous hashing: a conversation goes to the first of the replicas in an order of its own, so that all handles agree
    without a table, and a replica that comes or goes moves its share of the conversations and no others (Thaler and
    Ravishankar, 1998). Those with too much of the load are passed over (consistent hashing with bounded loads, Mirrokni,
    Thorup and Zadimoghaddam, 2016), and so are those that are full. What belongs to no conversation goes to the less loaded
    of two replicas.
    """

    def initialize_state(self, **options: Any) -> None:
        """Serve calls it once, before the first request."""
        super().initialize_state(**options)
        self._sent: Counter[ReplicaID] = Counter()
        self._lock = threading.Lock()  # what ends a request may be another thread than the router's

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Counts a request as the replica's load until `on_request_completed`."""
        super().on_send_request(replica_id)
        with self._lock:
            self._sent[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Ends what `on_send_request` counted. Serve calls it for requests that could not be sent too."""
        super().on_request_completed(replica_id, internal_request_id)
        with self._lock:
            self._sent[replica_id] -= 1
            if self._sent[replica_id] <= 0:
                del self._sent[replica_id]

    def _load(self, replica_id: ReplicaID) -> int:
        """Requests under way: those that this process has sent, or what the replica itself has told.

        Its number has other processes' requests too, but is older: of a burst that is still on its way to a busy replica
        it has next to nothing.
        """
        return max(self._sent[replica_id], self.replica_queue_len_cache.get(replica_id) or 0)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which they are to be tried; of those in one list the least loaded is taken."""
        if pending_request is not None:
            # When all are full, Serve waits a little before it asks again.
            pending_request.routing_context.should_backoff = True
        # Requests that were given a replica before are sent meanwhile, and count: otherwise a burst would see no load.
        await asyncio.sleep(0)
        key = None if pending_request is None else conversation_of(pending_request)
        if key is None:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        replicas = {r.replica_id.unique_id: r for r in candidate_replicas}
        loads = {name: self._load(r.replica_id) for name, r in replicas.items()}
        return [[replicas[name]] for name in ranked(key, loads)]


def conversation_of(request: PendingRequest) -> str | None:
    """What identifies a request's conversation: its ``conversation_id``, or of a chat the messages up to the user's first."""
    given = request.kwargs.get("conversation_id")
    if isinstance(given, str) and given:
        return f"id {given}"
    messages = request.kwargs.get("messages", request.args[0] if request.args else None)
    if request.metadata.call_method != "chat" or not isinstance(messages, (list, tuple)):
        return None
    opening = []
    for message in messages:
        opening.append(message)
        if isinstance(message, Mapping) and message.get("role") == "user":
            break
    try:
        return f"messages {opening!r}"
    except Exception:  # noqa: BLE001  messages of any kind: the replica says what is wrong with them
        return None


def ranked(key: str, loads: Mapping[str, int]) -> list[str]:
    """The replicas in the order in which a conversation tries them, those with too much of the load last.

    Args:
        key: the conversation.
        loads: requests under way, by replica.
    """

    def weight(replica: str) -> bytes:
        # The length tells where one ends and the other begins.
        return hashlib.blake2b(
            f"{len(replica)} {replica} {key}".encode("utf-8", "replace"), digest_size=16
        ).digest()

    order = sorted(loads, key=weight, reverse=True)
    mean = (sum(loads.values()) + 1) / max(1, len(loads))
    most = math.ceil(LOAD_FACTOR * mean) + LOAD_SLACK
    return sorted(order, key=lambda replica: loads[replica] >= most)
