"""RabbitMQ's client: connections, publications, subscriptions. The only importer of pika.

pika raises its own errors and the network's; `ERRORS` maps each of them to an error of this server.
Three gaps of pika are closed here, in the connection that `connect` makes and nowhere else:

- pika waits for an answer of the broker without a limit, in a loop that also reads heartbeats
  (`AnswerLimit`).
- A header with a time beyond Python's calendar breaks the connection in the middle of a frame
  (`_Wire`).
- Cancelling a consumer rejects a message that arrives meanwhile (`Subscription.cancel`).

The repairs use private names of pika; tests check them against the pinned version.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import socket
import ssl
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import pika
import pika.data
from pika import exceptions, spec
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException

from services.broker.settlement import Action, Delivery, Publication, Queue
from services.broker.topology import NOT_FOUND, PRECONDITION_FAILED, Declarations
from utils.errors import BrokerError, BrokerRefused, PublicationRefused, Refusal
from utils.logger import get_logger
from utils.settings.groups import BrokerSettings

log = get_logger(__name__)

CONNECT_SECONDS = 10.0
BLOCKED_SECONDS = 120.0  # a broker out of memory or disk stops reading; the next host is tried
ANSWER_SECONDS = 30.0  # the longest wait for a confirm or any other answer of the broker
CANCEL_TURN_SECONDS = 0.01
NO_ROUTE = 312  # AMQP's code for a message that no queue takes
REFUSED_FORM = frozenset({311, 406, 501, 502, 505})  # AMQP's codes for a message's size and frames


class AnswerOverdue(exceptions.AMQPConnectionError):
    """The broker has left a request without an answer, and the connection was ended."""


# The first row that matches counts: pika's class, a pattern of its text, this server's class, and
# the message.
ERRORS: tuple[tuple[type[Exception], str, type[BrokerError], str], ...] = (
    (
        exceptions.ProbableAuthenticationError,
        # Without a reply of the broker, the cause may be a restart during the handshake.
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
    # pika's error for a connection that was reset between its opening and its first use.
    (ValueError, "Expected connected socket", BrokerError, "RabbitMQ could not be reached"),
    # pika asserts what it expects of the broker.
    (AssertionError, "", BrokerError, "The AMQP client failed while {doing}"),
)


@contextlib.contextmanager
def translated(settings: BrokerSettings, doing: str) -> Iterator[None]:
    """Inside the block, an error of pika or of the network becomes an error of this server."""
    try:
        yield
    except Exception as error:
        for theirs, says, ours, sentence in ERRORS:
            if isinstance(error, theirs) and re.search(says, repr(error)):
                reason = sentence.format(
                    doing=doing,
                    user=settings.rabbitmq_user,
                    vhost=settings.rabbitmq_vhost,
                    queue=settings.training_queue,
                )
                raise ours(f"{reason} ({error!r})") from error
        raise


def connect(settings: BrokerSettings) -> pika.BlockingConnection:
    """A connection to the first host that answers.

    Raises:
        BrokerError: No host accepts the connection; `BrokerRefused` if waiting cannot help.
    """
    # pika raises each error that it logs. It is logged here once, without pika's stack traces.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    with translated(settings, "connecting"):
        made: Any = pika.BlockingConnection  # its stub has another type for the second argument
        connection: pika.BlockingConnection = made(_parameters(settings), _impl_class=_Wire)
        return connection


def _parameters(settings: BrokerSettings) -> list[pika.ConnectionParameters]:
    """One entry per host, in random order, so that workers spread over a cluster."""
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


def refusal_of(
    connection: pika.BlockingConnection,
    act: Callable[[BlockingChannel], object],
    expected: Collection[int] = range(1000),
) -> tuple[int, str] | None:
    """Run an act on a channel that is opened for it; the broker closes the channel to refuse.

    Args:
        connection: An open connection.
        act: Gets the channel.
        expected: Codes of refusals that are returned. Others are raised as pika's errors.

    Returns:
        Code and text of the broker's refusal; None if there was none.
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


def properties_of(publication: Publication) -> pika.BasicProperties:
    """The properties of a persistent message that is named after its task."""
    return pika.BasicProperties(
        content_type="application/json",
        delivery_mode=pika.DeliveryMode.Persistent.value,
        message_id=publication.message_id,
        headers=dict(publication.headers) or None,
    )


