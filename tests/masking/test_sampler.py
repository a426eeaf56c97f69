"""Truncation, packing and loss weights of the training masks."""

import itertools

import numpy as np
import pytest
import torch

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config.schema import MaskConfig, MaskSpec
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.masking.sampler import MaskSampler, StepMasks

GRID = (4, 8, 8)
MASKS = [
    MaskSpec(spatial_scale=(0.15, 0.15), aspect_ratio=(0.75, 1.5), num_blocks=4),
    MaskSpec(spatial_scale=(0.6, 0.6), aspect_ratio=(0.75, 1.5), num_blocks=2),
]


def config(**keys) -> MaskConfig:
    return MaskConfig(masks=MASKS, **keys)


def step_masks(
    cfg: MaskConfig, world_size: int = 1, global_batch: int = 8, fpcs=(8,), group_of=None, **keys
) -> StepMasks:
    return StepMasks(
        cfg,
        fpcs=list(fpcs),
        crop_size=(64, 64),
        patch_size=8,
        tubelet_size=2,
        seed=3,
        global_batch=global_batch,
        group_of=group_of or (lambda ids: np.zeros(len(ids), dtype=np.int64)),
        world_size=world_size,
        **keys,
    )


def rows(batch: MaskBatch):
    """(mask, clip) -> (context ids, target ids)."""
    context = batch.context_ids.split(list(batch.context_lengths))
    target = batch.target_ids.split(list(batch.target_lengths))
    pairs = enumerate(zip(context, target, strict=True))
    return {divmod(s, batch.batch_size): (c.tolist(), t.tolist()) for s, (c, t) in pairs}


def test_masks_do_not_depend_on_how_a_step_is_split():
    sampler = MaskSampler(config(group_size=4), GRID, seed=9)
    whole = rows(sampler(5, range(40, 48)))
    for parts in ([range(40, 44), range(44, 48)], [range(40, 41), range(41, 46), range(46, 48)]):
        for part in parts:
            for (mask, clip), ids in rows(sampler(5, part)).items():
                assert ids == whole[mask, clip + part.start - 40]


def test_truncation_keeps_the_first_ids_up_to_the_shortest_of_the_group():
    full = rows(MaskSampler(config(truncate="none"), GRID, seed=9)(0, range(8)))
    cut = rows(MaskSampler(config(group_size=4), GRID, seed=9)(0, range(8)))
    for mask, part in itertools.product(range(2), (range(4), range(4, 8))):
        for kind in range(2):
            shortest = min(len(full[mask, clip][kind]) for clip in part)
            for clip in part:
                assert cut[mask, clip][kind] == full[mask, clip][kind][:shortest]


def test_without_truncation_every_token_is_context_or_target():
    for context, target in rows(MaskSampler(config(truncate="none"), GRID, seed=1)(3, range(6))).values():
        assert sorted(context + target) == list(range(256))


