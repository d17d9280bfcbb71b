"""The connection to RabbitMQ: deliveries in, publications out, acknowledgements.

The only importer of pika. One thread of its own owns the connection and does nothing else, so
heartbeats go on through a job of any length. Handlers work in other threads and never touch it
(see `services.broker.lane`); `services.broker.connection` is the owner's life around what is here.

    connect ─▶ declare ─▶ turn: events, settlements, publications, lost channels ─▶ turn …
       ▲                                      │ connection lost
       └─── jittered back-off, for ever ◀─────┘

A connection, channel or consumer that goes away stops no job. The owner reconnects at once, so that
what the job wants published can be published, but subscribes again only when the job in hand has
ended: until then the broker may hand the message to another worker, who finds the job's record. A
tag of a channel that is gone is never acknowledged.

Stop order: cancel the consumers; wait for the handlers, who obey the same stop; make their
publications; acknowledge or return; close, which gives back whatever is left.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import random
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pika
import pika.data
from pika import exceptions
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException

from config import Settings
from consumer.pages.observer import Observer
from services.broker.answer_limit import AnswerLimit
from services.broker.connection import BrokerLoop
from services.broker.declarations import NOT_FOUND, PRECONDITION_FAILED, Declarations
from services.broker.header_values import tolerant
from services.broker.lane import Handler, InHand, Lane
from services.broker.outbox import Outbox
from services.broker.settlement import Action, Delivery, Publication, Queue
from utils.errors import BrokerError, BrokerRefused, PublicationRefused, Refusal
from utils.logger import get_logger

log = get_logger(__name__)

TURN_SECONDS = 0.25
CONNECT_SECONDS = 10.0
BLOCKED_SECONDS = 120.0  # a broker out of memory or disk stops reading; then try another
ANSWER_SECONDS = 30.0  # the longest wait for a confirm or any other answer of the broker
NO_ROUTE = 312  # AMQP's code for a message that no queue takes
REFUSED_FORM = frozenset({311, 406, 501, 502, 505})  # AMQP's codes for a message's size and frames


class AnswerOverdue(exceptions.AMQPConnectionError):
    """The broker has left a request without an answer, and the connection was ended."""


# Rows are tried from the top: pika's class, what its text must say, ours, and a sentence of ours.
ERRORS: tuple[tuple[type[Exception], str, type[BrokerError], str], ...] = (
    (
        exceptions.ProbableAuthenticationError,
        # Without the broker's own word it may as well have been restarted during the handshake.
        r"\(403\)",
        BrokerRefused,
        "RabbitMQ refuses the login of user {user!r}: check RABBITMQ_USER and RABBITMQ_PASS",
    ),
    (exceptions.AuthenticationError, "", BrokerRefused, "RabbitMQ offers no login by password"),
    (
        exceptions.ProbableAccessDeniedError,
        r"\((?:403|530)\)(?!.*limit)",
        BrokerRefused,
        "RabbitMQ refuses the virtual host {vhost!r} to user {user!r}: check RABBITMQ_VHOST and "
        "the user's permissions",
    ),
    (
        exceptions.ChannelClosedByBroker,
        r"\(403\).*refused for user",
        BrokerRefused,
        "RabbitMQ user {user!r} lacks a permission for {doing}: it needs configure, write and read "
        "on '^{queue}', and write on the default exchange",
    ),
    (exceptions.AMQPError, "", BrokerError, "RabbitMQ failed while {doing}"),
    (exceptions.ChannelError, "", BrokerError, "RabbitMQ failed while {doing}"),
    (exceptions.ReentrancyError, "", BrokerError, "The AMQP client failed while {doing}"),
    (AMQPConnectorException, "", BrokerError, "RabbitMQ could not be reached"),
    (OSError, "", BrokerError, "RabbitMQ could not be reached"),
    # How pika says that a connection was reset between its opening and its first use.
    (ValueError, "Expected connected socket", BrokerError, "RabbitMQ could not be reached"),
    # pika states what it expects of the broker as assertions.
    (AssertionError, "", BrokerError, "The AMQP client failed while {doing}"),
)


class TrainingConsumer(BrokerLoop):
    """Takes messages one at a time, and carries out what their handlers decide.

    Args:
        settings: Hosts, credentials, heartbeat, queue.
        handle: Handles a training message, in a thread of its own; obeys `stop` by itself.
        handle_ending: Handles a message of the endings' queue, also while a job is trained; None to
            leave that queue.
        stop: Set by whoever wants the worker to stop.
        stop_seconds: How long `run` may take after that; `SHUTDOWN_GRACE_SECONDS` if None.
        observer: Is told of connections, deliveries and the queues' lengths.
        once_idle: Take one training message and stop, or stop after so many seconds without one.
        answer_seconds: How long the broker may take for a confirm or any other answer.
        outbox: Where others than the handlers put publications; one of its own if None.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        handle: Handler,
        handle_ending: Handler | None = None,
        stop: threading.Event,
        stop_seconds: float | None = None,
        observer: Observer | None = None,
        once_idle: float | None = None,
        answer_seconds: float = ANSWER_SECONDS,
        outbox: Outbox | None = None,
    ) -> None:
        observer = observer or Observer()
        lane = functools.partial(Lane, wake=self._wake, observer=observer)
        delays, limit = settings.retry_delays_seconds, math.inf if once_idle is None else 1
        lanes = [lane(Queue.TRAINING, handle, limit=limit, crash_delays=delays)]
        if handle_ending:
            delays = settings.ending_retry_delays_seconds
            lanes.append(lane(Queue.ENDINGS, handle_ending, crash_delays=delays))
        stop_seconds = stop_seconds or settings.shutdown_grace_seconds
        super().__init__(lanes, stop, stop_seconds, observer, once_idle, outbox)
        self._settings = settings
        self._connection: pika.BlockingConnection | None = None
        self._outgoing: BlockingChannel | None = None
        self._looking: BlockingChannel | None = None
        self._answer_seconds = answer_seconds
        self._answered: AnswerLimit | None = None
        self._queues = Declarations(settings.training_queue, self._attempt)
        # All that pika tells is raised too, and logged here once, without its stack traces.
        logging.getLogger("pika").setLevel(logging.CRITICAL)

    def _connect(self) -> None:
        self._connection = connect(self._settings)
        self._answered = AnswerLimit(self._connection, self._answer_seconds, AnswerOverdue)
        self.connected = True
        self._queues = Declarations(self._settings.training_queue, self._attempt)
        self._queues.begin()
        for queue in Queue:
            self._queues.ensure(self._queues.of(queue))
        for delay in self._settings.retry_delays_seconds:
            self._queues.ensure(self._queues.of(Queue.TRAINING, delay))
        log.info("broker_connected", queue=self._settings.training_queue)

    def _disconnect(self) -> None:
        self.connected = self.consuming = False
        connection, self._connection = self._connection, None
        self._outgoing = self._looking = None
        for lane in self._lanes:
            lane.channel = None
        if connection is not None and connection.is_open:
            with contextlib.suppress(BrokerError), self._errors("closing the connection"):
                connection.close()
        self._answered = None

    def _is_connected(self) -> bool:
        return self._connection is not None and self._connection.is_open

    def _process_events(self) -> None:
        with self._errors("waiting for messages"):
            self._open_connection().process_data_events(time_limit=TURN_SECONDS)

    def _publish(self, publication: Publication) -> None:
        target = self._queues.of(publication.queue, publication.delay_seconds)
        if publication.delay_seconds is not None:
            # What leaves a delay queue for a queue that is not there is dropped without a word.
            self._queues.ensure(self._queues.of(publication.queue), again=True)
        self._queues.ensure(target)
        try:
            self._publish_to(target.name, publication.body, properties_of(publication))
        except PublicationRefused:
            self._queues.forget(target)  # perhaps somebody deleted it
            raise

    def _probe(self) -> None:
        name = f"{self._settings.training_queue}.nowhere"
        try:
            self._publish_to(name, b"", pika.BasicProperties())
        except PublicationRefused as error:
            if error.refusal is not Refusal.ROUTE:
                raise BrokerError(f"RabbitMQ takes no message at all: {error}") from error

    def _publish_to(self, name: str, body: bytes, properties: pika.BasicProperties) -> None:
        doing = f"publishing to {name}"
        with self._errors(doing):
            if self._outgoing is None or not self._outgoing.is_open:
                self._outgoing = self._open_connection().channel()
                self._outgoing.confirm_delivery()
        try:
            with self._errors(doing):
                self._outgoing.basic_publish("", name, body, properties, mandatory=True)
        except BrokerRefused:
            raise
        except Exception as error:
            # pika encodes a message before it sends any of it.
            refusal = refusal_by(error.__cause__ if isinstance(error, BrokerError) else error)
            raise PublicationRefused(str(error), refusal) from error

    def _answer(self, hand: InHand, action: Action) -> None:
        with self._errors("settling a delivery"):
            match action:
                case Action.ACK:
                    hand.channel.basic_ack(hand.tag)
                case Action.REQUEUE:
                    hand.channel.basic_reject(hand.tag, requeue=True)

    def _look_at_queues(self) -> None:
        for queue in Queue:
            name = self._queues.of(queue).name
            with self._errors(f"looking at {name}"):
                if self._looking is None or not self._looking.is_open:
                    self._looking = self._open_connection().channel()
                try:
                    found = self._looking.queue_declare(name, passive=True).method
                except exceptions.ChannelClosedByBroker:
                    continue  # it is gone: whoever needs it next declares it
                self._observer.looked(queue, found.message_count, found.consumer_count)

    def _subscribe(self, lane: Lane) -> None:
        source = self._queues.of(lane.queue)
        self._queues.ensure(source, again=True)  # the consumer may be gone because the queue is
        with self._errors(f"subscribing to {source.name}"):
            if lane.channel is not None and lane.channel.is_open:
                lane.channel.close()
            lane.channel = self._open_connection().channel()
            lane.channel.basic_qos(prefetch_count=1)
            lane.channel.basic_consume(source.name, functools.partial(self._on_message, lane))
        log.info("consuming", queue=source.name)

    def _unsubscribe(self, lane: Lane) -> None:
        with self._errors("unsubscribing"):
            lane.channel.stop_consuming()

    def _on_message(
        self,
        lane: Lane,
        channel: BlockingChannel,
        method: Any,
        properties: pika.BasicProperties,
        body: bytes,
    ) -> None:
        if channel is not lane.channel or self._stop.is_set():
            return  # goes back with its channel
        delivery = Delivery(
            body=body,
            # Bytes where they are not UTF-8.
            message_id=properties.message_id if isinstance(properties.message_id, str) else None,
            redelivered=bool(method.redelivered),
            headers=properties.headers or {},
            queue=lane.queue,
        )
        self._observer.took(delivery)
        lane.take(delivery, method.delivery_tag)

    def _attempt(self, doing: str, act: Callable[[Any], object]) -> tuple[int, str] | None:
        with self._errors(doing):
            return refusal_of(self._open_connection(), act, (NOT_FOUND, PRECONDITION_FAILED))

    def _open_connection(self) -> pika.BlockingConnection:
        if self._connection is None:
            raise BrokerError("there is no connection to RabbitMQ")
        return self._connection

    def _wake(self) -> None:
        """End the owner's wait for events; from any thread, whatever the connection's state."""
        if (connection := self._connection) is not None:
            with contextlib.suppress(exceptions.ConnectionWrongStateError):
                connection.add_callback_threadsafe(lambda: None)  # it only ends a wait

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Errors are ours, and the broker's answer is waited for no longer than the limit."""
        limit = self._answered() if self._answered else contextlib.nullcontext()
        with translated(self._settings, doing), limit:
            yield


