"""Checkpoints of shards go on at any number of processes, with every kind of parallelism."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.harness import Runner, losses, no_leftovers, record_clips, start_tasks, wait_until
from vjepa_fast.checkpoints.run_folder import newest_checkpoint

SHARDED, FSDP = "train.checkpoint_format=sharded", "train.parallel=fsdp"
BACKGROUND, SPREAD = "train.async_checkpoint=true", "train.shard_optimizer=true"


def clips(folder: Path) -> list[str]:
    return sorted(line for path in folder.glob("clips_*") for line in path.read_text().splitlines())


def test_any_number_of_processes_goes_on(runner: Runner, config: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 2 -> 4 -> 1 -> 2 processes, at once and in the background, to the single file and back."""
    out, alone = tmp_path / "run", tmp_path / "alone"

    def train(folder: Path, count: int, steps: int, *changes: str) -> str:
        record = [(record_clips, (folder,))]
        folder.mkdir(exist_ok=True)
        runs = start_tasks(
            runner,
            "--config",
            config,
            "--out",
            folder,
            "--resume",
            "--max-steps",
            steps,
            *changes,
            patches=record,
            first_patches=record,
            count=count,
        )
        for run in runs:
            assert run.wait() == 0 and run.stderr == "", run.stderr
        return runs[0].stdout

    train(out, 2, 3, FSDP, BACKGROUND)
    assert sorted(path.name for path in (out / "step3.dcp").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "manifest.json",
        "run.pt",
    ]
    assert "step3.dcp at step 3\n" in train(out, 1, 6, SHARDED)
    assert "step6.dcp at step 6\n" in train(out, 2, 9, SHARDED, SPREAD)
    assert "step9.dcp at step 9\n" in train(out, 4, 12, FSDP, BACKGROUND)
    assert "step12.dcp at step 12\n" in train(out, 1, 14)
    assert newest_checkpoint(out) == out / "latest.pt"
    said = train(out, 2, 15, FSDP)
    assert "latest.pt at step 14\n" in said and "changed" not in said
    # The file that the run went on from has the name of its step now.
    assert newest_checkpoint(out) == out / "step15.dcp" and not (out / "latest.pt").exists()
    assert (out / "step14.pt").exists() and no_leftovers(out)
    train(alone, 1, 15)
    pairs = [(float(a), float(b)) for a, b in zip(losses(out), losses(alone), strict=True)]
    assert len(pairs) == 15 and max(abs(a - b) / b for a, b in pairs) <= 1e-6
    assert clips(out) == clips(alone) and len(clips(out)) == 15 * 4


def test_a_process_that_dies_while_shards_are_written(runner: Runner, config: Path, tmp_path: Path) -> None:
    """The second of two is killed in the middle of its part; the run goes on from the folder before."""
    from tests.e2e.harness import kill_in_shards

    out = tmp_path / "run"
    arguments = ("--config", config, "--out", out, "--resume", "--max-steps", 9, FSDP)
    first, second = start_tasks(runner, *arguments, patches=[(kill_in_shards, (2, 5))])
    assert second.wait() == -9 and first.wait() != 0 and "Traceback" not in first.stderr
    assert [path.name for path in out.glob("step*")] == ["step3.dcp"] and list(out.glob(".step6.tmp.dcp"))
    runs = start_tasks(runner, *arguments)
    wait_until(lambda: "step3.dcp at step 3\n" in runs[0].stdout, "the run to go on")
    assert [run.wait() for run in runs] == [0, 0] and no_leftovers(out)
