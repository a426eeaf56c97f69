"""Lists the operations of a training step on our kernels with their arithmetic, bytes and launches.

Bytes are those of the formulas in the files of vjepa_fast/ops; of a matrix product, operands and result once. Attention
is counted as one launch over all packed sequences.

Legend: L tokens of all sequences, D width, F hidden width of the MLP, P predictor width, s bytes of an element.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vjepa_fast.common.profiler_labels import backward_of
from vjepa_fast.config.schema import Config
from vjepa_fast.cost.parameters import Parameters, count_parameters
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.vit import size_of

Kind = Literal["matmul", "attention", "memory"]


@dataclass(frozen=True)
class Operation:
    """One kind of kernel of one part, all its calls in a step together."""

    part: str
    """As vjepa_fast.common.profiler_labels names it; the backward is a part of its own."""
    kind: Kind
    name: str
    num_bytes: float
    flops: float = 0.0
    launches: int = 1
    features: int = 0
    """Narrower side of a matrix product; head dim of attention."""
    length: float = 0.0
    """Sequence length of attention, in tokens, weighted by work."""
    float8: bool = False
    """Whether both operands of a matrix product are float8."""


@dataclass(frozen=True)
class Load:
    """Sequences that a network works on; a mean over steps need not be whole."""

    tokens: float
    squares: float
    """Sum of the squares of the lengths."""

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Load:
        lengths = list(lengths)
        return cls(sum(lengths), sum(length * length for length in lengths))

    @classmethod
    def mean(cls, loads: Sequence[Load]) -> Load:
        return cls(sum(x.tokens for x in loads) / len(loads), sum(x.squares for x in loads) / len(loads))

    @property
    def length(self) -> float:
        """Mean length of a sequence, weighted by its tokens."""
        return self.squares / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Loads:
    """Tokens of a step, or their means over steps."""

    clips: float
    whole: Load
    """All tokens of all clips."""
    context: Load
    target: Load
    both: Load
    """Context and target of a sequence together, as the predictor sees them."""
    image_tokens: float = 0.0
    """Tokens among `whole` that are patches of images (one frame)."""
    image_context: float = 0.0
    """Tokens among `context` that are patches of images."""

    @classmethod
    def of(cls, steps: Sequence[Sequence[MaskBatch]], images: Sequence[bool] = ()) -> Loads:
        """Means over steps.

        Args:
            steps: each a list of one MaskBatch a frames-per-clip group.
            images: which groups are of images, see image_groups; those behind its end are not.
        """

        def mean(lengths: str) -> Load:
            return Load.mean([Load.of(n for batch in step for n in getattr(batch, lengths)) for step in steps])

        clips = [sum(batch.batch_size for batch in step) for step in steps]
        whole = [Load.of(batch.num_tokens for batch in step for _ in range(batch.batch_size)) for step in steps]
        of_images = [batch for step in steps for batch, image in zip(step, images, strict=False) if image]
        return cls(
            sum(clips) / len(steps),
            Load.mean(whole),
            mean("context_lengths"),
            mean("target_lengths"),
            mean("total_lengths"),
            sum(batch.batch_size * batch.num_tokens for batch in of_images) / len(steps),
            sum(sum(batch.context_lengths) for batch in of_images) / len(steps),
        )

    def divided(self, count: int) -> Loads:
        """The mean of so many parts."""

        def part(load: Load) -> Load:
            return Load(load.tokens / count, load.squares / count)

        return Loads(
            self.clips / count,
            part(self.whole),
            part(self.context),
            part(self.target),
            part(self.both),
            self.image_tokens / count,
            self.image_context / count,
        )


def image_groups(cfg: Config) -> list[bool]:
    """Which frames-per-clip groups of a step are of images, with a patch embedding of their own: those of one frame,
    and that of img_data, which comes last."""
    own = cfg.model.img_temporal_dim_size
    groups = [fpc == own for fpc in dict.fromkeys(cfg.data.dataset_fpcs)]
    return groups if cfg.img_data is None else [*groups, True]


def pixel_values(cfg: Config) -> tuple[int, int]:
    """Pixel values of a token of a video, and of one of an image."""
    model = cfg.model
    assert model.patch_size is not None and model.tubelet_size is not None and model.num_frames is not None
    of_image = 3 * model.patch_size**2
    return of_image * (model.tubelet_size if model.num_frames > 1 else 1), of_image


@dataclass(frozen=True)
class Network:
    """A stack of transformer blocks."""

    width: int
    depth: int
    num_heads: int
    hidden: int
    swiglu: bool
    rope: bool

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def rotated(self) -> int:
        """Elements of a head that RoPE turns (vjepa_fast/ops/rope3d.py)."""
        return 3 * 2 * ((self.head_dim // 3) // 2) if self.rope else 0


def networks_of(cfg: Config) -> tuple[Network, Network]:
    """Encoder and predictor of a config."""
    model, size = cfg.model, size_of(cfg.model)

    def hidden(width: int, ratio: float, swiglu: bool) -> int:
        wide = int(width * ratio)
        return (int(2 * wide / 3) + 7) // 8 * 8 if swiglu and model.wide_silu else wide

    encoder = Network(
        size.embed_dim,
        size.depth,
        size.num_heads,
        hidden(size.embed_dim, size.mlp_ratio, model.use_silu),
        model.use_silu,
        model.use_rope,
    )
    width = model.pred_embed_dim
    return encoder, Network(
        width,
        model.pred_depth,
        model.pred_num_heads or size.num_heads,
        hidden(width, 4.0, model.use_pred_silu),
        model.use_pred_silu,
        model.use_rope,
    )


def _product(part: str, name: str, tokens: float, inputs: int, outputs: int, s: int, calls: int = 1) -> Operation:
    return Operation(
        part,
        "matmul",
        name,
        calls * s * (tokens * (inputs + outputs) + inputs * outputs),
        calls * 2.0 * tokens * inputs * outputs,
        calls,
        min(inputs, outputs),
    )


def _memory(part: str, name: str, num_bytes: float, launches: int = 1) -> Operation:
    return Operation(part, "memory", name, num_bytes, launches=launches)


def _linears(net: Network, tokens: float, last: float) -> list[tuple[str, int, int, float]]:
    """Name, inputs, outputs and mean tokens a block; what follows attention works on `last` tokens in the last."""
    d, f = net.width, net.hidden
    mlp = [("fc1", d, f), ("fc2", d, f), ("fc3", f, d)] if net.swiglu else [("fc1", d, f), ("fc2", f, d)]
    after = _mean_tokens(net, tokens, last)
    return [("qkv", d, 3 * d, tokens), *((name, i, o, after) for name, i, o in [("proj", d, d), *mlp])]


def _mean_tokens(net: Network, tokens: float, last: float) -> float:
    return (tokens * (net.depth - 1) + last) / net.depth


def blocks_forward(part: str, net: Network, load: Load, s: int, last: float | None = None) -> list[Operation]:
    """All blocks; the first norm of the first block has nothing to add, the last ends with `last` tokens."""
    tokens, d, n = load.tokens, net.width, net.depth
    last = tokens if last is None else last
    after = _mean_tokens(net, tokens, last)
    out = [_product(part, name, rows, i, o, s, n) for name, i, o, rows in _linears(net, tokens, last)]
    out.append(_memory(part, "layer norm and residual", ((4 * n - 2) * tokens + 4 * n * after) * s * d, 2 * n))
    out.append(_memory(part, "activation", n * (3 if net.swiglu else 2) * s * net.hidden * after, n))
    out.append(
        Operation(
            part,
            "attention",
            "attention",
            n * 4 * s * d * tokens,
            n * 4.0 * load.squares * d,
            n,
            net.head_dim,
            load.length,
        )
    )
    if net.rotated:
        out.append(_memory(part, "rope", n * (4 * net.num_heads * net.rotated * s + 4) * tokens, n))
    return out


def _in_float8(net: Network, tokens: float, s: int, operations: list[Operation]) -> list[Operation]:
    """The operations with float8 products, whose operands are made from inputs and fp32 weights at every call."""
    out = [replace(op, float8=True, num_bytes=op.num_bytes / s) if op.kind == "matmul" else op for op in operations]
    made = sum(tokens * i * (s + 1) + i * o * (4 + 1) for _, i, o, _ in _linears(net, tokens, tokens))
    out.append(_memory("target encoder", "float8 operands", net.depth * made, 2 * 4 * net.depth))
    return out


def _linear_backward(part: str, name: str, tokens: float, i: int, o: int, s: int, calls: int = 1) -> list[Operation]:
    """Gradients of input, weight and bias. A half-precision weight gradient is cast for its fp32 master."""
    out = [
        _product(part, f"{name}, input", tokens, i, o, s, calls),
        _product(part, f"{name}, weight", tokens, i, o, s, calls),
        _memory(part, "bias gradients", calls * (s * tokens * o + 4 * o), calls),
    ]
    if s < 4:
        out.append(_memory(part, "weight gradient casts", calls * i * o * (s + 4), calls))
    return out


def blocks_backward(part: str, net: Network, load: Load, s: int, last: float | None = None) -> list[Operation]:
    """All blocks; the last ends with `last` tokens."""
    tokens, d, n = load.tokens, net.width, net.depth
    last = tokens if last is None else last
    after = _mean_tokens(net, tokens, last)
    out = [
        op for name, i, o, rows in _linears(net, tokens, last) for op in _linear_backward(part, name, rows, i, o, s, n)
    ]
    out.append(_memory(part, "layer norm and residual", n * 4 * s * d * (tokens + after), 2 * n * 4))
    out.append(_memory(part, "activation", n * (5 if net.swiglu else 3) * s * net.hidden * after, n))
    # Reads queries, keys, values, output and its gradient; writes the gradients of queries, keys and values.
    out.append(
        Operation(
            part,
            "attention",
            "attention",
            n * 8 * s * d * tokens,
            n * 10.0 * load.squares * d,
            n,
            net.head_dim,
            load.length,
        )
    )
    if net.rotated:
        out.append(_memory(part, "rope", n * (6 * d * s + 4) * tokens, n))
    return out


def step_operations(cfg: Config, loads: Loads) -> list[Operation]:
    """Every operation of a training step on our kernels, with activation checkpointing and micro-batches where the
    config has them."""
    num_micro, parameters = cfg.optimization.grad_accumulation, count_parameters(cfg.model)
    out = [
        replace(op, num_bytes=op.num_bytes * num_micro, flops=op.flops * num_micro, launches=op.launches * num_micro)
        for op in _micro_batch(cfg, loads.divided(num_micro))
    ]
    if num_micro > 1:
        # Two gradients are read and their sum is written, layer by layer: about 13 tensors a block.
        for name, count in (("context encoder", parameters.encoder), ("predictor", parameters.predictor)):
            depth = networks_of(cfg)[name == "predictor"].depth
            out.append(
                _memory(
                    backward_of(name), "sums of gradients", (num_micro - 1) * 12 * count, (num_micro - 1) * 13 * depth
                )
            )
    return out + optimizer_operations(parameters, 4 if cfg.model.dtype == "float32" else 2)


def _micro_batch(cfg: Config, loads: Loads) -> list[Operation]:
    """All but the update."""
    encoder, predictor = networks_of(cfg)
    model, s = cfg.model, 4 if cfg.model.dtype == "float32" else 2
    d, p = encoder.width, predictor.width
    context, target, both = loads.context, loads.target, loads.both

    def patches(part: str, tokens: float, of_images: float, launches: int) -> list[Operation]:
        counts = zip(pixel_values(cfg), (tokens - of_images, of_images), strict=True)
        return [
            Operation(
                part,
                "matmul",
                "patch embedding",
                count * pixels + 4 * d * pixels + count * d * s,
                2.0 * count * pixels * d,
                launches,
                min(pixels, d),
            )
            for pixels, count in counts
            if count
        ]

    out = patches("patch embedding", loads.whole.tokens, loads.image_tokens, 2)
    out += patches("patch embedding", context.tokens, loads.image_context, 2)
    out += patches(backward_of("patch embedding"), context.tokens, loads.image_context, 3)
    of_targets = blocks_forward("target encoder", encoder, loads.whole, s)
    if model.target_precision == "float8":
        of_targets = _in_float8(encoder, loads.whole.tokens, s, of_targets)
    out += of_targets
    # The final norm of the target encoder is the loss's.
    levels = model.n_output_distillation or 1
    out.append(_memory("target encoder", "last residual", levels * 3 * s * d * loads.whole.tokens, levels))
    out += blocks_forward("context encoder", encoder, context, s)
    out.append(_memory("context encoder", "final norm", levels * 4 * s * d * context.tokens, levels))
    part = backward_of("context encoder")
    out.append(_memory(part, "final norm", levels * 3 * s * d * context.tokens, 4 * levels))
    out += blocks_backward(part, encoder, context, s)
    part = "predictor"
    # With a loss of context tokens too, a second head serves them, and no block is cut short.
    heads = [("proj", target.tokens)] + ([("context proj", context.tokens)] if model.return_all_tokens else [])
    predicted = sum(tokens for _, tokens in heads)
    out += [_product(part, "embed", context.tokens, d, p, s)]
    if levels > 1:
        out += [_product(part, "embed levels", context.tokens, levels * d, d, s)]
    out += [_product(part, name, tokens, p, levels * d, s) for name, tokens in heads]
    out += blocks_forward(part, predictor, both, s, predicted)
    # Tokens and mask tokens are joined and put in order; the last block takes the target rows of two tensors.
    out.append(_memory(part, "order", 4 * s * p * both.tokens + 4 * s * p * predicted, 4))
    out.append(_memory(part, "final norm", 4 * s * p * predicted))
    back = backward_of(part)
    for name, tokens in heads:
        out += _linear_backward(back, name, tokens, p, levels * d, s)
    out += _linear_backward(back, "embed", context.tokens, d, p, s)
    if levels > 1:
        out += _linear_backward(back, "embed levels", context.tokens, levels * d, d, s)
    out += blocks_backward(back, predictor, both, s, predicted)
    # The gradients of those rows are written into zeros.
    out.append(_memory(back, "order", s * p * (4 * both.tokens + 8 * predicted), 7))
    out.append(_memory(back, "final norm", 3 * s * p * predicted, 4))
    if model.checkpointing != "none":
        for name, net, load in (("context encoder", encoder, context), ("predictor", predictor, both)):
            again = blocks_forward(backward_of(name), net, load, s)
            # Selectively, products and attention are kept; queries, keys and values are copied before they are turned.
            if model.checkpointing == "selective":
                again = [op for op in again if op.kind == "memory"]
                again.append(
                    _memory(backward_of(name), "copies", 2 * 6 * s * net.width * net.depth * load.tokens, 2 * net.depth)
                )
            out += [replace(op, name=f"{op.name}, again") for op in again]
    slope = 1 if cfg.loss.loss_exp == 1 else 4
    out.append(_memory("loss", "latent loss", predicted * levels * d * (2 * s + slope), 5 * len(heads)))
    out.append(_memory(backward_of("loss"), "latent loss", predicted * levels * d * (slope + s), 2 * len(heads)))
    return out


def optimizer_operations(parameters: Parameters, s: int) -> list[Operation]:
    """Norm of the gradients, AdamW, moving average and shadows."""
    shadows = (parameters.linear + parameters.target_linear) * s if s < 4 else 0
    moved = 28 * parameters.trained + 8 * parameters.target + shadows
    return [
        _memory("optimizer", "norm of the gradients", 4 * parameters.trained, 3),
        _memory("optimizer", "AdamW and moving average", moved, 10),
    ]
