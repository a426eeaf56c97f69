"""What a mistake in a config says: the key, the value seen, what is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config import load_config, load_recipe


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe("demo", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimization.lrr=1", ["optimization.lrr is not a key", "did you mean optimization.lr?"]),
        ("lr=1", ["did you mean optimization.lr?"]),
        ("optimisation.lr=1", ["did you mean optimization.lr?"]),
        ("model.model=vit_large", ["did you mean model.model_name?"]),
        ("meta.sede=1", ["meta.sede is not a key", "did you mean meta.seed?"]),
        ("mask.masks.0.num_block=1", ["mask.masks.0.num_block is not a key", "did you mean mask.masks.0.num_blocks?"]),
        ("img_data.crop_size=64", ["set data.crop_size alone"]),
        ("data.num_clips=2", ["it is data.clips_per_video here"]),
        ("data.num_frames=8", ["data.dataset_fpcs=[16]"]),
        ("data.aug.random_scale=[1, 1]", ["did you mean data.aug.random_resize_scale?"]),
        ("train.cuda_graphs=sometimes", ["train.cuda_graphs is 'sometimes'", "expected True, False or 'auto'"]),
        ("optimization.lr=fast", ["optimization.lr is 'fast'", "expected a number"]),
        ("optimization.lr=-1", ["optimization.lr is -1", "expected at least 0"]),
        ("optimization.lr=.nan", ["optimization.lr is nan", "expected a finite number"]),
        ("optimization.ipe=1.5", ["optimization.ipe is 1.5", "expected a whole number"]),
        ("optimization.ema=[0.9]", ["optimization.ema is [0.9]", "more entries"]),
        ("optimization.ema=[0.9, 1.1]", ["optimization.ema is [0.9, 1.1]", "in [0, 1]"]),
        ("optimization.betas=[0.9, 1.0]", ["optimization.betas", "[0, 1)"]),
        ("optimization.schedule=cosine", ["'cosine'", "'warmup_cosine', 'linear' or 'wsd'"]),
        ("data.batch_size=yes", ["data.batch_size is true"]),
        ("data.batch_size=0", ["data.batch_size is 0", "more than 0"]),
        ("data.datasets=7", ["data.datasets is 7", "expected a list"]),
        ("data.crop_size=30", ["data.crop_size 30 is not a multiple of patch_size 8"]),
        ("data.datasets=[a, b]\tdata.datasets_weights=[1]", ["datasets_weights has 1 entries for 2 datasets"]),
        ("data=3", ["data is 3", "expected a section"]),
        ("mask.masks=[]", ["mask.masks is []", "at least 1"]),
        ("mask.masks.2.num_blocks=1", ["mask.masks has 1 entry;", "0 to 0"]),
        ("mask.masks.-1.num_blocks=1", ["'-1' is not one"]),
        ("mask.masks.0.spatial_scale=[0.5, 0.1]", ["mask.masks.0.spatial_scale is [0.5, 0.1]", "low <= high"]),
        ("model.model_name=vit_larg", ["model.model_name is 'vit_larg'", "did you mean vit_large?"]),
        ("model.dtype=float16", ["model.dtype is float16", "train.dtype is float32", "set it in train only"]),
        ("model.crop_size=32", ["model.crop_size is (32, 32)", "set it in data only"]),
        ("model.depth.x=1", ["model.depth is 4, which has no keys below it"]),
        ("train.dtype=bf16", ["train.dtype is 'bf16'", "'float32', 'bfloat16' or 'float16'"]),
        ("train.name=3", ["train.name is 3", "quotes"]),
        ("optimization.lr", ["'optimization.lr'", "expected section.key=value"]),
        ("=3", ["expected section.key=value"]),
        ("data..fps=3", ["expected section.key=value"]),
        ("data.fps=[1", ["override 'data.fps=[1', line 1, column 3"]),
    ],
)
def test_override(override: str, said: list[str]) -> None:
    text = message(*override.split("\t"))
    for part in said:
        assert part in text
    assert "pydantic" not in text and "Value error" not in text


def test_several_at_once_name_their_cause() -> None:
    text = message("optimization.lr=x", "train.dtype=int8", "data.fps=4")
    assert text.startswith("recipe demo: 2 problems:")
    assert "(from override 'optimization.lr=x')" in text
    assert "(from override 'train.dtype=int8')" in text


def test_wsd_must_fit() -> None:
    assert "do not fit" in message("optimization.schedule=wsd", "optimization.warmup=9", "optimization.anneal=2")


def test_recipe_name() -> None:
    with pytest.raises(ConfigError, match="recipe.*'vitl-256'.*vitl16-256.*demo, .*tutorial"):
        load_recipe("vitl-256")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is not a text file"),
        (b"model:\x00", "is not a text file"),
        (b"- 1\n- 2\n", "expected sections"),
        (b"just words", "expected sections"),
        (b"model:\n  depth: [1\n", "line 3, column 1"),
        (b"model:\n\tdepth: 1\n", "line 2, column 1"),
        (b"train: {seed: 1, seed: 2}\n", "line 1, column 18: the key 'seed' is written twice"),
        (b"a: !!python/object:os.system {}\n", "line 1, column 4"),
        (b"optimization:\n  lrr: 1\n", "optimization.lrr is not a key; did you mean optimization.lr?"),
        (b"optimisation:\n  lr: 1\n", "optimisation is not a key; did you mean optimization"),
        (b"1: 2\n", "1"),
    ],
)
def test_file(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(str(file))
    assert said in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


def test_file_details(tmp_path: Path) -> None:
    """A byte-order mark, an empty section and 1e-4 are as one expects."""
    file = tmp_path / "ok.yaml"
    file.write_bytes(b"\xef\xbb\xbfmodel:\noptimization: {lr: 1e-4, eps: 1e-6}\n")
    cfg = load_config(file)
    assert (cfg.optimization.lr, cfg.optimization.eps, cfg.model.model_name) == (1e-4, 1e-6, "vit_large")
