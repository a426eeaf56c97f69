"""Initialises a new run from the weights of a pretrained model (train.init_weights)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vjepa_fast.checkpoints import infer_config
from vjepa_fast.checkpoints.meta_format import load_network
from vjepa_fast.checkpoints.open import Checkpoint, open_checkpoint
from vjepa_fast.common.errors import UserError
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.models.sizes import SIZES


def init_weights(path: str | Path, model: VJEPA, predictor: bool = True) -> str:
    """Fill a model from whatever vjepa_fast.checkpoints.open.open_checkpoint reads.

    The encoder is filled from the student (`encoder`) and the target encoder from the teacher (`target_encoder`,
    `ema_encoder`); where the file has one of them only, it fills both. Of a run on pixels, whose average taught
    nothing, the student does.

    Args:
        path: a file or folder. All processes read it, of shards as much as they keep.
        model: filled strictly; its parameters may be shards.
        predictor: False leaves the predictor as it is.

    Returns:
        What was taken for what, in a sentence.

    Raises:
        UserError: the file cannot be read, does not fit or has no predictor.
    """
    checkpoint = open_checkpoint(path)
    teacher = checkpoint.choose()
    student = "encoder" if "encoder" in checkpoint.encoders else teacher
    if predictor and checkpoint.predictor is None:
        other = (
            "an action-conditioned predictor, which cannot be trained here"
            if checkpoint.action_predictor
            else ("no predictor")
        )
        raise UserError(
            f"checkpoint {checkpoint.path} holds {other}; set train.init_predictor=false to begin with a "
            "new predictor, or give a file that has one"
        )
    if not predictor:
        checkpoint = replace(checkpoint, predictor=None)
    remark = _check_unseen(checkpoint, student, model)
    parts = {"encoder": checkpoint.encoders[student], "target_encoder": checkpoint.encoders[teacher]}
    if checkpoint.predictor is not None:
        parts["predictor"] = checkpoint.predictor
    for name, state in parts.items():
        what = {"encoder": student, "target_encoder": teacher}.get(name, name)
        try:
            # A copy of the dictionary, of which the position tables that nothing reads are taken out.
            load_network(getattr(model, name), dict(state), what)
        except UserError as error:
            fits = infer_config.fitting(checkpoint.encoders[student], checkpoint.predictor)
            distilled = (
                "; its predictor is of a larger teacher's features: set train.init_predictor=false"
                if ("teacher_embed_dim" in fits)
                else ""
            )
            raise UserError(
                f"{error}" + (f". A config that fits {checkpoint.path} has {fits}" if fits else "") + distilled
            ) from None
    encoders = (
        f"encoder from {student}, target encoder from {teacher}"
        if student != teacher
        else (
            f"encoder and target encoder from {student}, the only one that is used"
            if len(checkpoint.encoders) > 1
            else f"encoder and target encoder from {student}, the only one there"
        )
    )
    return (
        f"starting at step 0 with a new optimizer from the weights of {checkpoint.path}: {encoders}, "
        + ("predictor from the file too" if predictor else "a new predictor (train.init_predictor is false)")
        + remark
    )


def _check_unseen(checkpoint: Checkpoint, weights: str, model: VJEPA) -> str:
    """What shapes do not tell, and a strict load would pass over: how positions enter, and the number of heads.

    Returns:
        A remark, or nothing.

    Raises:
        UserError: the file says that its model has others.
    """
    source = f"the {weights} of checkpoint {checkpoint.path}"
    found, _ = infer_config.guess(checkpoint.encoders[weights], checkpoint.predictor, checkpoint.model, source=source)
    if found.use_rope != model.cfg.use_rope:
        kinds = {True: "rotary positions", False: "tables of positions"}
        raise UserError(
            f"{source} has {kinds[found.use_rope]}, the configured model {kinds[model.cfg.use_rope]}; set "
            f"model.use_rope={str(found.use_rope).lower()}"
        )
    heads, own = found.num_heads or SIZES[found.model_name].num_heads, model.encoder.num_heads
    if own == heads:
        return ""
    if checkpoint.model:
        raise UserError(f"{source} has {heads} heads, the configured model {own}; set model.num_heads={heads}")
    # Of another width than the released ones the number is a mere guess.
    return (
        ""
        if found.embed_dim is not None
        else (
            f". The released model of this width, {found.model_name}, has {heads} heads, the configured one {own}; no "
            "shape tells which it is"
        )
    )
