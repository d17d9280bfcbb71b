"""Names and arguments of the queues, their types, and declaring them on a broker of lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from services.broker.settlement import Queue
from services.broker.topology import (
    CLASSIC,
    MANY_RETURNS,
    QUORUM,
    STREAM,
    TYPE_TRIAL,
    Declarations,
    QueueDeclaration,
    declaration,
    different_argument,
    name_of,
    queue_type_of,
    tells_more_than_the_type,
)
from utils.errors import BrokerError, BrokerRefused

DELAY = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "q", "x-message-ttl": 1500}


def test_the_queues_are_named_after_the_training_queue() -> None:
    queues = (
        Queue.TRAINING,
        Queue.ENDINGS,
        Queue.DEAD,
        Queue.of_kind("llm"),
        Queue.of_kind("toy"),
    )
    assert [name_of("q", queue) for queue in queues] == [
        *("q", "q.endings", "q.dead", "q.llm", "q.toy")
    ]
    assert [str(queue) for queue in queues] == ["training", "endings", "dead", "llm", "toy"]


@pytest.mark.parametrize(
    "name", ["", "a.b", "dead", "endings", "delay", "base", "nowhere", "training", "A", "a/b", "수"]
)
def test_a_kind_has_no_queue_if_its_name_could_mean_another_one(name: str) -> None:
    with pytest.raises(ValueError, match="cannot have a queue"):
        Queue.of_kind(name)


def test_the_training_queue_is_the_backends_and_has_no_arguments() -> None:
    assert declaration("q", Queue.TRAINING) == QueueDeclaration("q", {}, ours=False, as_found=True)
    assert declaration("q", Queue.DEAD) == QueueDeclaration("q.dead", {}, ours=True)
    assert declaration("q", Queue.ENDINGS) == QueueDeclaration("q.endings", {}, ours=True)


def test_a_further_training_queue_is_used_as_it_is_found() -> None:
    llm = declaration("q", Queue.of_kind("llm"))
    assert llm == QueueDeclaration("q.llm", {}, ours=True, as_found=True)
    assert declaration("q", Queue.of_kind("llm"), 1.5) == QueueDeclaration(
        "q.llm.delay.1500", DELAY | {"x-dead-letter-routing-key": "q.llm"}
    )


def test_a_delay_queue_leads_back_and_has_its_delay_in_its_name() -> None:
    assert declaration("q", Queue.TRAINING, 1.5) == QueueDeclaration("q.delay.1500", DELAY)
    endings = declaration("q", Queue.ENDINGS, 60)
    assert endings.name == "q.endings.delay.60000"
    assert endings.arguments["x-dead-letter-routing-key"] == "q.endings"


@pytest.mark.parametrize(
    ("seconds", "milliseconds"), [(0, 1), (0.0001, 1), (0.0011, 2), (2, 2000), (7200.0, 7200000)]
)
def test_a_delay_is_never_shorter_than_asked_for(seconds: float, milliseconds: int) -> None:
    queue = declaration("q", Queue.TRAINING, seconds)
    assert queue.name == f"q.delay.{milliseconds}"
    assert queue.arguments["x-message-ttl"] == milliseconds


# --- types


@pytest.mark.parametrize(
    ("reply", "queue_type"),
    [
        # RabbitMQ 3.10 for a quorum queue, and for one without a type.
        (
            "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': "
            "received 'stream' but current is 'quorum'",
            QUORUM,
        ),
        (
            "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'k' in vhost '/': "
            "received the value 'stream' of type 'longstr' but current is none",
            CLASSIC,
        ),
        (
            "inequivalent arg 'x-queue-type' for queue 'k': received 'stream' but current is "
            "the value 'classic' of type 'longstr'",
            CLASSIC,
        ),
        ("inequivalent arg 'x-max-age' for queue 's' in vhost '/': received '1X'", STREAM),
        ("invalid arg 'x-max-age' for queue 'none' in vhost '/': invalid_max_age", None),
        ("inequivalent arg 'durable' for queue 'q' in vhost '/'", None),
    ],
)
def test_a_queues_type_is_read_from_the_refusal(reply: str, queue_type: str | None) -> None:
    assert queue_type_of(reply) == queue_type


def test_a_refusal_because_of_only_the_type_is_distinguished_from_others() -> None:
    def reply(argument: str) -> str:
        return f"PRECONDITION_FAILED - inequivalent arg '{argument}' for queue 'q' in vhost '/'"

    assert different_argument(reply("x-message-ttl")) == "x-message-ttl"
    assert different_argument("something else") is None
    for argument in ("x-queue-type", "x-overflow", "x-dead-letter-strategy", "x-delivery-limit"):
        assert not tells_more_than_the_type(reply(argument))
    for argument in ("x-message-ttl", "x-dead-letter-routing-key", "x-max-length", "durable"):
        assert tells_more_than_the_type(reply(argument))


def test_own_queues_are_quorum_queues_where_the_training_queue_is_one() -> None:
    dead, delay = declaration("q", Queue.DEAD), declaration("q", Queue.TRAINING, 1.5)
    quorum = {"x-queue-type": "quorum"}
    limited = quorum | {"x-delivery-limit": MANY_RETURNS}
    kept = (
        DELAY | quorum | {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
    )
    assert dead.variants(QUORUM) == (limited, quorum, {})
    assert delay.variants(QUORUM) == (kept, DELAY | quorum, DELAY)
    for queue_type in (CLASSIC, STREAM, None):
        assert dead.variants(queue_type) == ({}, limited, quorum)
        assert delay.variants(queue_type) == (DELAY, kept, DELAY | quorum)


def test_a_conflict_names_the_owner_of_the_queue_and_the_remedy() -> None:
    backends = declaration("q", Queue.TRAINING).conflict("reply")
    assert "q cannot be declared durable, without arguments (reply)" in backends
    ours = declaration("q", Queue.TRAINING, 1.5).conflict("reply")
    assert "q.delay.1500 exists with other arguments" in ours
    assert "1500" in ours and "delete it" in ours and "(reply)" in ours
    assert "(none)" in declaration("q", Queue.DEAD).conflict("reply")


# --- declaring


@dataclasses.dataclass
class Broker:
    """Queues by name, with their arguments; declares as RabbitMQ does.

    Attributes:
        asked: Each declaration: name, passive or durable, arguments.
    """

    queues: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    asked: list[tuple[str, str, Any]] = dataclasses.field(default_factory=list)
    refuses: tuple[int, str] | None = None

    def attempt(self, doing: str, act: Callable[[Any], object]) -> tuple[int, str] | None:
        """Do something on a channel."""
        assert doing
        answers: list[tuple[int, str] | None] = []
        act(
            dataclasses.make_dataclass("Channel", ["queue_declare"])(
                lambda *how, **more: answers.append(self._declare(*how, **more))
            )
        )
        return answers[0]

    def _declare(
        self,
        name: str,
        passive: bool = False,
        durable: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> tuple[int, str] | None:
        self.asked.append((name, "passive" if passive else f"durable={durable}", arguments))
        if self.refuses:
            return self.refuses
        if passive:
            return None if name in self.queues else (404, "NOT_FOUND")
        wanted = arguments or {}
        current = self.queues.setdefault(name, wanted)
        for argument in ("x-queue-type", *sorted(wanted | current)):
            if wanted.get(argument) != current.get(argument):
                got = f"'{current[argument]}'" if argument in current else "none"
                return 406, (
                    f"PRECONDITION_FAILED - inequivalent arg '{argument}' for queue '{name}': "
                    f"received 'x' but current is {got}"
                )
        return None


@pytest.fixture(name="broker")
def _broker() -> Broker:
    return Broker()


@pytest.fixture(name="queues")
def _queues(broker: Broker) -> Declarations:
    return Declarations("q", broker.attempt)


def test_a_training_queue_that_is_there_is_taken_as_it_is(
    broker: Broker, queues: Declarations
) -> None:
    broker.queues["q"] = {"x-max-priority": 3}
    queues.ensure(queues.of(Queue.TRAINING))
    assert broker.asked == [("q", "passive", None)]


def test_a_training_queue_that_is_missing_is_declared_as_the_backend_does(
    broker: Broker, queues: Declarations
) -> None:
    queues.ensure(queues.of(Queue.TRAINING))
    assert broker.asked == [("q", "passive", None), ("q", "durable=True", None)]


def test_a_training_queue_that_cannot_be_declared_ends_the_worker(
    broker: Broker, queues: Declarations
) -> None:
    broker.refuses = (406, "no")
    with pytest.raises(BrokerRefused, match="q cannot be declared"):
        queues.ensure(queues.of(Queue.TRAINING))
    assert broker.asked == [("q", "passive", None)], "it exists: nothing is gained by declaring it"


def test_a_new_connection_first_has_the_training_queue_there_and_then_learns_its_type(
    broker: Broker, queues: Declarations
) -> None:
    queues.begin()
    assert broker.asked == [
        ("q", "passive", None),
        ("q", "durable=True", None),
        ("q", "durable=True", TYPE_TRIAL),
    ]


def test_a_broker_that_does_not_report_the_type_gets_queues_without_one(
    broker: Broker, queues: Declarations
) -> None:
    broker.queues["q"] = TYPE_TRIAL  # the trial is not refused
    queues.begin()
    queues.ensure(queues.of(Queue.DEAD))
    assert broker.asked[-1] == ("q.dead", "durable=True", None)


@pytest.mark.parametrize("queue_type", [CLASSIC, QUORUM])
def test_new_queues_of_the_worker_have_the_training_queues_type(
    broker: Broker, queues: Declarations, queue_type: str
) -> None:
    broker.queues["q"] = {"x-queue-type": "quorum"} if queue_type == QUORUM else {}
    queues.begin()
    assert broker.asked[-1] == ("q", "durable=True", TYPE_TRIAL)
    for queue in (queues.of(Queue.DEAD), queues.of(Queue.TRAINING, 1.5)):
        queues.ensure(queue)
        assert broker.queues[queue.name] == queue.variants(queue_type)[0]
    assert broker.queues["q.dead"].get("x-queue-type", CLASSIC) == queue_type


@pytest.mark.parametrize("queue_type", [CLASSIC, QUORUM])
def test_a_missing_queue_of_a_kind_is_made_of_the_backends_queues_type(
    broker: Broker, queues: Declarations, queue_type: str
) -> None:
    broker.queues["q"] = {"x-queue-type": "quorum"} if queue_type == QUORUM else {}
    queues.begin()
    llm = queues.of(Queue.of_kind("llm"))
    queues.ensure(llm)
    assert broker.queues["q.llm"] == llm.variants(queue_type)[0]


def test_an_existing_queue_of_a_kind_may_have_any_arguments(
    broker: Broker, queues: Declarations
) -> None:
    broker.queues = {"q": {}, "q.llm": {"x-max-priority": 3}}
    queues.begin()
    queues.ensure(queues.of(Queue.of_kind("llm")))
    assert broker.asked[-1] == ("q.llm", "passive", None)


@pytest.mark.parametrize("training", [{}, {"x-queue-type": "quorum"}])
@pytest.mark.parametrize("own", [0, 1, 2])
@pytest.mark.parametrize("delay", [None, 1.5])
def test_an_own_queue_that_differs_only_in_its_type_is_used_as_it_is(
    broker: Broker, queues: Declarations, training: dict[str, Any], own: int, delay: float | None
) -> None:
    queue = queues.of(Queue.DEAD if delay is None else Queue.TRAINING, delay)
    there = broker.queues[queue.name] = queue.variants(QUORUM)[own]
    broker.queues["q"] = training
    queues.begin()
    queues.ensure(queue)
    assert broker.queues[queue.name] == there


@pytest.mark.parametrize("training", [{}, {"x-queue-type": "quorum"}])
@pytest.mark.parametrize("own", [{}, {"x-queue-type": "quorum"}])
@pytest.mark.parametrize("other", [{"x-message-ttl": 9}, {"x-dead-letter-routing-key": "else"}])
def test_an_own_queue_with_another_delay_or_target_ends_the_worker(
    broker: Broker,
    queues: Declarations,
    training: dict[str, Any],
    own: dict[str, Any],
    other: dict[str, Any],
) -> None:
    queue = queues.of(Queue.TRAINING, 1.5)
    broker.queues = {"q": training, queue.name: DELAY | own | other}
    queues.begin()
    with pytest.raises(BrokerRefused, match="q.delay.1500 exists with other") as caught:
        queues.ensure(queue)
    assert f"inequivalent arg '{next(iter(other))}'" in str(caught.value)


def test_a_refusal_for_another_reason_is_not_a_conflict(
    broker: Broker, queues: Declarations
) -> None:
    broker.refuses = (404, "gone")
    with pytest.raises(BrokerError, match="declaring q.dead") as caught:
        queues.ensure(queues.of(Queue.DEAD))
    assert not isinstance(caught.value, BrokerRefused)


def test_a_queue_is_declared_once_unless_it_may_be_gone(
    broker: Broker, queues: Declarations
) -> None:
    dead = queues.of(Queue.DEAD)
    queues.ensure(dead)
    queues.ensure(dead)
    assert len(broker.asked) == 1
    queues.ensure(dead, again=True)
    assert len(broker.asked) == 2
    queues.forget(dead)
    queues.ensure(dead)
    assert len(broker.asked) == 3
    queues.forget(queues.of(Queue.ENDINGS))
    queues.ensure(dead)
    assert len(broker.asked) == 3
