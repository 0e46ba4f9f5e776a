"""What several test files of rsmodels need: small models and files, and how errors read."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

import rsmodels
from rsmodels.data import create_dataset
from rsmodels.data.raster import gdal

# rs_sam_tiny with this embedding_dim has every part that the miniature SAM has weights for.
MINIATURE_EMBEDDING_DIM = 8


def make_miniature_sam(image_size: int = 128) -> Sam:
    """A SAM of sam_vit_tiny's sizes; zero-initialised parameters are drawn, so that each one matters."""
    grid = image_size // 16
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=image_size,
            embed_dim=128,
            depth=4,
            num_heads=4,
            out_chans=64,
            norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6),
            use_rel_pos=True,
            window_size=4,
            global_attn_indexes=(1, 3),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=64,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=64,
            transformer=TwoWayTransformer(depth=2, embedding_dim=64, num_heads=4, mlp_dim=128),
        ),
    )
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                nn.init.normal_(parameter, std=0.3)
    return sam.eval()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def miniature_sam() -> Sam:
    torch.manual_seed(7)
    return make_miniature_sam()


@pytest.fixture(scope="session")
def sam_checkpoint(miniature_sam: Sam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature in the official layout, as a .pth file."""
    path = tmp_path_factory.mktemp("sam") / "sam_vit_miniature.pth"
    torch.save(miniature_sam.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an untrained tiny model for the synthetic classes, and a log."""
    run = tmp_path_factory.mktemp("run")
    schema = create_dataset("synthetic", length=1).schema
    torch.manual_seed(0)
    model = rsmodels.create_model("rs_sam_tiny", num_classes=schema.num_logits, image_size=64)
    info = {key: schema.to_dict()[key] for key in ("classes", "palette", "binary")}
    rsmodels.save_model(model, run / "best", {**info, "training": {"data": "synthetic"}})
    lines = [{"kind": "train", "step": step, "loss": 1 / step, "lr": 1e-3} for step in range(1, 5)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut sho')
    return run


@pytest.fixture(scope="module")
def best(run_folder: Path) -> Path:
    """best/ of that run."""
    return run_folder / "best"


@pytest.fixture(scope="session")
def write_raster() -> Callable[..., Path]:
    """write_raster(path, bands) -> the path, now of a GeoTIFF of (C, H, W); `options` are rasterio's."""

    def write(path: Path, bands: np.ndarray, **options: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        count, height, width = bands.shape
        profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": bands.dtype}
        with gdal(), rasterio.open(path, "w", **{**profile, **options}) as target:
            target.write(bands)
        return path

    return write


@contextmanager
def held_elsewhere(hold: Callable[[Path], Any], path: Path) -> Iterator[int]:
    code = (
        f"import sys; from rsmodels.files import {hold.__name__}; "
        f"lock = {hold.__name__}({str(path)!r}); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        yield other.pid
        other.kill()


@pytest.fixture(scope="session")
def another_process_holds() -> Callable[[Callable[[Path], Any], Path], AbstractContextManager[int]]:
    """`with another_process_holds(hold_file, path) as pid`: hold_file or hold_folder of rsmodels.files."""
    return held_elsewhere


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """error_line() -> what a command printed, which must be one line on stderr and nothing else."""

    def read() -> str:
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("rsmodels: error: ") and err.count("\n") == 1, (out, err)
        return err.removeprefix("rsmodels: error: ").rstrip("\n")

    return read


@pytest.fixture(scope="session")
def one_line() -> Callable[..., None]:
    """one_line(error, *parts): the message is one line, and these are in it."""

    def check(error: pytest.ExceptionInfo[BaseException], *parts: object) -> None:
        message = str(error.value)
        assert "\n" not in message
        assert all(str(part) in message for part in parts), message

    return check
