"""What a clip costs where several are taken from one decoded video (data.clips_per_video), on one core.

    python -m experiments.clips_per_video --folder FOLDER

FOLDER keeps the videos, which are made once. Core-milliseconds a clip by getrusage, the lowest of three rounds in
turns.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.clip_sources import KINDS, requests
from benchmarks.compare_decode import core_ms
from vjepa_fast.common import markdown
from vjepa_fast.data.decode.index import build_index
from vjepa_fast.data.decode.pyav import decode_clips
from vjepa_fast.data.decode.request import VideoSource

COUNTS = 1, 2, 4
NUM_CLIPS, NUM_ROUNDS = 12, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the videos")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    print("\n".join(markdown.table(["source", *(f"{count} of a video" for count in COUNTS)], [])))
    for kind in KINDS[:2]:
        [path] = kind.write(folder, 1)
        clips = requests([VideoSource(str(path), build_index(str(path)))], NUM_CLIPS, (256, 256))
        best = dict.fromkeys(COUNTS, float("inf"))
        for _ in range(NUM_ROUNDS):
            for count in COUNTS:
                before = core_ms()
                for first in range(0, NUM_CLIPS, count):
                    decode_clips(clips[first : first + count])
                best[count] = min(best[count], (core_ms() - before) / NUM_CLIPS)
        print(markdown.row([kind.name, *(f"{best[count]:.0f}" for count in COUNTS)]), flush=True)


if __name__ == "__main__":
    main()
