"""A process pool that survives the death of a worker."""

from __future__ import annotations

import contextlib
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from vjepa_fast.common.errors import UserError
from vjepa_fast.data.workers import WorkerInit, start_context

# One is worked on, the other is there when it is done.
_NUM_AHEAD = 2
_MAX_DEATHS = 2
_JOIN_SECONDS = 5.0


class Failed(Exception):
    """A task raised an error that is not the user's, or ended its process, twice; the message says what happened."""


class _Worker:
    def __init__(self, context: Any, work: Callable[[int], Any], closing: Any) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, WorkerInit(closing)), daemon=True)
        self.process.start()
        theirs.close()
        self.tasks: deque[int] = deque()


class Pool:
    """Processes that work on numbered tasks.

    Args:
        work: what is done with a task; what it returns can be pickled.
        num_workers: processes.
    """

    def __init__(self, work: Callable[[int], Any], num_workers: int) -> None:
        self._work = work
        self._context = start_context()
        self._closing = self._context.Event()
        self._workers = [_Worker(self._context, work, self._closing) for _ in range(num_workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.set()
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_JOIN_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()

    def run(self, tasks: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Tasks and what became of them, in the order they are done.

        A task whose process ends is done again, and after the second time its result is a Failed; so is, at once, that
        of a task that raises anything but a UserError.

        Raises:
            UserError: what `work` raised.
        """
        source = iter(tasks)
        again: deque[int] = deque()
        deaths: dict[int, int] = {}
        while True:
            for worker in self._workers:
                while len(worker.tasks) < _NUM_AHEAD:
                    task = again.popleft() if again else next(source, None)
                    if task is None:
                        break
                    worker.tasks.append(task)
                    # A process that has just died is met by the reading below.
                    with contextlib.suppress(OSError):
                        worker.connection.send(task)
            busy: dict[Any, int] = {
                worker.connection: place for place, worker in enumerate(self._workers) if worker.tasks
            }
            if not busy:
                return
            for connection in wait(list(busy)):
                place = busy[connection]
                worker = self._workers[place]
                try:
                    is_fine, result = worker.connection.recv()
                except (EOFError, OSError):
                    task, *rest = worker.tasks
                    self._workers[place] = _Worker(self._context, self._work, self._closing)
                    again.extend(rest)
                    deaths[task] = deaths.get(task, 0) + 1
                    if deaths[task] < _MAX_DEATHS:
                        again.append(task)
                    else:
                        yield task, Failed(_how_it_ended(worker))
                else:
                    if not is_fine:
                        raise result
                    yield worker.tasks.popleft(), result


def _serve(connection: Connection, work: Callable[[int], Any], init: WorkerInit) -> None:
    init(0)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, work(task)
        except UserError as error:
            answer = False, error
        except Exception as error:
            # As text: an error may hold what cannot be pickled.
            answer = True, Failed(": ".join(filter(None, (type(error).__name__, str(error)))))
        connection.send(answer)


def _how_it_ended(worker: _Worker) -> str:
    worker.process.join(_JOIN_SECONDS)
    code = worker.process.exitcode or 0
    if code >= 0:
        return f"it ends the process that decodes it (exit code {code})"
    name = signal.Signals(-code).name
    return f"it ends the process that decodes it ({name}{', most often: no memory is left' * (name == 'SIGKILL')})"