def _refusal_by(error: BaseException | None) -> Refusal:
    """The reason for which pika could not publish."""
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


# --- the three gaps of pika


class _Wire(pika.SelectConnection):
    """pika's connection below the blocking one, which also reads times that Python cannot hold.

    A publisher that counts in milliseconds may write a time in the year 50,000 into a header. AMQP
    allows it. pika raises in the middle of the frame, the connection is lost, and the message comes
    back.
    """

    _frame_buffer: bytes

    def _read_frame(self) -> Any:
        try:
            return super()._read_frame()  # type: ignore[misc]
        except (ValueError, OverflowError, OSError):
            self._frame_buffer = with_far_times_as_numbers(self._frame_buffer)
            return super()._read_frame()  # type: ignore[misc]


_LAST_TIME = 253_402_300_799  # seconds; the end of the year 9999, the last that Python knows


def with_far_times_as_numbers(data: bytes) -> bytes:
    """Received bytes that begin with a header frame, its times beyond Python's as whole numbers.

    The type of such a value changes from `T`, a time, to `l`, a number of as many bytes. Bytes that
    begin with another frame are returned as they are.
    """
    frame_type, _, size = struct.unpack_from(">BHL", data)
    if frame_type != spec.FRAME_HEADER:
        return data
    start = spec.FRAME_HEADER_SIZE + 12  # after the class, the weight and the body's size
    (flags,) = struct.unpack_from(">H", data, start)
    at = start + 2
    for flag in (
        spec.BasicProperties.FLAG_CONTENT_TYPE,
        spec.BasicProperties.FLAG_CONTENT_ENCODING,
    ):
        at += 1 + data[at] if flags & flag else 0
    changed = bytearray(data)
    if flags & spec.BasicProperties.FLAG_HEADERS:
        (length,) = struct.unpack_from(">L", data, at)
        end = min(at + 4 + length, spec.FRAME_HEADER_SIZE + size)
        for time_at in _times(data, at + 4, end, named=True):
            if struct.unpack_from(">Q", data, time_at + 1)[0] > _LAST_TIME:
                changed[time_at : time_at + 1] = b"l"
    return bytes(changed)


def _times(data: bytes, at: int, end: int, *, named: bool) -> Iterator[int]:
    """Positions of the times in an encoded table (`named`) or array, nested ones too."""
    while at < end:
        at += 1 + data[at] if named else 0
        kind = data[at : at + 1]
        if kind in (b"F", b"A"):
            (length,) = struct.unpack_from(">L", data, at + 1)
            yield from _times(data, at + 5, at + 5 + length, named=kind == b"F")
            at += 5 + length
        elif kind == b"T":
            yield at
            at += 9
        else:
            _, at = pika.data.decode_value(data, at)


class AnswerLimit:
    """Ends a connection that leaves a request without an answer for too long.

    The timer runs in the connection's own loop, and so in its owner's thread: pika handles timers
    while it waits, and ends a connection without heartbeats in the same way.

    Args:
        connection: pika's blocking connection.
        seconds: The longest wait for an answer. It does not count while the broker reports that it
            is short of memory or disk; the connection's own limit for that counts instead.
    """

    def __init__(self, connection: Any, seconds: float) -> None:
        # The blocking connection calls back only between waits. The one below it always does.
        self._impl = connection._impl  # pylint: disable=protected-access
        self._seconds = seconds
        self._blocked = False
        self._impl.add_on_connection_blocked_callback(lambda *_: self._set_blocked(True))
        self._impl.add_on_connection_unblocked_callback(lambda *_: self._set_blocked(False))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Apply the limit to the block."""
        timer: list[Any] = []

        def start() -> None:
            timer[:] = [self._impl.ioloop.call_later(self._seconds, expire)]

        def expire() -> None:
            if self._impl.is_closed:
                return
            if self._blocked:
                start()
                return
            error = AnswerOverdue(f"no answer within {self._seconds:g} seconds")
            self._impl._terminate_stream(error)  # pylint: disable=protected-access

        if not self._impl.is_closed:
            start()
        try:
            yield
        finally:
            for each in timer:
                self._impl.ioloop.remove_timeout(each)

    def _set_blocked(self, blocked: bool) -> None:
        self._blocked = blocked
        if blocked:
            log.warning("broker_blocks_publishers", why="it is short of memory or disk")
        else:
            log.info("broker_takes_messages_again")


# --- a connection in use


Arrived = Callable[["Subscription", Delivery, int], None]
"""Gets a delivery and its tag, in the owner's thread."""


