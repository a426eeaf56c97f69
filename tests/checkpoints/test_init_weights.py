"""A run that starts from released weights: what is loaded, said and refused, and how it goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.helpers import forked
from tests.helpers.comparing import column
from tests.helpers.tiny import tiny_config
from vjepa_fast.checkpoints.meta_format import PREFIX
from vjepa_fast.cli.main import app
from vjepa_fast.common.errors import ConfigError, UserError
from vjepa_fast.config import Config, load_recipe
from vjepa_fast.models.jepa import VJEPA
from vjepa_fast.train.trainer import Trainer

Make = Callable[..., Trainer]
TOKENS = 10
BASE = (f"model.num_mask_tokens={TOKENS}", "train.max_steps=2")


def networks(cfg: Config) -> dict[str, dict[str, Tensor]]:
    """Weights that no run begins with; student and teacher differ."""
    torch.manual_seed(7)
    model = VJEPA.from_config(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return {name: getattr(model, name).state_dict() for name in ("encoder", "target_encoder", "predictor")}


def with_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Meta releases it: prefixes, and a table that rotary models do not read."""
    table = {PREFIX + "pos_embed": torch.zeros(1, 2048, 32)} if "patch_embed.proj.weight" in state else {}
    return {PREFIX + key: value for key, value in state.items()} | table


