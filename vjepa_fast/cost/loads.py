"""What a training step works on: how many tokens in sequences of which lengths, and the sizes of the two networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vjepa_fast.config.schema import Config
from vjepa_fast.masking.batch import MaskBatch
from vjepa_fast.models.sizes import size_of


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
