"""Contents of checkpoints, put together out of shards."""

from __future__ import annotations

import torch

from vjepa_fast.optim.dtensors import gather


def test_what_is_gathered_no_longer_changes() -> None:
    """It may be written while training goes on, and step counts are no DTensors."""
    step = torch.tensor(3.0)
    contents = {"opt": {"state": {0: {"step": step}}}, "epoch": 1, "losses": [torch.ones(2)]}
    gathered = gather(contents, keep=True)
    step += 1
    assert gathered == {"opt": {"state": {0: {"step": torch.tensor(3.0)}}}, "epoch": 1, "losses": gathered["losses"]}
    assert torch.equal(gathered["losses"][0], torch.ones(2))


def test_who_does_not_write_keeps_nothing() -> None:
    assert gather({"a": (torch.ones(2), 1)}, keep=False)["a"][0].numel() == 0