@pytest.mark.parametrize(
    "keys, check",
    [
        ({"max_keep": 7}, lambda c, t: len(c) == 7),
        ({"max_temporal_keep": 0.5}, lambda c, t: max(c) < 128),
        ({"full_complement": True}, lambda c, t: sorted(c + t) == list(range(256))),
        ({"pred_full_complement": True}, lambda c, t: sorted(c + t) == list(range(256))),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options(keys, check):
    cfg = MaskConfig(masks=[MASKS[0].model_copy(update=keys)], group_size=4)
    assert all(check(c, t) for c, t in rows(MaskSampler(cfg, GRID, seed=2)(1, range(4))).values())


def test_inverted_blocks_swap_the_roles():
    plain, swapped = (
        rows(
            MaskSampler(MaskConfig(masks=[MASKS[1].model_copy(update={"inv_block": inv})], group_size=4), GRID, 2)(
                0, range(4)
            )
        )
        for inv in (False, True)
    )
    assert {key: (t, c) for key, (c, t) in plain.items()} == swapped


def test_index_lists_round_trip():
    batch = MaskSampler(config(group_size=4), GRID, seed=0)(0, range(4))
    enc, pred = batch.to_meta()
    assert [x.shape[0] for x in enc] == [4, 4] and enc[0].dtype == torch.int64
    again = MaskBatch.from_meta(enc, pred, GRID)
    assert rows(again) == rows(batch)
    with pytest.raises(ValueError, match="one length"):
        MaskSampler(config(truncate="none"), GRID, seed=0)(0, range(4)).to_meta()


def test_packed_rows_and_cumulative_lengths():
    batch = MaskSampler(config(truncate="none"), GRID, seed=0)(0, range(3))
    assert batch.cu_seqlens_context[-1] == len(batch.context_ids)
    assert batch.cu_seqlens[-1] == len(batch.context_ids) + len(batch.target_ids)
    assert batch.cu_seqlens.dtype == torch.int32
    expected = [clip * 256 + i for (_, clip), (ids, _) in sorted(rows(batch).items()) for i in ids]
    assert batch.context_rows.tolist() == expected


def test_from_dense():
    target = torch.zeros(2, *GRID, dtype=torch.bool)
    target[:, 2:] = True
    batch = MaskBatch.from_dense(target)
    assert rows(batch)[0, 1] == (list(range(128)), list(range(128, 256)))
    flat = MaskBatch.from_dense(target.flatten(-2)[None].expand(3, -1, -1, -1), grid=GRID)
    assert flat.num_masks == 3 and rows(flat)[2, 0] == rows(batch)[0, 0]
    for bad, message in (
        (target.float(), "bool"),
        (torch.ones_like(target), "no context"),
        (target.flatten(-2), "grid"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskBatch.from_dense(bad)
    with pytest.raises(ValueError, match="both"):
        MaskBatch.from_dense(target, context=target)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda ids: MaskBatch.from_meta([ids], [], GRID), "same number"),
        (lambda ids: MaskBatch.from_meta([ids], [ids + 256], GRID), "tokens 0 to 255"),
        (lambda ids: MaskBatch.from_meta([ids], [ids[:1]], GRID), "shape"),
    ],
)
def test_bad_index_lists(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.arange(8).view(2, 4))


def total_weight(batches) -> float:
    return sum(float(batch.token_weights().sum()) for batch in batches)


@pytest.mark.parametrize("truncate, group_size", [("batch_min", 4), ("batch_min", 8), ("none", None)])
def test_weights_of_a_step_add_up_to_one(truncate, group_size):
    masks = step_masks(config(truncate=truncate, group_size=group_size))
    assert total_weight(masks(0, [torch.arange(8)], [0])) == pytest.approx(1)


def test_weights_are_the_references_mean_in_a_batch_of_one_group():
    cfg = config(group_size=8)
    weighed = step_masks(cfg)(0, [torch.arange(8)], [0])[0]
    plain = MaskSampler(cfg, GRID, seed=3)(0, range(8))
    assert torch.allclose(weighed.token_weights(), plain.token_weights())


def test_weights_with_mixed_frames_per_clip():
    def group_of(ids):
        return (ids % 3 == 0).astype(np.int64)

    ids = np.arange(8)
    by_group = [torch.from_numpy(ids[group_of(ids) == g]) for g in (0, 1)]
    masks = step_masks(config(group_size=4), fpcs=(8, 4), group_of=group_of)
    whole = masks(0, by_group, [0, 1])
    assert total_weight(whole) == pytest.approx(1)
    assert [batch.grid[0] for batch in whole] == [4, 2]
    # The same step on two processes: same masks, same weights.
    parts = []
    for half in (ids[:4], ids[4:]):
        present = sorted(set(group_of(half)))
        parts.append(masks(0, [torch.from_numpy(half[group_of(half) == g]) for g in present], present))
    assert total_weight(parts[0]) + total_weight(parts[1]) == pytest.approx(1)
    for g in (0, 1):
        split = torch.cat([p[g].token_weights().view(2, -1).sum(1) for p in parts])
        assert float(split.sum()) == pytest.approx(float(whole[g].token_weights().sum()))


def test_weights_without_truncation_use_the_tokens_of_all_processes():
    def pretend_equal_neighbour(counts):
        counts.mul_(2)

    masks = step_masks(config(truncate="none"), world_size=2, sum_over_processes=pretend_equal_neighbour)
    assert total_weight(masks(0, [torch.arange(4)], [0])) == pytest.approx(0.5)


def test_truncation_groups_must_fit_into_a_step():
    with pytest.raises(ConfigError, match="group_size"):
        step_masks(config(group_size=3))


def test_reference_source_restores_its_state():
    cfg = config(source="reference")
    ids = [torch.arange(8)]
    masks = step_masks(cfg)
    masks(0, ids, [0])
    state = masks.state_dict()
    expected = rows(masks(1, ids, [0])[0])
    again = step_masks(cfg)
    again.load_state_dict(state)
    assert rows(again(1, ids, [0])[0]) == expected
    assert total_weight(again(2, ids, [0])) == pytest.approx(1)


def test_what_the_reference_stream_cannot_do_is_said():
    with pytest.raises(ConfigError, match="batch_min"):
        step_masks(config(source="reference", truncate="none"))
    with pytest.raises(ConfigError, match="one process"):
        step_masks(config(source="reference"), world_size=2)
    with pytest.raises(ConfigError, match="counter"):
        MaskSampler(config(source="reference"), GRID, seed=0)


@pytest.mark.parametrize("truncate", ["batch_min", "none"])
def test_clips_of_a_video_share_their_masks(truncate):
    """Clip c has the masks that clip c // 2 of a run without sharing has; the loss is the mean over all clips."""
    shared = step_masks(config(truncate=truncate, group_size=4, clips_per_mask=2), global_batch=8)
    alone = step_masks(config(truncate=truncate, group_size=2), global_batch=4)
    (ours,), (theirs,) = shared(3, [torch.arange(24, 32)], [0]), alone(3, [torch.arange(12, 16)], [0])
    expected, found = rows(theirs), rows(ours)
    assert all(found[mask, clip] == expected[mask, clip // 2] for mask, clip in found)
    assert float(ours.token_weights().sum()) == pytest.approx(1)
    weights = np.array(ours.loss_weights).reshape(2, 8)
    assert np.allclose(weights, np.repeat(np.array(theirs.loss_weights).reshape(2, 4), 2, axis=1) / 2)


def test_shared_masks_at_any_number_of_processes():
    """Two clips of a video may lie in two processes."""
    cfg = config(group_size=6, clips_per_mask=2)
    (whole,) = step_masks(cfg, global_batch=6)(1, [torch.arange(6, 12)], [0])
    for rank in range(2):
        ids = torch.arange(6 + 3 * rank, 9 + 3 * rank)
        (part,) = step_masks(cfg, global_batch=6, world_size=2, rank=rank)(1, [ids], [0])
        expected = rows(whole)
        assert all(own == expected[mask, clip + 3 * rank] for (mask, clip), own in rows(part).items())
        assert part.loss_weights == whole.narrow(3 * rank, 3 * rank + 3).loss_weights


def test_shared_masks_of_the_references_stream():
    (batch,) = step_masks(config(source="reference", clips_per_mask=2))(0, [torch.arange(8)], [0])
    found = rows(batch)
    assert all(found[mask, clip] == found[mask, clip - 1] for mask, clip in found if clip % 2)
    assert found[0, 0] != found[0, 2] and float(batch.token_weights().sum()) == pytest.approx(1)


def test_groups_that_cut_shared_masks_are_refused():
    with pytest.raises(ConfigError, match=r"group_size=3\b.*\b6 clips.*groups of 2\b"):
        step_masks(config(group_size=3, clips_per_mask=2), global_batch=6)


@pytest.mark.parametrize("side", [4, 14, 15, 24])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9, 1 - 19 / 196])
def test_tubes_that_round_the_context_down(side, ratio):
    """int(places * (1 - ratio)) places are seen, the same ones in every frame."""
    spec = MaskSpec(strategy="tube", ratio=ratio, round_context_down=True)
    seen = int(side * side * (1.0 - ratio))
    batch = MaskSampler(MaskConfig(masks=[spec]), (3, side, side), seed=1)(0, range(3))
    assert batch.context_lengths == (3 * seen,) * 3
    for context, _ in rows(batch).values():
        frames = np.array(context).reshape(3, seen) - side * side * np.arange(3)[:, None]
        assert (frames == frames[0]).all()
