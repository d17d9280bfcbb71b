"""If waiting cannot help, the worker ends with a remedy; otherwise it reconnects for ever."""

from __future__ import annotations

import errno
import inspect
import re
import socket
import threading
import time

import pika.exceptions
import pytest
from structlog.testing import capture_logs

from consumer.training_consumer import training_consumer
from local.rabbitmq_node import RabbitMqNode
from services.broker.client import ERRORS
from tests.integration.consumer.broker import Client, Handler, Start, make_settings, until
from utils.errors import BrokerError, BrokerRefused


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rabbitmq_pass": "wrong-password"}, "login of user 'guest': check RABBITMQ_USER"),
        ({"rabbitmq_vhost": "nowhere"}, "virtual host 'nowhere'.*check RABBITMQ_VHOST"),
    ],
)
def test_refused_credentials_end_the_worker_at_once_and_name_the_settings(
    start: Start, values: dict[str, str], words: str
) -> None:
    began = time.monotonic()
    worker = start(Handler(), **values)
    with pytest.raises(BrokerRefused, match=words) as caught:
        worker.end()
    assert time.monotonic() - began < 5
    assert "wrong-password" not in str(caught.value)


def test_a_user_who_may_not_declare_ends_the_worker_with_the_missing_permission(
    start: Start, rabbitmq: RabbitMqNode
) -> None:
    rabbitmq.ctl("add_user", "poor", "password")
    rabbitmq.ctl("set_permissions", "poor", "^$", ".*", ".*")
    worker = start(Handler(), rabbitmq_user="poor", rabbitmq_pass="password")
    with pytest.raises(BrokerRefused, match="user 'poor' lacks a permission for declaring"):
        worker.end()


@pytest.mark.parametrize("suffix", [".delay.500", ".dead", ".endings"])
def test_a_queue_of_the_worker_with_other_arguments_ends_the_worker_and_is_named(
    start: Start, client: Client, queue: str, suffix: str
) -> None:
    with client.channel() as channel:
        channel.queue_declare(f"{queue}{suffix}", durable=True, arguments={"x-max-length": 5})
    worker = start(Handler())
    with pytest.raises(BrokerRefused, match=re.escape(f"{queue}{suffix} exists with other")):
        worker.end()


def test_refused_credentials_in_mid_job_let_the_job_end_first(
    start: Start, client: Client, queue: str, rabbitmq: RabbitMqNode
) -> None:
    rabbitmq.ctl("add_user", "fired", "password")
    rabbitmq.ctl("set_permissions", "fired", ".*", ".*", ".*")
    handler = Handler()
    handler.go.clear()
    worker = start(handler, rabbitmq_user="fired", rabbitmq_pass="password")
    client.publish(queue, b"1")
    until(lambda: handler.running)
    rabbitmq.ctl("delete_user", "fired")
    until(lambda: not worker.consumer.connected)
    time.sleep(1.5)
    assert worker.thread.is_alive()
    handler.go.set()
    with pytest.raises(BrokerRefused, match="login of user 'fired'"):
        until(lambda: worker.errors)
        worker.end()
    until(lambda: client.waiting(queue) == 1)


def test_a_broker_that_is_not_there_yet_is_waited_for(rabbitmq: RabbitMqNode, queue: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        settings = make_settings(rabbitmq, queue, rabbitmq_port=probe.getsockname()[1])
        stop = threading.Event()
        consumer = training_consumer(
            settings.broker,
            handle=Handler(),
            stop=stop,
            stop_seconds=8.0,
            retry_delays=(1.0,),
            ending_retry_delays=(1.0,),
        )
        threading.Timer(2.0, stop.set).start()
        with capture_logs() as lines:
            consumer.run()
    waits = [line["retry_in"] for line in lines if line["event"] == "broker_lost"]
    assert len(waits) >= 2
    assert all("onnection refused" in line["error"] for line in lines)


def test_the_first_host_that_answers_is_taken(start: Start, client: Client, queue: str) -> None:
    handler = Handler()
    start(handler, rabbitmq_host="127.0.0.2,127.0.0.1,127.0.0.3")
    client.publish(queue, b"x")
    until(lambda: handler.returned)


def test_a_connection_that_is_reset_while_it_opens_is_made_again(
    start: Start, client: Client, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, resets = socket.socket.getpeername, [OSError(errno.ENOTCONN, "it was reset")]

    def reset_once(opened: socket.socket) -> object:
        if resets:
            raise resets.pop()
        return real(opened)

    monkeypatch.setattr(socket.socket, "getpeername", reset_once)
    handler = Handler()
    start(handler)
    client.publish(queue, b"x")
    until(lambda: handler.returned)
    assert not resets


# --- the table


def test_every_error_of_pika_has_a_row_in_the_table() -> None:
    theirs = [
        one
        for _, one in inspect.getmembers(pika.exceptions, inspect.isclass)
        if issubclass(one, BaseException) and one.__module__ == pika.exceptions.__name__
    ]
    assert len(theirs) > 30
    unconditional = tuple(row[0] for row in ERRORS if not row[1])
    assert [one.__name__ for one in theirs if not issubclass(one, unconditional)] == []
    assert all(issubclass(row[2], BrokerError) for row in ERRORS)