class Subscription:
    """One consumer on a separate channel, with at most one unacknowledged message.

    Args:
        link: The connection.
        queue: The queue.
        name: Its name on the broker.
        arrived: Called for each message.
    """

    def __init__(self, link: Link, queue: Queue, name: str, arrived: Arrived) -> None:
        self.queue = queue
        self._link = link
        self._name = name
        self._arrived = arrived
        self._cancelled = False
        with link.errors(f"subscribing to {name}"):
            self._channel: Any = link.connection.channel()
            self._channel.basic_qos(prefetch_count=1)
            self._channel.basic_consume(name, self._on_message)
        log.info("consuming", queue=name)

    @property
    def is_open(self) -> bool:
        """Whether its deliveries can be settled: their tags mean nothing on another channel."""
        return bool(self._channel.is_open)

    @property
    def is_consuming(self) -> bool:
        """Whether the broker would deliver a message: neither channel nor consumer has gone."""
        return self.is_open and not self._cancelled and bool(self._channel.consumer_tags)

    def answer(self, tag: int, action: Action) -> None:
        """Acknowledge a delivery or return it. Raises `BrokerError`."""
        with self._link.errors("settling a delivery"):
            match action:
                case Action.ACK:
                    self._channel.basic_ack(tag)
                case Action.REQUEUE:
                    self._channel.basic_reject(tag, requeue=True)

    def cancel(self) -> None:
        """Stop the broker from delivering more. Raises `BrokerError`.

        A message that is on its way arrives as every other. pika would reject it, and it would come
        back marked as delivered before, which for an order without an id means that its job may
        have been claimed.
        """
        # pylint: disable=protected-access
        impl = self._channel._impl
        self._cancelled = True
        with self._link.errors(f"cancelling the consumer of {self._name}"):
            for tag in self._channel.consumer_tags:
                impl.basic_cancel(tag, callback=lambda _: None)
                impl._cancelled.discard(tag)  # pika rejects the messages of those in this set
                while self.is_open and tag in impl._consumers:
                    self._link.process_events(CANCEL_TURN_SECONDS)
                self._channel._consumer_infos.pop(tag, None)

    def close(self) -> None:
        """Close the channel, which returns unsettled messages. Raises `BrokerError`."""
        with self._link.errors(f"closing the channel of {self._name}"):
            if self.is_open:
                self._channel.close()

    def _on_message(
        self, _channel: object, method: Any, properties: pika.BasicProperties, body: bytes
    ) -> None:
        delivery = Delivery(
            body=body,
            # Bytes if they are not UTF-8.
            message_id=properties.message_id if isinstance(properties.message_id, str) else None,
            redelivered=bool(method.redelivered),
            headers=properties.headers or {},
            queue=self.queue,
        )
        self._arrived(self, delivery, method.delivery_tag)


