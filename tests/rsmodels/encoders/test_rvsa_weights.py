"""encoders/rvsa.py and files: MTP's checkpoints, those of other layouts and sizes, and what does not fit."""

import re
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rsmodels.encoders import rvsa

State = dict[str, Tensor]


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (rvsa.rvsa_vit_b, (768, 12, 12, (2, 5, 8, 11))),
        (rvsa.rvsa_vit_l, (1024, 24, 16, (5, 11, 17, 23))),
    ],
)
def test_parameters_are_those_of_mtp(build: Any, sizes: tuple, mtp: Any) -> None:
    with torch.device("meta"):
        encoder = build(image_size=448)
    found = {mtp.named_as_theirs(name, sizes[3]): tuple(p.shape) for name, p in encoder.state_dict().items()}
    theirs = {
        name: shape[:2] if "sampling" in name else shape  # 1x1 convolutions
        for name, shape in mtp.layout(*sizes, (28, 28), 7).items()
        if not name.startswith("fpn") and not name.endswith("relative_position_index")
    }
    assert found == theirs


@pytest.mark.parametrize("home", (b"numpy.core.multiarray", b"numpy._core.multiarray"))
def test_loads_what_mtp_saves(
    home: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], mtp: Any
) -> None:
    """Its training state, an array of either NumPy included; every key is loaded or said to be left out."""
    state = mtp.draw((4, 4), 3, torch.float32)
    saved = {
        "epoch": 3,
        "iteration": 80000,
        "state_dict": state,
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 6e-5}]},
        "scheduler": {"T_max": 80000, "_last_lr": [0.0]},
        "loss_pretrain": np.array([3.5, 1.25]),
    }
    path = tmp_path / "last_vit_b_rvsa_ss_is_rd_pretrn_model_encoder.pth"
    torch.save(saved, tmp_path / "any.pth")
    with ZipFile(tmp_path / "any.pth") as source, ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, re.sub(rb"numpy\._?core\.multiarray", home, source.read(name)))
    encoder = mtp.build((4, 4))
    report = encoder.load_pretrained(str(path))
    own = encoder.state_dict()
    assert set(report.loaded) == set(own) and not report.initialised and not report.resized
    assert {mtp.named_as_theirs(name) for name in report.loaded} | set(report.dropped) == set(state)
    assert len(report.loaded) + len(report.dropped) == len(state)
    assert all(
        torch.equal(value, state[mtp.named_as_theirs(name)].view_as(value)) for name, value in own.items()
    )
    said = capsys.readouterr().err
    assert "dropped: fpn1.*.weight" in said and "of MTP's pyramid" in said
    assert "relative_position_index [2 tensors] (follows from the window size)" in said


def test_loads_other_layouts(tmp_path: Path, mtp: Any) -> None:
    state = mtp.draw((4, 4), 3, torch.float32)
    expected = mtp.load(state, tmp_path, (4, 4), dtype=torch.float32).state_dict()
    encoder = mtp.build((4, 4))

    def reload(state: State) -> Any:
        torch.save(state, tmp_path / "other.pth")
        for parameter in encoder.parameters():
            torch.nn.init.ones_(parameter)
        report = encoder.load_pretrained(str(tmp_path / "other.pth"))
        assert all(torch.equal(v, expected[k]) for k, v in encoder.state_dict().items() if k in report.loaded)
        return report

    # MTP's whole model, from inside DistributedDataParallel.
    whole = {f"module.encoder.{key}": value for key, value in state.items()}
    whole |= {f"module.semsegdecoder.{i}.weight": torch.zeros(2) for i in range(3)}
    report = reload(whole)
    assert report.dropped["semsegdecoder.*"] == "not part of the encoder" and not report.initialised
    # Remote-Sensing-RVSA.
    assert not reload({k.replace("full_attn_rel", "rel"): v for k, v in state.items()}).initialised
    # MTP for fine-tuning.
    report = reload({k: v for k, v in state.items() if not k.startswith("norm.")})
    assert report.initialised == ["norm.weight", "norm.bias"]
    # Our own.
    report = reload(expected)
    assert not report.dropped and not report.initialised


