"""Runs of the command line in processes of their own, started in milliseconds.

A server process imports torch once and forks; each fork is a session of its own with its own standard streams, so that
it can be signalled as a terminal would and leaves nothing behind unseen.
"""

from __future__ import annotations

import csv
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.helpers import forked

Patch = Callable[..., None]
TIMEOUT = 60.0


def _child(argv: list[str], folder: str, patches: list[tuple[Patch, tuple[Any, ...]]]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdin.close()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    torch.set_num_threads(1)
    for patch, arguments in patches:
        patch(*arguments)
    from vjepa_fast.cli.main import main

    sys.argv = ["vjepa-fast", *argv]
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Run:
    """A run of `vjepa-fast train` that may still be going on."""

    def __init__(
        self, context: Any, folder: Path, argv: list[str], patches: list[tuple[Patch, tuple[Any, ...]]]
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.process = context.Process(target=_child, args=(argv, str(folder), patches))
        self.process.start()

    @property
    def pid(self) -> int:
        pid = self.process.pid
        assert pid is not None
        return pid

    def wait(self) -> int:
        """Exit code, negative for a signal; nothing of the session may be left, a decoding process for a moment."""
        self.process.join(TIMEOUT)
        code = self.process.exitcode
        if code is None:
            left = self.session()
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"still running: {left}\n{self.stdout}\n{self.stderr}")
        wait_until(lambda: not self.session(), "processes were left behind")
        return int(code)

    def signal(self, number: int, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    @property
    def stdout(self) -> str:
        path = self.folder / "stdout"
        return path.read_text() if path.exists() else ""

    @property
    def stderr(self) -> str:
        path = self.folder / "stderr"
        return path.read_text() if path.exists() else ""

    def session(self) -> dict[int, str]:
        """Processes of the session that are alive: pid and command line."""
        alive = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    alive[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, ValueError):
                continue
        return alive

    def ranks(self) -> list[int]:
        """Process ids of the training processes of `--nproc`."""
        children = [pid for pid, command in self.session().items() if "spawn_main" in command]
        parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in children}
        return sorted(pid for pid, parent in parents.items() if parent == self.pid)


class Runner:
    """Starts runs.

    Args:
        folder: where the streams of the runs go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.context = forked.context()

    def start(self, *argv: object, patches: list[tuple[Patch, tuple[Any, ...]]] | None = None) -> Run:
        """`vjepa-fast train ARGV` with functions run before it in its process."""
        self.count += 1
        return Run(self.context, self.folder / str(self.count), ["train", *map(str, argv)], patches or [])

    def run(self, *argv: object, code: int = 0, patches: list[tuple[Patch, tuple[Any, ...]]] | None = None) -> Run:
        """The same to its end, which has to be `code`; a traceback is never right."""
        run = self.start(*argv, patches=patches)
        ended = run.wait()
        assert ended == code, f"exit code {ended}\n{run.stdout}\n{run.stderr}"
        assert "Traceback" not in run.stderr + run.stdout, run.stderr
        return run


def start_tasks(
    runner: Runner,
    *argv: object,
    patches: list[tuple[Patch, tuple[Any, ...]]] | None = None,
    first_patches: list[tuple[Patch, tuple[Any, ...]]] | None = None,
    count: int = 2,
) -> list[Run]:
    """Processes with what srun sets for so many tasks; `patches` are run in all but the first."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    runs = []
    for rank in range(count):
        own = (patches if rank else first_patches) or []
        variables = {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_STEP_NUM_TASKS": str(count),
            "SLURM_NODEID": "0",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_TASKS_PER_NODE": str(count),
            "SLURM_JOB_ID": "7",
            "MASTER_PORT": str(port),
        }
        runs.append(runner.start(*argv, patches=[(set_environment, (variables,)), *own]))
    return runs


def wait_until(condition: Callable[[], object], what: str, seconds: float = TIMEOUT) -> None:
    """Polls; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def losses(folder: Path) -> list[str]:
    """The loss column of the log as text, after checking that the steps count up from 0 without gaps."""
    with (folder / "log_r0.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


def weights(folder: Path) -> dict[str, Any]:
    """Networks and optimizer state of the last checkpoint."""
    from vjepa_fast.checkpoints.run_folder import newest_checkpoint
    from vjepa_fast.checkpoints.sharded_format import Folder

    path = newest_checkpoint(folder)
    assert path is not None
    checkpoint = Folder(path).contents() if path.is_dir() else torch.load(path, weights_only=True)
    return {key: checkpoint[key] for key in ("encoder", "predictor", "target_encoder", "opt")}


def equal(a: Any, b: Any) -> bool:
    """Whether nested dicts and lists of tensors are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def no_leftovers(folder: Path) -> bool:
    """Whether a run folder holds no temporary file."""
    return not [path for path in folder.rglob("*") if ".tmp" in path.name]


def kill_after(step: int, seconds: float) -> None:
    """Patch: SIGKILL `seconds` after the given step began."""
    import threading

    from vjepa_fast.train.trainer import Trainer

    original = Trainer.run_step

    def run_step(self: Trainer, batch: Any) -> Any:
        if self.step == step:
            threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        return original(self, batch)

    Trainer.run_step = run_step  # type: ignore[method-assign]


def kill_in_checkpoint(number: int) -> None:
    """Patch: SIGKILL when half of the checkpoint is on the disk."""
    import io

    original = torch.save
    calls = []

    def save(contents: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) < number:
            original(contents, file)
            return
        buffer = io.BytesIO()
        original(contents, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def before_each_tensor(act: Callable[[int, int, Any], None]) -> None:
    """Calls `act(checkpoint, tensor, file)` before each tensor that is written to a folder of shards; both are counted
    from 1."""
    from vjepa_fast.checkpoints.sharded_writer import ShardedWriter

    write, save = ShardedWriter.write, torch.save
    count = [0, 0]

    def counted(self: ShardedWriter, *args: Any, **kwargs: Any) -> None:
        # In the background it is still the one before that is written.
        self.wait()
        count[:] = count[0] + 1, 0
        write(self, *args, **kwargs)

    def watched(contents: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        count[1] += 1
        act(count[0], count[1], file)
        save(contents, file, *args, **kwargs)

    ShardedWriter.write = counted  # type: ignore[method-assign]
    torch.save = watched


def kill_in_shards(number: int, tensor: int) -> None:
    """Patch: SIGKILL in the given checkpoint before the given tensor of this process, half of which is written."""

    def act(checkpoint: int, place: int, file: Any) -> None:
        if (checkpoint, place) >= (number, tensor):
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    before_each_tensor(act)


def full_disk_in_shards(number: int) -> None:
    """Patch: the disk is full from the middle of the given checkpoint on."""
    import errno

    def act(checkpoint: int, place: int, file: Any) -> None:
        if checkpoint >= number and place > 20:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before_each_tensor(act)


def record_clips(folder: Path) -> None:
    """Patch: step, number and masks of each clip that a process trains on, in a file of its own."""
    from vjepa_fast.train.trainer import Trainer

    original = Trainer.run_step

    def run_step(self: Trainer, batch: Any) -> Any:
        with (folder / f"clips_{os.getpid()}").open("a") as file:
            for ids, masks in zip(batch.sample_ids, self.task.masks_of(batch), strict=True):
                for place, sample in enumerate(ids.tolist()):
                    lists = [
                        flat.split(lengths)[place + mask * len(ids)].tolist()
                        for mask in range(masks.num_masks)
                        for flat, lengths in (
                            (masks.context_ids, masks.context_lengths),
                            (masks.target_ids, masks.target_lengths),
                        )
                    ]
                    file.write(f"{batch.step} {sample} {lists}\n")
        return original(self, batch)

    Trainer.run_step = run_step  # type: ignore[method-assign]


def full_disk_in_checkpoint(number: int) -> None:
    """Patch: the disk is full from the given checkpoint on."""
    import errno

    original = torch.save
    calls = []

    def save(contents: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) >= number:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(contents, file)

    torch.save = save


def signal_in_setup(number: int) -> None:
    """Patch: a signal arrives while the data is being looked at."""
    from vjepa_fast.train import pretraining

    original = pretraining.build_loader

    def build_loader(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    pretraining.build_loader = build_loader


def signal_in_step(step: int, number: int, times: int = 1) -> None:
    """Patch: a signal arrives while a step is computed."""
    from vjepa_fast.train.trainer import Trainer

    original = Trainer.run_step

    def run_step(self: Trainer, batch: Any) -> Any:
        result = original(self, batch)
        if self.step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return result

    Trainer.run_step = run_step  # type: ignore[method-assign]


def set_environment(variables: dict[str, str]) -> None:
    """Patch: environment variables, as a launcher sets them."""
    os.environ.update(variables)


def hang_at(step: int) -> None:
    """Patch: waiting for the clips of a step never ends."""
    from vjepa_fast.train.trainer import Trainer

    original = Trainer._take

    def take(self: Trainer, batches: Any) -> Any:
        while self.step == step:
            time.sleep(1)
        return original(self, batches)

    Trainer._take = take  # type: ignore[method-assign]


def read_only_at_checkpoint(number: int) -> None:
    """Patch: from the given checkpoint on no file can be made in its folder (also by root, who may always)."""
    import errno

    from vjepa_fast.common import atomic

    original = os.replace
    calls = []

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "latest.pt" or Path(target).suffix == ".dcp":
            calls.append(1)
            if len(calls) >= number:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
        original(source, target)

    atomic.os.replace = replace
