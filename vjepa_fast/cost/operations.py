"""Lists the operations of a training step on our kernels with their arithmetic, bytes and launches.

Bytes are those of the formulas in the files of vjepa_fast/ops; of a matrix product, operands and result once. Attention
is counted as one launch over all packed sequences.

Legend: L tokens of all sequences, D width, F hidden width of the MLP, P predictor width, s bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vjepa_fast.common.profiler_labels import backward_of
from vjepa_fast.config.schema import Config
from vjepa_fast.cost.loads import Load, Loads, Network, networks_of, pixel_values
from vjepa_fast.cost.parameters import Parameters, count_parameters

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

    out = _patches(cfg, "patch embedding", loads.whole.tokens, loads.image_tokens, d, s, 2)
    out += _patches(cfg, "patch embedding", context.tokens, loads.image_context, d, s, 2)
    out += _patches(cfg, backward_of("patch embedding"), context.tokens, loads.image_context, d, s, 3)
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
        out += _again("context encoder", encoder, context, s, model.checkpointing == "selective")
        out += _again("predictor", predictor, both, s, model.checkpointing == "selective")
    slope = 1 if cfg.loss.loss_exp == 1 else 4
    out.append(_memory("loss", "latent loss", predicted * levels * d * (2 * s + slope), 5 * len(heads)))
    out.append(_memory(backward_of("loss"), "latent loss", predicted * levels * d * (slope + s), 2 * len(heads)))
    return out


def _patches(
    cfg: Config, part: str, tokens: float, of_images: float, width: int, s: int, launches: int
) -> list[Operation]:
    """Patch embedding, or its backward, of tokens some of which are of images."""
    counts = zip(pixel_values(cfg), (tokens - of_images, of_images), strict=True)
    return [
        Operation(
            part,
            "matmul",
            "patch embedding",
            count * pixels + 4 * width * pixels + count * width * s,
            2.0 * count * pixels * width,
            launches,
            min(pixels, width),
        )
        for pixels, count in counts
        if count
    ]


def _again(name: str, net: Network, load: Load, s: int, selective: bool) -> list[Operation]:
    """What activation checkpointing computes once more in the backward of a network."""
    again = blocks_forward(backward_of(name), net, load, s)
    # Selectively, products and attention are kept; queries, keys and values are copied before they are turned.
    if selective:
        again = [op for op in again if op.kind == "memory"]
        again.append(
            _memory(backward_of(name), "copies", 2 * 6 * s * net.width * net.depth * load.tokens, 2 * net.depth)
        )
    return [replace(op, name=f"{op.name}, again") for op in again]


def optimizer_operations(parameters: Parameters, s: int) -> list[Operation]:
    """Norm of the gradients, AdamW, moving average and shadows."""
    shadows = (parameters.linear + parameters.target_linear) * s if s < 4 else 0
    moved = 28 * parameters.trained + 8 * parameters.target + shadows
    return [
        _memory("optimizer", "norm of the gradients", 4 * parameters.trained, 3),
        _memory("optimizer", "AdamW and moving average", moved, 10),
    ]