@contextlib.contextmanager
def translated(settings: Settings, doing: str) -> Iterator[None]:
    """Inside the block every error of pika and of the network becomes one of ours."""
    try:
        yield
    except Exception as error:
        for theirs, says, ours, sentence in ERRORS:
            if isinstance(error, theirs) and re.search(says, repr(error)):
                told = sentence.format(
                    doing=doing,
                    user=settings.rabbitmq_user,
                    vhost=settings.rabbitmq_vhost,
                    queue=settings.training_queue,
                )
                raise ours(f"{told} ({error!r})") from error
        raise


def refusal_by(error: BaseException | None) -> Refusal:
    """Why pika could not publish."""
    match error:
        case exceptions.UnroutableError():
            return Refusal.ROUTE
        case exceptions.NackError():
            return Refusal.FULL
        case AnswerOverdue():
            return Refusal.UNANSWERED
        case exceptions.ChannelClosedByBroker() | exceptions.ConnectionClosedByBroker():
            return Refusal.FORM if error.reply_code in REFUSED_FORM else Refusal.LOST
        case ValueError() | struct.error() | exceptions.ShortStringTooLong():
            return Refusal.FORM
    return Refusal.LOST


def properties_of(publication: Publication) -> pika.BasicProperties:
    """Persistent, and named after its task."""
    return pika.BasicProperties(
        content_type="application/json",
        delivery_mode=pika.DeliveryMode.Persistent.value,
        message_id=publication.message_id,
        headers=dict(publication.headers) or None,
    )