def test_checkpoints_that_do_not_fit(tmp_path: Path, mtp: Any) -> None:
    state = mtp.draw((4, 4), 3, torch.float32)
    without = {k: v for k, v in state.items() if k != "blocks.2.attn.sampling_angles.2.bias"}
    with pytest.raises(
        ValueError, match=r"1 encoder keys are missing .*blocks\.2\.attn\.sampling_angles\.bias"
    ):
        mtp.load(without, tmp_path, (4, 4))
    with pytest.raises(ValueError, match=r"1 encoder keys match nothing .*cls_token"):
        mtp.load({**state, "cls_token": torch.zeros(1, 1, mtp.dim)}, tmp_path, (4, 4))
    with pytest.raises(ValueError, match=r"rel_pos_h has shape \(5, 8\), this model expects \(13, 8\)"):
        mtp.load(state, tmp_path, (4, 4), s=7)
    longer = {**state, "blocks.3.norm1.weight": torch.zeros(mtp.dim)}
    with pytest.raises(ValueError, match=r"4 blocks of width 16, this model has 3 of width 16"):
        mtp.load(longer, tmp_path, (4, 4))
    plain = {k: v for k, v in state.items() if "sampling" not in k}
    with pytest.raises(ValueError, match=r"mtp\.pth: no RVSA encoder in it \(first keys: pos_embed,"):
        mtp.load(plain, tmp_path, (4, 4))
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.pth: not readable as weights"):
        rvsa.rvsa_vit_tiny().load_pretrained(str(tmp_path / "broken.pth"))


def test_tables_of_another_image_size(tmp_path: Path, capsys: pytest.CaptureFixture[str], mtp: Any) -> None:
    state = mtp.draw((4, 4), 3, torch.float32)
    encoder = mtp.load(state, tmp_path, (5, 7), dtype=torch.float32)
    said = capsys.readouterr().err
    assert "4x4 → 5x7 tokens, bicubic" in said and "7 → 13 rows, bicubic" in said
    grid = state["pos_embed"].reshape(1, 4, 4, mtp.dim).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(5, 7), mode="bicubic", align_corners=False)
    assert torch.equal(encoder.pos_embed, grid.flatten(2).transpose(1, 2))
    table = state["blocks.1.attn.full_attn_rel_pos_w"].reshape(1, 1, 7, mtp.dim // mtp.heads)
    table = F.interpolate(table, size=(13, mtp.dim // mtp.heads), mode="bicubic", align_corners=False)
    assert torch.equal(encoder.blocks[1].attn.rel_pos_w, table[0, 0])
    assert torch.equal(encoder.blocks[0].attn.rel_pos_w, state["blocks.0.attn.rel_pos_w"])


def test_a_saved_state_of_another_grid() -> None:
    """2x8 tokens are as many as 4x4: the count alone does not tell the grid, the global tables do."""
    wide = {f"encoder.{k}": v for k, v in rvsa.rvsa_vit_tiny(image_size=(32, 128)).state_dict().items()}
    encoder = rvsa.rvsa_vit_tiny(image_size=64)
    torn = {**wide, "encoder.pos_embed": torch.zeros(1, 15, 128)}
    with pytest.raises(ValueError, match=r"encoder\.pos_embed has 15 positions; expected 2x8"):
        encoder.resize_state(torn, "encoder.")
    changed = encoder.resize_state(wide, "encoder.")
    assert changed["encoder.pos_embed"] == "2x8 → 4x4 tokens, bicubic"
    assert changed["encoder.blocks.3.attn.rel_pos_h"] == "3 → 7 rows, bicubic" and len(changed) == 5
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in wide.items()})


def test_a_saved_state_without_global_blocks() -> None:
    encoder = rvsa.rvsa_vit_tiny(image_size=64)
    state = {"pos_embed": torch.randn(1, 32, 128)}
    with pytest.raises(ValueError, match="pos_embed has 32 positions; expected a square grid"):
        encoder.resize_state(state)
    with pytest.raises(ValueError, match="pos_embed has 32 positions; expected 4x4"):
        encoder.resize_state(state, saved_size=(64, 64))
    assert encoder.resize_state(state, saved_size=[64, 128]) == {"pos_embed": "4x8 → 4x4 tokens, bicubic"}
