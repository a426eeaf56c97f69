"""Bytes and seconds that many GPUs exchange: the formulas by hand, and what the command says."""

from __future__ import annotations

import dataclasses
import re

import pytest
from typer.testing import CliRunner

from vjepa_fast.cli.main import app
from vjepa_fast.common.errors import ConfigError
from vjepa_fast.config import load_recipe
from vjepa_fast.config.schema import Config
from vjepa_fast.cost import communication as module
from vjepa_fast.cost.communication import INSIDE_LATENCY, OUTSIDE_LATENCY, SHARE, WAYS, Cluster, exchange
from vjepa_fast.cost.gpus import GPUS
from vjepa_fast.cost.parameters import count_parameters
from vjepa_fast.cost.plan import draw_masks
from vjepa_fast.cost.prediction import Prediction, predict


@pytest.fixture(scope="module")
def large() -> tuple[Config, Prediction]:
    cfg = load_recipe("vitl16-256")
    return cfg, predict(cfg, GPUS["h100"], draw_masks(cfg, cfg.data.per_process(1), 2))


def test_seconds_of_a_pass() -> None:
    one = Cluster.of("h100", 1, 8, "ib400")
    assert one.pass_of(8e9) == pytest.approx(7 / 8 * 8e9 / (SHARE * 450e9) + 7 * INSIDE_LATENCY)
    many = Cluster.of("h100", 4, 8, "eth100")
    within = 7 / 8 * 8e9 / (SHARE * 450e9) + 7 * INSIDE_LATENCY
    between = 3 / 4 * 8e9 / (SHARE * 12.5e9) + 3 * OUTSIDE_LATENCY
    assert many.hierarchical(8e9) == pytest.approx(within + between)
    assert many.ring(8e9) == pytest.approx(31 / 32 * 8e9 / (SHARE * 12.5e9) + 31 * OUTSIDE_LATENCY)
    assert many.pass_of(8e9) == min(many.ring(8e9), many.hierarchical(8e9))
    # Eight adapters of 400 Gb/s a machine are one for each of its GPUs.
    assert Cluster.of("h100", 4, 8, "8x400") == dataclasses.replace(Cluster.of("h100", 4, 8, "ib400"), link="8x400")


def test_bytes(large: tuple[Config, Prediction]) -> None:
    cfg, prediction = large
    found, cluster = count_parameters(cfg.model), Cluster.of("h100", 2, 8, "ib400")
    sent = {way: exchange(way, cfg, prediction, cluster).sent for way in WAYS}
    weights = found.trained + found.target
    halves = found.linear + found.target_linear
    assert sent["ddp"] == pytest.approx(2 * 15 / 16 * 4 * found.trained)
    assert sent["zero"] == pytest.approx(15 / 16 * (4 * found.trained + 4 * weights - 2 * halves))
    assert sent["fsdp"] == pytest.approx(15 / 16 * 4 * (found.trained + weights + found.linear), rel=1e-6)
    rounded = cfg.model_copy(deep=True)
    rounded.train.grad_dtype = "bfloat16"
    assert exchange("ddp", rounded, prediction, cluster).sent == pytest.approx(sent["ddp"] / 2)


def test_what_is_exposed() -> None:
    # The second message waits for the first, the third for the end of the work.
    assert module._behind([1.0, 1.0], [3.0, 1.0, 0.5]) == pytest.approx(3.5)
    assert module._behind([1.0, 1.0], [0.5, 0.5]) == pytest.approx(0.5)
    assert module._in_order([1.0, 1.0], [0.5, 3.0], 0.25) == pytest.approx(0.25 + 0.5 + 2.0)
    assert module._ahead([1.0, 1.0], [0.5, 3.0], [0.25, 0.75]) == pytest.approx(0.5 + 2.0 + 0.75)


def test_slower_links_expose_more(large: tuple[Config, Prediction]) -> None:
    cfg, prediction = large
    for way in WAYS:
        alone = exchange(way, cfg, prediction, Cluster.of("h100", 1, 1, "ib400"))
        assert alone.sent == alone.saved == alone.exposed_backward == alone.exposed_forward == 0
        assert alone.efficiency == pytest.approx(1)
        found = [
            exchange(way, cfg, prediction, Cluster.of("h100", 8, 8, link)) for link in ("ib400", "eth100", "eth25")
        ]
        assert found[0].efficiency > found[1].efficiency > found[2].efficiency
        assert all(x.exposed_backward + x.exposed_forward <= x.busy for x in found)
    # A fourth of the backward is left to hide behind.
    parts = cfg.model_copy(deep=True)
    parts.optimization.grad_accumulation = 4
    slow = Cluster.of("h100", 8, 8, "eth100")
    assert exchange("ddp", parts, prediction, slow).exposed_backward > (
        exchange("ddp", cfg, prediction, slow).exposed_backward
    )


def plan(*args: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["plan", "--recipe", "vitl16-256", *args], prog_name="vjepa-fast")
    return result.stdout, result.stderr


def test_command() -> None:
    text, _ = plan("--gpu", "h100", "--nodes", "8", "--link", "eth100")
    assert "On 64 GPUs (8 x 8; 450 GB/s a GPU within a machine, 100 Gb/s a machine between them (eth100))" in text
    for name in ("DDP", "ZeRO-1", "FSDP2"):
        assert re.search(rf"^{name} .* [\d.]+ %$", text, re.M), name


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--nodes", "2", "--link", "ib4000"), "--link is 'ib4000'; known are nvlink, ib400, eth100, eth25"),
        (("--nodes", "2", "--link", "0x25"), "--link is '0x25'"),
        (("--nodes", "2", "--gpus", "16"), "--gpus is --nodes times --gpus-per-node; leave it out"),
    ],
)
def test_mistakes(args: tuple[str, ...], said: str) -> None:
    assert said in plan(*args)[1]


def test_unknown_link() -> None:
    with pytest.raises(ConfigError, match="8x400"):
        Cluster.of("h100", 2, 8, "400")