def connect(settings: Settings) -> pika.BlockingConnection:
    """A connection to the first host that answers.

    Raises:
        BrokerError: There is no way in; `BrokerRefused` where waiting cannot help.
    """
    with translated(settings, "connecting"):
        return pika.BlockingConnection(connection_parameters(settings))


def refusal_of(
    connection: pika.BlockingConnection,
    act: Callable[[BlockingChannel], object],
    expected: Collection[int] = range(1000),
) -> tuple[int, str] | None:
    """Do something on a channel of its own, which the broker closes over what it refuses.

    Args:
        expected: Codes of refusals that are returned; others are raised, as pika's errors.

    Returns:
        The broker's refusal, its code and its words; None where it refused nothing.
    """
    try:
        with connection.channel() as channel:
            act(channel)
    except exceptions.ChannelClosedByBroker as error:
        if error.reply_code not in expected:
            raise
        return error.reply_code, error.reply_text
    except exceptions.UnroutableError:
        return NO_ROUTE, "no queue has this name"
    return None


def connection_parameters(settings: Settings) -> list[pika.ConnectionParameters]:
    """One entry a host, in random order, so that several workers spread over a cluster."""
    tls = ssl.create_default_context() if settings.rabbitmq_tls else None
    hosts = random.sample(settings.rabbitmq_host, len(settings.rabbitmq_host))
    return [
        pika.ConnectionParameters(
            host=host,
            port=settings.rabbitmq_port,
            virtual_host=settings.rabbitmq_vhost,
            credentials=pika.PlainCredentials(
                settings.rabbitmq_user, settings.rabbitmq_pass.get_secret_value()
            ),
            ssl_options=pika.SSLOptions(tls, host) if tls else None,
            heartbeat=settings.rabbitmq_heartbeat_seconds,
            blocked_connection_timeout=BLOCKED_SECONDS,
            socket_timeout=CONNECT_SECONDS,
            stack_timeout=CONNECT_SECONDS * 1.5,
            tcp_options={"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3},
            client_properties={"connection_name": f"{socket.gethostname()} {os.getpid()}"},
        )
        for host in hosts
    ]


pika.data.decode_value = tolerant(pika.data.decode_value)
