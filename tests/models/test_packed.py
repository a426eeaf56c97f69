"""The packed step against a plain loop over masks and clips: the oracle for every faster version of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.packed import config, gradients, make_batch
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.jepa import VJEPA


def loop_loss(model: VJEPA, clips: list[Tensor], masks: list[MaskBatch]) -> Tensor:
    """One clip and one mask at a time, with dense calls only."""
    pairs = []
    for place, (group, batch) in enumerate(zip(clips, masks, strict=True)):
        with torch.no_grad():
            features = model.target_encoder(group)
        context = batch.context_ids.long().split(list(batch.context_lengths))
        target = batch.target_ids.long().split(list(batch.target_lengths))
        for mask in range(batch.num_masks):
            distances = []
            for clip in range(batch.batch_size):
                c, t = (ids[mask * batch.batch_size + clip][None] for ids in (context, target))
                z = model.encoder(group[clip : clip + 1], masks=[c])
                prediction = model.predictor(z, c, t, mask_index=place)[0]
                wanted = F.layer_norm(features[clip, t[0]], features.shape[-1:])
                distances.append((prediction - wanted).abs() ** model.loss_exp)
            pairs.append(torch.cat(distances).mean() / model.loss_exp)
    return torch.stack(pairs).mean()


CASES = {
    "rope": {},
    "rope interleaved": {"rope_style": "interleaved"},
    "sincos": {"use_rope": False, "uniform_power": True},
    "learned positions, mixed frames per clip": {"use_rope": False, "positions": "learned", "fpcs": (8, 4)},
    "swiglu": {"use_silu": True, "use_pred_silu": True},
    "mixed frames per clip": {"fpcs": (8, 4)},
    "sincos, mixed frames per clip": {"use_rope": False, "fpcs": (8, 4)},
    "no truncation": {"truncate": "none"},
    "no truncation, mixed frames per clip": {"truncate": "none", "fpcs": (8, 4)},
    "activation checkpointing": {"use_activation_checkpointing": True},
    "squared error": {"loss_exp": 2.0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_packed_step_equals_a_loop_over_masks_and_clips(case):
    case = dict(case)
    loss_exp = case.pop("loss_exp", 1.0)
    cfg = config(**case)
    torch.manual_seed(0)
    model = VJEPA(cfg.model, loss_exp=loss_exp)
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    clips, masks = make_batch(cfg)
    packed, loop = model(clips, masks).loss, loop_loss(model, clips, masks)
    assert float(packed.detach()) == pytest.approx(float(loop.detach()), rel=1e-5)
    ours, oracle = gradients(model, packed), gradients(model, loop)
    assert ours.keys() == oracle.keys()
    # Without rotation a key bias shifts all scores of a query alike: its gradient is zero but for rounding.
    whole = torch.linalg.vector_norm(torch.stack([g.norm() for g in oracle.values()]))
    for name, grad in ours.items():
        difference = (grad - oracle[name]).norm()
        assert difference <= 1e-5 * oracle[name].norm() or difference <= 1e-7 * whole, name


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"truncate": "none"},
        {"use_rope": False},
        {"use_silu": True, "use_pred_silu": True},
        {"use_activation_checkpointing": True},
        {"drop_path_rate": 0.5},
        {"mask_token_by": "mask"},
        {"use_rope": False, "positions": "learned"},
    ],
    ids=str,
)
def test_room_behind_the_tokens_changes_nothing(case):
    cfg = config(**case)
    torch.manual_seed(0)
    model = VJEPA(cfg.model, reg_coeff=0.1)
    clips, (masks,) = make_batch(cfg)
    totals = sum(masks.context_lengths), sum(masks.target_lengths)
    results = []
    for some in (masks, masks.padded((totals[0] + 13, totals[1] + 5))):
        torch.manual_seed(1)
        out = model(clips, some)
        assert len(out.packed_predictions) == len(some.target_ids)
        results.append((out, gradients(model, out.loss)))
    (plain, expected), (padded, ours) = results
    torch.testing.assert_close(padded.loss, plain.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(padded.packed_predictions[: totals[1]], plain.packed_predictions, rtol=1e-4, atol=1e-6)
    if cfg.mask.truncate == "batch_min":
        for a, b in zip(padded.predictions[0], plain.predictions[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    whole = torch.linalg.vector_norm(torch.stack([g.norm() for g in expected.values()]))
    for name, grad in ours.items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-7 * whole, name


def test_room_between_groups_is_refused():
    cfg = config(fpcs=(8, 4))
    clips, masks = make_batch(cfg)
    with pytest.raises(ValueError, match="one frames-per-clip group"):
        VJEPA.from_config(cfg)(clips, [masks[0].padded((9999, 9999)), masks[1]])


def test_a_clip_alone_gives_the_same_predictions_as_in_a_batch():
    cfg = config(truncate="none")
    model = VJEPA.from_config(cfg)
    (clips,), (masks,) = make_batch(cfg)
    whole = model(clips, masks)
    alone = model(clips[1:2], masks.narrow(1, 2))
    lengths = list(masks.target_lengths)
    expected = [whole.packed_predictions.split(lengths)[s] for s in (1, 4)]
    torch.testing.assert_close(alone.packed_predictions, torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_no_gradient_reaches_the_target_encoder():
    cfg = config()
    model = VJEPA.from_config(cfg)
    clips, masks = make_batch(cfg)
    names = gradients(model, model(clips, masks).loss).keys()
    assert not any(name.startswith("target_encoder") for name in names)
    assert {n for n, p in model.named_parameters() if p.requires_grad} - set(names) == {
        f"predictor.mask_tokens.{i}" for i in range(1, 2)
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda clips, masks: (clips * 2, masks), "groups"),
        (lambda clips, masks: ([clips[0][:2]], masks), "masks for 3 clips"),
        (lambda clips, masks: ([clips[0][:, :4]], masks), "tokens"),
        (lambda clips, masks: ([clips[0][:, :, :30]], masks), "multiple of 8"),
        (lambda clips, masks: ([clips[0][..., :2]], masks), "expected"),
    ],
)
def test_clips_and_masks_that_do_not_belong_together(change, message):
    cfg = config()
    model = VJEPA.from_config(cfg)
    with pytest.raises(ValueError, match=message):
        model(*change(*make_batch(cfg)))


def test_dense_outputs_need_masks_of_one_length():
    cfg = config(truncate="none")
    model = VJEPA.from_config(cfg)
    out = model(*make_batch(cfg))
    with pytest.raises(ValueError, match="differ in length"):
        _ = out.predictions
