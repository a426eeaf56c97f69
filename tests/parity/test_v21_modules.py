"""V-JEPA 2.1's weights of context tokens and its checkpoints beside ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vjepa_fast.checkpoints import meta_format
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.context_weights import context_weights
from vjepa_fast.train.step import TrainStep

from . import ours, reference_v21
from .cases import make_batch
from .cases_v21 import DENSE_CASES, DenseCase
from .reference import ignore_sdp_warning
from .release import V21
from .test_meta_checkpoint import DataParallelNames, their_checkpoint

pytestmark = [reference_v21.needs_reference, ignore_sdp_warning]


@pytest.mark.parametrize("offset", [False, True])
def test_context_weights(offset: bool) -> None:
    """At a grid at which the offset matters, to the bit."""
    case = DenseCase("distances", frames=(4,), crop_size=512)
    batch = make_batch(case, 0)
    (expected,) = reference_v21.modules().distances.compute_mask_distance(
        [[ids[:, :200] for ids in batch.masks_pred[0]]], [[ids[:, ::9] for ids in batch.masks_enc[0]]], 32, offset
    )
    masks = MaskBatch.from_meta(
        [ids[:, ::9] for ids in batch.masks_enc[0]], [ids[:, :200] for ids in batch.masks_pred[0]], batch.grids[0]
    )
    found = context_weights(
        masks.context_ids,
        masks.cu_seqlens_context,
        masks.target_ids,
        masks.cu_seqlens_target,
        masks.grid,
        2 if offset else 1,
    )
    assert torch.equal(found, torch.cat([1 / distances.flatten() for distances in expected]))


def test_checkpoints_go_both_ways(tmp_path: Path) -> None:
    """A checkpoint of theirs after a step goes on here, and one of ours there: weights, moments and their order."""
    case = DENSE_CASES["dense_both"]
    triple = reference_v21.build(case, torch.float64)
    triple.load(V21.start(case))
    theirs = reference_v21.Training(triple, case)
    theirs.step(make_batch(case, 0))
    torch.save(their_checkpoint(triple, theirs, 0), tmp_path / "theirs.pth.tar")

    model, cfg = ours.build(case, torch.float64)
    train_step = TrainStep(model, cfg)
    meta_format.load_checkpoint(tmp_path / "theirs.pth.tar", model, train_step.optimizer)
    for number in (1, 2):
        expected = theirs.step(make_batch(case, number))
        found = train_step(number, *ours.v21_inputs(model, case, number))
        assert float(found.loss) == pytest.approx(expected.loss, rel=1e-12)
    for name, value in ours.weights_of(model).items():
        assert (value - triple.weights()[name]).abs().max() <= 1e-9, name

    meta_format.save_checkpoint(
        tmp_path / "ours.pt", model, train_step.optimizer, epoch=0, loss=1.0, batch_size=2, world_size=1, lr=1e-3
    )
    saved = meta_format.read(tmp_path / "ours.pt")
    again = reference_v21.build(case, torch.float64)
    for part, module in again.parts():
        DataParallelNames(module).load_state_dict(saved[part])
    other = reference_v21.Training(again, case)
    other.optimizer.load_state_dict(saved["opt"])
    for (_, one), (_, two) in zip(again.parts(), triple.parts(), strict=True):
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
            for key, value in theirs.optimizer.state.get(b, {}).items():
                torch.testing.assert_close(other.optimizer.state[a][key].to(value), value, rtol=1e-6, atol=1e-12)
