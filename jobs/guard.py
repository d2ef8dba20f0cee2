"""The guard around every script: signals, dead workers, one line and the exit status."""

import contextlib
import io
import multiprocessing.connection
import os
import select
import shlex
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from localized_crops.files import REMEDIES, DiskError, UserError, user_errors

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST_LINE = 600  # characters of an error: a longer one, which may quote a whole file, is cut in the middle
WORKERS: weakref.WeakSet = weakref.WeakSet()  # processes that load images and were not asked to end


class DeadWorkerError(UserError):
    """A process that loads images died; what was finished before is whole."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived. Not an Exception, so that only the guard catches it (as with KeyboardInterrupt)."""


def run_script(main: Callable[[dict], None], load_config: Callable[[list[str]], dict | None]) -> None:
    """Run a script from the command line: load its config, call ``main``, end with the right exit status.

    Status 2 with one line for anything the user can mend, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP,
    141 (SIGPIPE) without a word where nobody reads what is printed any more, as after ``| head``. The line ends with
    the command of `with_resume_hint`.

    Args:
        main: the script.
        load_config: turns ``sys.argv[1:]`` into the config (None: help was printed); its ValueError is the user's.
    """
    _make_printing_safe()
    for number in STOPPING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    try:
        with user_errors(ValueError):
            config = load_config(sys.argv[1:])
        if config is not None:
            with _dead_workers():
                main(config)
        sys.stdout.flush()
    except (UserError, OSError) as error:
        if _reader_has_gone():
            sys.exit(128 + signal.SIGPIPE)
        _exit(f"error: {_one_line(error)}", error, 2)
    except KeyboardInterrupt as error:
        _exit("interrupted", error, 130)
    except Terminated as error:
        _exit("terminated", error, 128 + error.args[0])
    finally:
        WORKERS.clear()  # the end of one while Python ends is no fault


def _make_printing_safe() -> None:
    """Let a closed stream swallow what is printed, and escape what the locale's encoding cannot say."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before Python began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as it runs
        getattr(sys, name).reconfigure(errors="backslashreplace")


def _reader_has_gone() -> bool:
    """Tell whether stdout or stderr is a pipe that nobody reads; what is still printed into it goes nowhere."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        with contextlib.suppress(io.UnsupportedOperation):  # no stream of the system
            poll.register(stream.fileno(), 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            gone = True
    return gone


@contextlib.contextmanager
def with_resume_hint(command: Callable[[], str | None]) -> Iterator[None]:
    """Add the command that goes on, if there is one, to the line of an interruption, full disk or dead loader process.

    Of several nested blocks the outermost names the command: a sweep knows better than the training that it is at.
    """
    try:
        with _dead_workers():
            yield
    except (KeyboardInterrupt, Terminated, DiskError, DeadWorkerError) as error:
        error.command = command()
        raise


@contextlib.contextmanager
def _dead_workers() -> Iterator[None]:
    """Turn what torch's loader raises of a dead worker into DeadWorkerError."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:  # the last two: it died while it handed a batch over
        if isinstance(error.__cause__, DeadWorkerError):  # raised while the loader waited, which words it anew
            raise error.__cause__ from None
        if WORKERS:
            multiprocessing.connection.wait([one.sentinel for one in _workers()], timeout=1.0)  # it may still be ending
            raise_for_dead_workers()
        raise


def raise_for_dead_workers(*_: Any) -> None:
    """Raise DeadWorkerError if processes that load images have ended by themselves; as a handler of signals too."""
    # their exit codes can be read once only, and this may interrupt what reads them
    dead = [worker for worker in _workers() if multiprocessing.connection.wait([worker.sentinel], timeout=0)]
    WORKERS.difference_update(dead)
    if dead:
        raise DeadWorkerError(
            f"processes that load images died (pid {', '.join(str(worker.pid) for worker in dead)}); if memory ran out "
            "(see dmesg) lower num_workers"
        )


def _workers() -> list[Any]:
    """Return what is in `WORKERS` now: a signal may change it at any time, which iterating over it does not bear."""
    return [worker for reference in tuple(WORKERS.data) if (worker := reference()) is not None]


def same_command(*words: str) -> str:
    """Return the command line of this process with ``words`` added, without those that start anew."""
    script, *given = sys.argv
    kept = [word for word in given if not word.endswith(".again=true")]
    start = ["torchrun", "...", script] if "WORLD_SIZE" in os.environ else ["python", script]
    return shlex.join([*start, *kept, *(word for word in words if word not in kept)])


def _stop(number: int, _frame: Any) -> None:
    """End the script in order; of a second signal it dies at once, which leaves no file half either."""
    for stopping in STOPPING:
        signal.signal(stopping, signal.SIG_DFL)
    WORKERS.clear()  # that some die of the same signal is no fault
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        what = "see its permissions" if isinstance(error, PermissionError) else REMEDIES.get(error.errno, "")
        line = f"{error.strerror}: {error.filename or 'unknown file'}{'; ' * bool(what)}{what}"
    half = LONGEST_LINE // 2 - 4
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} [...] {line[-half:]}"


def _exit(message: str, error: BaseException, status: int) -> None:
    command = getattr(error, "command", None)
    with contextlib.suppress(OSError):  # of a full disk or a reader that has gone
        sys.stdout.flush()
    print(f"{message}; to go on: {command}" if command else message, file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGCONT)  # one that was stopped could not be ended
    if isinstance(error, DeadWorkerError):  # the dead may hold what the others, for whose end Python waits, wait for
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(status)
    sys.exit(status)