@pytest.fixture
def states(video_csv: Path, tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    return networks(tiny_config(video_csv, tmp_path, *BASE))


@pytest.fixture
def released(states: dict[str, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A file in the layout of vitl.pt: no optimizer, no epoch."""
    torch.save({key: with_prefix(state) for key, state in states.items()}, tmp_path / "vit.pt")
    return tmp_path / "vit.pt"


def save(path: Path, **states: dict[str, Tensor]) -> str:
    torch.save({key: with_prefix(state) for key, state in states.items()}, path)
    return f"train.init_weights={path}"


def same(module: nn.Module, state: dict[str, Tensor]) -> bool:
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_loss_is_that_of_these_weights(
    dtype: str, states: dict[str, dict[str, Tensor]], released: Path, make: Make
) -> None:
    trainer = make(*BASE, f"train.dtype={dtype}", f"train.init_weights={released}")
    assert trainer.step == 0 and not trainer.task.train_step.optimizer.state
    batch = next(iter(trainer.loader))
    by_hand = VJEPA.from_config(trainer.cfg)
    for name, state in states.items():
        getattr(by_hand, name).load_state_dict(state)
    expected = by_hand(batch.clips, trainer.task.masks_of(batch)).loss.detach()
    assert torch.equal(trainer.run_step(batch).loss, expected)


def test_resuming_goes_on_from_the_run(released: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    change = f"train.init_weights={released}"
    make(*BASE, change).fit()
    assert re.search(r"\bstep 0\b.*\bvit\.pt\b", capsys.readouterr().out, re.S)
    released.unlink()
    for changes, resume in (((), True), (("train.auto_resume=true",), False)):
        again = make(*BASE, change, *changes, resume=resume)
        assert again.step == 2
        saved = torch.load(again.folder / "latest.pt", weights_only=True)
        assert same(again.model.encoder, {key.removeprefix(PREFIX): v for key, v in saved["encoder"].items()})
        assert "continuing" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"vit\.pt\b"):
        make(*BASE, change)


def test_student_and_teacher(
    states: dict[str, dict[str, Tensor]], make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher, predictor = states.values()
    path = tmp_path / "some.pt"
    for given, of_encoder, of_target, said in (
        (
            {"encoder": student, "target_encoder": teacher},
            student,
            teacher,
            "encoder from encoder, target encoder from target_encoder",
        ),
        ({"encoder": student, "ema_encoder": teacher}, student, teacher, "target encoder from ema_encoder"),
        ({"encoder": student}, student, student, "encoder and target encoder from encoder, the only one there"),
        ({"target_encoder": teacher}, teacher, teacher, "from target_encoder, the only one there"),
    ):
        model = make(*BASE, save(path, predictor=predictor, **given)).model
        assert same(model.encoder, of_encoder) and same(model.target_encoder, of_target)
        assert same(model.predictor, predictor)
        assert said in capsys.readouterr().out
        assert not any(parameter.requires_grad for parameter in model.target_encoder.parameters())


@pytest.mark.parametrize("checkpoint_format", ["meta", "sharded"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_folder(checkpoint_format: str, released: Path, make: Make, tmp_path: Path) -> None:
    change = f"train.checkpoint_format={checkpoint_format}"
    first = make(*BASE, f"train.init_weights={released}", change)
    first.fit()
    (tmp_path / "run").rename(tmp_path / "first")
    second = make(*BASE, f"train.init_weights={tmp_path / 'first'}")
    assert second.step == 0 and same(second.model, first.model.state_dict())


def test_a_hugging_face_folder(
    states: dict[str, dict[str, Tensor]], released: Path, make: Make, tmp_path: Path
) -> None:
    torch.save(states, tmp_path / "plain.pt")
    result = CliRunner().invoke(
        app,
        [
            "convert",
            str(tmp_path / "plain.pt"),
            str(tmp_path / "hf"),
            "--to",
            "hf",
            "--no-check",
            "num_heads=2",
            "pred_num_heads=2",
        ],
    )
    assert result.exit_code == 0, result.output
    models = [make(*BASE, f"train.init_weights={path}").model for path in (released, tmp_path / "hf")]
    # It holds the teacher, under one name.
    assert same(models[1].encoder, models[0].target_encoder.state_dict())
    assert same(models[1].target_encoder, models[0].target_encoder.state_dict())
    assert same(models[1].predictor, models[0].predictor.state_dict())


def test_a_new_predictor(states: dict[str, dict[str, Tensor]], make: Make, tmp_path: Path) -> None:
    change = save(tmp_path / "alone.pt", encoder=states["encoder"])
    with pytest.raises(UserError, match=r"alone\.pt.*no predictor.*train\.init_predictor=false"):
        make(*BASE, change)
    fresh = make(*BASE).model.predictor.state_dict()
    # One that does not fit is left in the file.
    other = save(tmp_path / "other.pt", encoder=states["encoder"], predictor={"predictor_embed.weight": torch.ones(1)})
    for start in (change, other):
        model = make(*BASE, start, "train.init_predictor=false").model
        assert same(model.predictor, fresh) and same(model.encoder, states["encoder"])


@pytest.mark.parametrize(
    "change, said",
    [
        (
            "model.num_mask_tokens=2",
            r"\bpredictor\b.*\bmask_tokens\.2\b.*vit\.pt\b.* model\.model_name=vit_tiny .*model\.num_mask_tokens=10",
        ),
        ("model.embed_dim=64", r"\bencoder\b.* model\.embed_dim=32\b"),
        ("model.use_rope=false", r" model\.use_rope=true\b"),
    ],
)
def test_what_does_not_fit(change: str, said: str, released: Path, make: Make) -> None:
    with pytest.raises(UserError, match=said):
        make(*BASE, f"train.init_weights={released}", change)


def test_a_distilled_predictor(video_csv: Path, make: Make, tmp_path: Path) -> None:
    """Meta's ViT-B and ViT-L of V-JEPA 2.1: what they predict is wider than they are."""
    changes = (
        "model.depth=4",
        "model.n_output_distillation=1",
        "model.rope_style=interleaved",
        "model.interpolate_rope=true",
        "loss.predict_all=true",
    )
    states = networks(tiny_config(video_csv, tmp_path, *changes, "model.teacher_embed_dim=48"))
    torch.save(states, tmp_path / "distilled.pt")
    change = f"train.init_weights={tmp_path / 'distilled.pt'}"
    with pytest.raises(UserError, match=r"predictor.*not fit.*teacher.*train\.init_predictor=false"):
        make(*changes, change)
    model = make(*changes, change, "train.init_predictor=false").model
    assert same(model.encoder, states["encoder"]) and same(model.target_encoder, states["target_encoder"])


def test_heads_that_no_shape_tells(released: Path, make: Make, tmp_path: Path) -> None:
    make(*BASE, f"train.init_weights={released}").fit()
    (tmp_path / "run").rename(tmp_path / "first")
    with pytest.raises(UserError, match=r"\b2 heads.*\b1\b.*model\.num_heads=2"):
        make(*BASE, f"train.init_weights={tmp_path / 'first'}", "model.num_heads=1")


def test_one_start_only(video_csv: Path, tmp_path: Path) -> None:
    for other in ("optimization.anneal_ckpt=a.pt", "train.read_checkpoint=a.pt"):
        with pytest.raises(ValueError, match=rf"train\.init_weights.*{other[:-5]}.*both"):
            tiny_config(video_csv, tmp_path, "train.init_weights=b.pt", other)


def test_a_recipe_that_needs_weights() -> None:
    with pytest.raises(ConfigError, match=r"init_weights.*https://dl\.fbaipublicfiles\.com/vjepa2/vitl\.pt"):
        load_recipe("adapt", ["data.datasets=[videos]"]).check_trainable()
    load_recipe("adapt", ["data.datasets=[videos]", "train.init_weights=vitl.pt"]).check_trainable()


def train_all(rank: int, cfgs: dict[str, Config], folder: Path) -> int:
    for name, cfg in cfgs.items():
        (folder / name).mkdir(exist_ok=True)
        Trainer(cfg, folder=folder / name).fit()
    return 0


def test_two_processes(released: Path, video_csv: Path, tmp_path: Path) -> None:
    """Their first loss is that of one."""
    changes = {"ddp": (), "zero": ("train.shard_optimizer=true",), "fsdp": ("train.parallel=fsdp",), "one": ()}
    cfgs = {
        name: tiny_config(
            video_csv, tmp_path / "cache", *BASE, "train.max_steps=1", f"train.init_weights={released}", *some
        )
        for name, some in changes.items()
    }
    train_all(0, {"one": cfgs.pop("one")}, tmp_path)
    assert forked.launch(partial(train_all, cfgs=cfgs, folder=tmp_path), 2) == 0
    expected = column(tmp_path / "one" / "log_r0.csv")
    assert len(expected) == 1
    for name in cfgs:
        assert column(tmp_path / name / "log_r0.csv") == pytest.approx(expected, rel=1e-5), name
