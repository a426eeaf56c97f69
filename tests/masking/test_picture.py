"""The picture of masks: every token has the look of its role, and no text lies on another or on a frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vjepa_fast.config.schema import MaskSpec
from vjepa_fast.masking import picture
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.picture import CONTEXT, NEITHER, TARGET, Panel

GRID = (4, 3, 5)


def make_masks(num_masks: int = 2, batch_size: int = 3, grid: tuple[int, int, int] = GRID) -> tuple[MaskBatch, Any]:
    """Masks in which every token is anything, and the roles [M, B, T, H, W] they were made from."""
    roles = np.random.default_rng(0).integers(0, 3, (num_masks, batch_size, *grid)).astype(np.uint8)
    flat = torch.from_numpy(roles.reshape(num_masks, batch_size, -1))
    return MaskBatch.from_bool(flat == CONTEXT, flat == TARGET, grid), roles


def make_panel(masks: MaskBatch, **changes: Any) -> Panel:
    side, (num_frames, height, width) = picture.token_size(masks.grid), masks.grid
    shape = (num_frames, height * side, width * side, 3)
    frames = [np.random.default_rng(clip).integers(0, 255, shape, dtype=np.uint8) for clip in range(masks.batch_size)]
    names = [f"mask number {mask}" for mask in range(masks.num_masks)]
    given = {"masks": masks, "names": names, "sample_ids": range(masks.batch_size), "frames": frames, "tubelet_size": 2}
    return Panel(**{**given, **changes})


def check_look(pixels: np.ndarray, frame: np.ndarray, role: int) -> None:
    """Pixels of one token, [h, w, 3]."""
    red, green, blue = (pixels[..., i].astype(int) for i in range(3))
    if role == CONTEXT:
        assert (pixels == frame).all()
    elif role == TARGET:
        assert (red - blue).min() > 80 and (green - blue).min() > 40
    else:
        assert role == NEITHER and (red == green).all() and (green == blue).all() and red.min() > 110


def test_roles_are_those_of_the_masks() -> None:
    masks, roles = make_masks()
    for mask in range(2):
        for clip in range(3):
            np.testing.assert_array_equal(picture.roles(masks, mask, clip), roles[mask, clip])
    first_mask = (roles[0] == CONTEXT).mean(), (roles[0] == TARGET).mean()
    assert picture.mean_shares(masks, 0) == pytest.approx(first_mask)
    assert picture.mean_shares(masks, 1) != pytest.approx(first_mask)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (0, 0, 255), (255, 120, 0)])
def test_look_does_not_hang_on_the_colour_of_the_frame(colour: tuple[int, int, int]) -> None:
    role = np.array([[CONTEXT, TARGET], [NEITHER, CONTEXT]], dtype=np.uint8)
    frame = np.full((20, 20, 3), colour, dtype=np.uint8)
    painted = picture.paint(frame, role)
    for (h, w), kind in np.ndenumerate(role):
        place = np.s_[h * 10 : h * 10 + 10, w * 10 : w * 10 + 10]
        check_look(painted[place], frame[place], kind)


@pytest.mark.parametrize("num_frames", [4, 16])
def test_every_token_of_the_file(num_frames: int, tmp_path: Path) -> None:
    masks, roles = make_masks(2, 2, (num_frames, 3, 5))
    panel = make_panel(masks)
    out = tmp_path / "a.png"
    picture.draw([panel], "title", ["a fact"], out)
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert pixels.shape[0] == picture.picture_height([panel], "title", ["a fact"])
    top, left = pixels.shape[0] - 16 - panel.height, pixels.shape[1] - 16 - panel.width
    side = picture.token_size(masks.grid)
    seen = set()
    for clip, mask, frame, y, x in panel.tiles():
        seen.add((clip, mask, frame))
        for (h, w), role in np.ndenumerate(roles[mask, clip, frame]):
            # The outermost pixels of the image may be those beside them.
            inner = np.s_[h * side + 1 : (h + 1) * side - 1, w * side + 1 : (w + 1) * side - 1]
            tile = pixels[top + y : top + y + panel.tile[0], left + x : left + x + panel.tile[1]]
            check_look(tile[inner], panel.frames[clip][frame][inner], role)
    assert len(seen) == 2 * 2 * min(num_frames, picture.MAX_COLUMNS)


def test_columns() -> None:
    assert picture.columns_of(1) == [0]
    assert picture.columns_of(8) == list(range(8))
    for num_frames in (9, 16, 32, 255):
        shown = picture.columns_of(num_frames)
        assert (len(shown), shown[0], shown[-1]) == (8, 0, num_frames - 1)
        gaps = np.diff(shown)
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("grid", [(1, 1, 1), (8, 16, 16), (16, 4, 64), (2, 64, 4)])
def test_width_of_the_picture(grid: tuple[int, int, int], tmp_path: Path) -> None:
    masks = MaskBatch.from_dense(torch.zeros(1, 1, *grid, dtype=torch.bool))
    picture.draw([make_panel(masks)], "title", [], tmp_path / "a.png")
    assert 900 <= Image.open(tmp_path / "a.png").width <= 1800


@pytest.mark.parametrize(("grid", "num_masks"), [(GRID, 1), ((9, 4, 64), 2), ((1, 1, 1), 1)])
def test_no_text_lies_on_another(
    grid: tuple[int, int, int], num_masks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    spec = MaskSpec(
        strategy="mixture", ratio=0.123, max_keep=1000, max_temporal_keep=0.55, full_complement=True, inv_block=True
    )
    masks = MaskBatch.from_dense(torch.zeros(num_masks, 2, *grid, dtype=torch.bool))
    panel = make_panel(
        masks,
        names=[picture.describe(spec)] * num_masks,
        heading="clips of 16 frames",
        sample_ids=[123456789, 123456790],
    )
    picture.draw([panel, panel], "A long title $with$ " + "x" * 200, ["a long fact " * 30, "short"], tmp_path / "a.png")
    (figure,) = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.texts]
    tops = [figure.bbox.height - 16 - panel.height * count for count in (2, 1)]
    for place, (words, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, words
        for other, other_box in boxes[:place]:
            assert not box.overlaps(other_box), (words, other)
        for top in tops:
            for _, _, _, y, x in panel.tiles():
                upper = figure.bbox.height - top - y
                beside = box.x1 <= 268 + x or box.x0 >= 268 + x + panel.tile[1]
                assert beside or box.y0 >= upper or box.y1 <= upper - panel.tile[0], words


@pytest.mark.parametrize("ending", [".pdf", ".svg", ".PNG"])
def test_formats(ending: str, tmp_path: Path) -> None:
    out = tmp_path / f"a{ending}"
    picture.draw([make_panel(make_masks(1, 1)[0])], "title", [], out)
    starts = {".pdf": b"%PDF", ".svg": b"<?xml", ".png": b"\x89PNG"}
    assert out.read_bytes().startswith(starts[ending.lower()])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spatial_scale": (0.15, 0.15), "num_blocks": 8}, "8 blocks of 0.15"),
        ({"spatial_scale": (0.2, 0.8), "temporal_scale": (0.5, 0.5)}, "1 block of 0.2 to 0.8, time 0.5"),
        ({"strategy": "future", "ratio": 0.5}, "future 0.5"),
        ({"strategy": "mixture", "ratio": 0.4}, "mixture 0.4, 0.5 temporal"),
        ({"strategy": "tube", "ratio": 0.9, "full_complement": True}, "tube 0.9, full_complement"),
        ({"strategy": "patches", "max_keep": 7, "inv_block": True}, "patches 0.4, max_keep 7, inv_block"),
        ({"strategy": "temporal", "max_temporal_keep": 0.5}, "temporal 0.4, max_temporal_keep 0.5"),
    ],
)
def test_descriptions(options: dict[str, Any], words: str) -> None:
    assert picture.describe(MaskSpec(**options)) == words
