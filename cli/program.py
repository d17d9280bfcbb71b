"""The frame of every command: exit codes, errors as sentences, and stop signals.

Exit codes: 0 ended as asked; 1 a local training failed; 2 the settings or arguments are wrong; 3
RabbitMQ refuses this worker; 4 this machine cannot train; 130 a local training was interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

from rich.console import Console
from structlog.stdlib import BoundLogger

from utils.errors import BrokerRefused, ConfigurationError, MachineError, TrainingServerError

EXIT_FAILED, EXIT_SETTINGS, EXIT_BROKER, EXIT_MACHINE, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

console = Console(stderr=True)


class _Sentences:
    """Takes the place of the log for a command that a person runs."""

    def error(self, _event: str, *, reason: str) -> None:
        """Print the reason only."""
        _print_problem(reason)


def end(command: Callable[[], int]) -> None:
    """Run a command for a person: print its error as a sentence, and exit with its code."""
    sys.exit(guarded(command, report=_Sentences()))


def guarded(command: Callable[[], int], *, report: _Sentences | BoundLogger) -> int:
    """Run a command and report its error, without a stack trace, as one log event.

    Returns:
        The exit code.
    """
    try:
        return command()
    except ConfigurationError as error:  # the log may not be configured yet
        _print_problem(str(error))
        return EXIT_SETTINGS
    except BrokerRefused as error:
        report.error("broker_refused", reason=str(error))
        return EXIT_BROKER
    except MachineError as error:
        report.error("machine_unfit", reason=str(error))
        return EXIT_MACHINE
    except TrainingServerError as error:
        report.error("failed", reason=str(error))
        return EXIT_FAILED


def _print_problem(sentence: str) -> None:
    console.print(sentence, style="red", markup=False, highlight=False, soft_wrap=True)


def on_stop_signals(first: Callable[[], None]) -> None:
    """Call `first` in a new thread at SIGTERM, SIGINT or SIGHUP.

    A second SIGTERM or SIGINT ends the process at once.

    The signals are blocked and waited for, so no handler interrupts a thread that holds a lock. A
    closing terminal sends SIGHUP twice, from the kernel and from the shell, so a second SIGHUP does
    nothing. If SIGHUP was ignored at start (nohup), it stays ignored.
    """
    at_once = {signal.SIGTERM, signal.SIGINT}
    wanted = set(at_once)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        wanted.add(signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)

    def wait() -> None:
        signal.sigwait(wanted)
        first()
        # The trainer ends when its pipe closes.
        os._exit(128 + signal.sigwait(at_once))

    threading.Thread(target=wait, name="signals", daemon=True).start()