class Link:
    """One connection to RabbitMQ, used by one thread; only `wake` may be called by any thread.

    Every method that asks the broker raises `BrokerError`, `BrokerRefused` if waiting cannot help,
    and waits for the broker's answer no longer than the limit.

    Args:
        settings: Hosts, credentials, heartbeat, name of the backend's queue.
        training_queues: The training queues that are declared; the first is the backend's.
        delays: Delays in seconds of these queues' delay queues.
        answer_seconds: The longest wait for a confirm or any other answer.

    Attributes:
        connection: pika's connection.
        queues: The queues that are declared, without the delay queues.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        training_queues: Sequence[Queue] = (Queue.TRAINING,),
        delays: Sequence[float] = (),
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._settings = settings
        self._delays = tuple(delays)
        self.queues = (*training_queues, Queue.ENDINGS, Queue.DEAD)
        self.connection = connect(settings)
        self._limit = AnswerLimit(self.connection, answer_seconds)
        self._outgoing: BlockingChannel | None = None
        self._looking: BlockingChannel | None = None
        self._declared = Declarations(settings.training_queue, self._attempt)

    @property
    def is_open(self) -> bool:
        """Whether the connection still stands."""
        return bool(self.connection.is_open)

    def declare(self) -> None:
        """Declare all queues."""
        self._declared.begin()
        for queue in self.queues:
            self._declared.ensure(self._declared.of(queue))
        for queue in self.queues:
            for delay in self._delays if queue.is_training else ():
                self._declared.ensure(self._declared.of(queue, delay))
        log.info("broker_connected", queue=self._settings.training_queue)

    def close(self) -> None:
        """Close the connection; an error is only logged."""
        if self.is_open:
            with contextlib.suppress(BrokerError), self.errors("closing the connection"):
                self.connection.close()

    def wake(self) -> None:
        """End the wait of `process_events`."""
        with contextlib.suppress(exceptions.ConnectionWrongStateError):
            self.connection.add_callback_threadsafe(lambda: None)

    def process_events(self, seconds: float) -> None:
        """Handle what the broker has sent, and wait up to this long for it."""
        with self.errors("waiting for messages"):
            self.connection.process_data_events(time_limit=seconds)

    def publish(self, publication: Publication) -> None:
        """Publish and wait for the broker's confirm.

        Raises:
            PublicationRefused: This publication was not taken, perhaps by its own fault.
        """
        target = self._declared.of(publication.queue, publication.delay_seconds)
        if publication.delay_seconds is not None:
            # The broker drops a message that leaves a delay queue for a missing queue.
            self._declared.ensure(self._declared.of(publication.queue), again=True)
        self._declared.ensure(target)
        try:
            self._publish_to(target.name, publication.body, properties_of(publication))
        except PublicationRefused:
            self._declared.forget(target)
            raise

    def probe(self) -> None:
        """Check that the broker takes publications at all, with one that reaches no queue."""
        name = f"{self._settings.training_queue}.nowhere"
        try:
            self._publish_to(name, b"", pika.BasicProperties())
        except PublicationRefused as error:
            if error.refusal is not Refusal.ROUTE:
                raise BrokerError(
                    f"RabbitMQ accepts no message from publishers: {error}. Check its alarms of "
                    "memory and disk."
                ) from error

    def subscribe(self, queue: Queue, arrived: Arrived) -> Subscription:
        """Declare the queue again, since it may have been deleted, and consume it."""
        target = self._declared.of(queue)
        self._declared.ensure(target, again=True)
        return Subscription(self, queue, target.name, arrived)

    def look(self, queue: Queue) -> tuple[int, int] | None:
        """The number of waiting messages and of consumers; None if there is no such queue.

        A missing training queue is declared again, so that nothing published to it is dropped.
        """
        target = self._declared.of(queue)
        with self.errors(f"looking at {target.name}"):
            if self._looking is None or not self._looking.is_open:
                self._looking = self.connection.channel()
            try:
                found = self._looking.queue_declare(target.name, passive=True).method
                return found.message_count, found.consumer_count
            except exceptions.ChannelClosedByBroker:
                pass
        if queue.is_training:
            self._declared.ensure(target, again=True)
        return None

    @contextlib.contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Inside the block, errors are those of this server.

        A wait for the broker has a limit.
        """
        with translated(self._settings, doing), self._limit():
            yield

    def _publish_to(self, name: str, body: bytes, properties: pika.BasicProperties) -> None:
        doing = f"publishing to {name}"
        with self.errors(doing):
            if self._outgoing is None or not self._outgoing.is_open:
                self._outgoing = self.connection.channel()
                self._outgoing.confirm_delivery()
        try:
            with self.errors(doing):
                self._outgoing.basic_publish("", name, body, properties, mandatory=True)
        except BrokerRefused:
            raise
        except Exception as error:
            # pika encodes a message before it sends any of it.
            refusal = _refusal_by(error.__cause__ if isinstance(error, BrokerError) else error)
            raise PublicationRefused(str(error), refusal) from error

    def _attempt(self, doing: str, act: Callable[[Any], object]) -> tuple[int, str] | None:
        with self.errors(doing):
            return refusal_of(self.connection, act, (NOT_FOUND, PRECONDITION_FAILED))
