"""The kernel of rope3d.py, which says what it does and has the legend."""

from __future__ import annotations

from vjepa_fast.ops.triton_support.dispatch import jit, tl


@jit
def _rope3d_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [L, rows, HEAD_DIM], token stride x_stride
    y_ptr,  # the same, token stride y_stride; may be x
    ids_ptr,  # integer [L]
    cos_ptr,  # fp32 [T + h + w, AXIS]
    sin_ptr,  # fp32 [T + h + w, AXIS]
    x_stride,
    y_stride,
    num_tokens,
    num_frames,
    height,
    width,
    num_rows,  # heads of queries, keys and, where they are copied, values
    num_turned,  # heads of queries and keys
    HEAD_DIM: tl.constexpr,
    AXIS: tl.constexpr,
    ROUND: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = tokens < num_tokens
    ids = tl.load(ids_ptr + tokens, mask=here, other=0).to(tl.int32)
    frame = ids // (height * width)
    inside = ids - frame * (height * width)
    row = inside // width
    column = inside - row * width

    cols = tl.arange(0, COLS)
    axis = (cols // AXIS)[None, :]
    place = tl.where(
        axis == 0, frame[:, None], tl.where(axis == 1, num_frames + row[:, None], num_frames + height + column[:, None])
    )
    place = place * AXIS + (cols % AXIS)[None, :]
    turned = (cols < 3 * AXIS)[None, :]
    cos = tl.load(cos_ptr + place, mask=here[:, None] & turned, other=1.0)[:, None, :]
    sin = tl.load(sin_ptr + place, mask=here[:, None] & turned, other=0.0)[:, None, :]

    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        offsets = (rows * HEAD_DIM)[:, None] + cols[None, :]
        # What is left over of a head is loaded and stored as well, unchanged: it shares its sectors with what is
        # rotated, and whole heads make whole 16-byte accesses.
        inside_head = ((rows < num_rows)[:, None] & (cols < HEAD_DIM)[None, :])[None, :, :] & here[:, None, None]
        x = tl.load(x_ptr + tokens[:, None, None] * x_stride + offsets[None, :, :], mask=inside_head, other=0.0)
        x = x.to(tl.float32)
        even, odd = tl.split(tl.reshape(x, (TOKENS, ROWS, COLS // 2, 2)))
        swapped = tl.reshape(tl.join(odd, even), (TOKENS, ROWS, COLS))
        along, across = x * cos, swapped * sin
        if ROUND:
            along = along.to(y_ptr.dtype.element_ty).to(tl.float32)
            across = across.to(y_ptr.dtype.element_ty).to(tl.float32)
        y = tl.where((rows < num_turned)[None, :, None] & turned[:, None, :], along + across, x)
        tl.store(
            y_ptr + tokens[:, None, None] * y_stride + offsets[None, :, :],
            y.to(y_ptr.dtype.element_ty),
            mask=inside_head,
        )
