"""Arbitrary style transfer by two networks (Ghiasi et al. 2017, https://arxiv.org/abs/1705.06830), frozen.

Layers, key names and value ranges are those of the checkpoints published with style augmentation (Jackson et
al. 2019, https://arxiv.org/abs/1809.05375; github.com/philipjackson/style-augmentation), CrossEarth's.

Shapes: B images, H/W pixels, C channels, S = 100 numbers in an embedding.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsmodels.style.base import check_embedding, check_images
from rsmodels.weights import LoadReport, State, load_part, read_state

SIZE = 100
# The published files, and the entry of each that holds the weights.
PREDICTOR_FILE, PREDICTOR_KEY = "checkpoint_stylepredictor.pth", "state_dict_stylepredictor"
TRANSFORMER_FILE, TRANSFORMER_KEY = "checkpoint_transformer.pth", "state_dict_ghiasi"

# Smaller images shrink to nothing in the predictor's strided layers.
SMALLEST = 43
STRIDE = 4  # of the transformer

# The predictor's input, from [0, 1]: 2x - 1, but the published code divides blue by 0.255 where afterwards it
# multiplies by 0.225. The published embeddings rest on it.
BLUE_SLIP = 0.225 / 0.255
SCALE = (2.0, 2.0, 2 * BLUE_SLIP)
SHIFT = (-1.0, -1.0, 2 * (0.406 - 0.5 - 0.406 * BLUE_SLIP))


class GhiasiStyle(nn.Module):
    """Style predictor (Inception-v3 up to Mixed_6e, mean, linear) and style transformer (S = 100).

    A new one has random weights: `load_checkpoints` fills it from the published files, or the model that owns
    it from its state dict. Frozen: no weight has a gradient, and train mode changes nothing.
    """

    name = "ghiasi"
    size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.predictor = StylePredictor()
        self.transformer = StyleTransformer()
        self.requires_grad_(False)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) float in [0, 1], H and W of 43 or more → (B, 100) float32."""
        images = check_images(images, "GhiasiStyle")
        if min(images.shape[-2:]) < SMALLEST:
            height, width = images.shape[-2:]
            raise ValueError(
                f"GhiasiStyle: images of {height} x {width} pixels; its style predictor needs {SMALLEST} x "
                f"{SMALLEST} or more: take larger images, or the style 'color'"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self.predictor(images)

    @torch.no_grad()
    def transfer(self, images: Tensor, embedding: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1], of any size, in the style of embedding (B, 100): likewise."""
        images = check_images(images, "GhiasiStyle")
        embedding = check_embedding(embedding, images, SIZE, "GhiasiStyle")
        height, width = images.shape[-2:]
        # The transformer halves twice and doubles twice; what is added to come out even is cut off again.
        bottom, right = (max(-(-side // STRIDE), 2) * STRIDE - side for side in (height, width))
        with torch.autocast(images.device.type, enabled=False):
            padded = F.pad(images, (0, right, 0, bottom), mode="replicate")
            return self.transformer(padded, embedding)[..., :height, :width]

    def fingerprint(self) -> str:
        """SHA-256 over the predictor's weights: it is the predictor that makes the embeddings."""
        digest = hashlib.sha256()
        for key, value in sorted(self.predictor.state_dict().items()):
            digest.update(key.encode() + value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def load_checkpoints(self, folder: str | os.PathLike[str]) -> LoadReport:
        """Load the two published files from `folder`, as tensors only; print and return the report.

        Raises FileNotFoundError or ValueError, naming the file, where one is missing, unreadable or other.
        """
        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder; give the one that holds {PREDICTOR_FILE} and {TRANSFORMER_FILE}, "
                "of github.com/philipjackson/style-augmentation"
            )
        report = LoadReport(str(folder), "")
        for part, file, key in (
            ("predictor", PREDICTOR_FILE, PREDICTOR_KEY),
            ("transformer", TRANSFORMER_FILE, TRANSFORMER_KEY),
        ):
            module = self.get_submodule(part)
            state = read_state(Path(folder, file), wrapped_in=(key,))
            report.source = str(Path(folder, file))
            own = module.state_dict()
            # Of the counters of batches, which only training reads, nobody needs to hear.
            foreign = [name for name in state if name not in own and "num_batches" not in name]
            report.dropped |= {f"{part}.{name}": "not part of this network" for name in foreign}
            known: State = {name: state[name] for name in own if name in state}
            load_part(module, known, report, part)
        report.source, report.sha256 = str(folder), self.fingerprint()
        report.finish(self)
        return report


# -------------------------------------------------------------------------------------------- style predictor


class StylePredictor(nn.Module):
    """images (B, 3, H, W) in [0, 1] → embeddings (B, 100)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padding=0)
        self.Mixed_5b = inception_a(192, pool=32)
        self.Mixed_5c = inception_a(256, pool=64)
        self.Mixed_5d = inception_a(288, pool=64)
        self.Mixed_6a = inception_b(288)
        self.Mixed_6b = inception_c(768, narrow=128)
        self.Mixed_6c = inception_c(768, narrow=160)
        self.Mixed_6d = inception_c(768, narrow=160)
        self.Mixed_6e = inception_c(768, narrow=192)
        self.fc = nn.Linear(768, SIZE)

    def forward(self, images: Tensor) -> Tensor:
        scale, shift = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (SCALE, SHIFT))
        x = images * scale + shift
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6a(x)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        return self.fc(x.mean((2, 3)))


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with its trained statistics in every mode, ReLU."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        same = (height // 2, width // 2)
        self.conv = nn.Conv2d(
            channels, out, (height, width), stride, same if padding is None else padding, bias=False
        )
        self.bn = FixedNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn(self.conv(x)))


class FixedNorm(nn.Module):
    """Batch norm that never measures: buffers under the names of nn.BatchNorm2d, eps 0.001."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), start))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.001)


Step = tuple[Any, ...]  # (channels, kernel) of a convolution, and its stride where that is not 1


class Mixed(nn.Module):
    """Inception's mixed block: chains of convolutions side by side, one of them behind a pooling.

    Args:
        channels: of the input.
        branches: name → the chain. One convolution bears the branch's name, several that and _1, _2 …
            The branch "branch_pool" starts from the 3x3 mean of the input.
        reduce: add the input's 3x3 maximum at stride 2 as the last branch.
    """

    def __init__(self, channels: int, branches: dict[str, list[Step]], *, reduce: bool = False) -> None:
        super().__init__()
        self.reduce = reduce
        self.branches: dict[str, list[str]] = {}
        for branch, steps in branches.items():
            names = [branch] if len(steps) == 1 else [f"{branch}_{i}" for i in range(1, len(steps) + 1)]
            width = channels
            for name, (out, kernel, *strided) in zip(names, steps, strict=True):
                stride, padding = (strided[0], 0) if strided else (1, None)
                self.add_module(name, ConvNorm(width, out, kernel, stride=stride, padding=padding))
                width = out
            self.branches[branch] = names

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, names in self.branches.items():
            y = F.avg_pool2d(x, 3, stride=1, padding=1) if branch == "branch_pool" else x
            for name in names:
                y = self.get_submodule(name)(y)
            outputs.append(y)
        if self.reduce:
            outputs.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(outputs, 1)


def inception_a(channels: int, *, pool: int) -> Mixed:
    """1x1, 5x5, twice 3x3, pooled: C → 224 + pool."""
    return Mixed(
        channels,
        {
            "branch1x1": [(64, 1)],
            "branch5x5": [(48, 1), (64, 5)],
            "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
            "branch_pool": [(pool, 1)],
        },
    )


def inception_b(channels: int) -> Mixed:
    """Half the size: C → C + 480."""
    branches: dict[str, list[Step]] = {
        "branch3x3": [(384, 3, 2)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
    }
    return Mixed(channels, branches, reduce=True)


def inception_c(channels: int, *, narrow: int) -> Mixed:
    """7x7 taken apart into rows and columns: C → 768."""
    row, column = (1, 7), (7, 1)
    return Mixed(
        channels,
        {
            "branch1x1": [(192, 1)],
            "branch7x7": [(narrow, 1), (narrow, row), (192, column)],
            "branch7x7dbl": [(narrow, 1), (narrow, column), (narrow, row), (narrow, column), (192, row)],
            "branch_pool": [(192, 1)],
        },
    )


# ------------------------------------------------------------------------------------------ style transformer


class StyleTransformer(nn.Module):
    """images (B, 3, H, W) in [0, 1], H and W multiples of 4, and embeddings (B, 100) → images in (0, 1).

    The first three layers know no style; from there on every instance norm is scaled and shifted by it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                Down(3, 32, 9),
                Down(32, 64, 3, stride=2),
                Down(64, 128, 3, stride=2),
                *(Residual(128) for _ in range(5)),
                Styled(128, 64, 3, upsample=True),
                Styled(64, 32, 3, upsample=True),
                Styled(32, 3, 9, last=True),
            ]
        )

    def forward(self, images: Tensor, embedding: Tensor) -> Tensor:
        x = images
        for layer in self.layers:
            x = layer(x) if isinstance(layer, Down) else layer(x, embedding)
        return torch.sigmoid(x)


class Down(nn.Module):
    """Reflection-padded convolution, instance norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(F.instance_norm(_reflected(self.conv, x)))


class Residual(nn.Module):
    """Two convolutions with styled instance norms, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3)
        self.conv2 = nn.Conv2d(channels, channels, 3)
        self.fc_beta1, self.fc_gamma1 = nn.Linear(SIZE, channels), nn.Linear(SIZE, channels)
        self.fc_beta2, self.fc_gamma2 = nn.Linear(SIZE, channels), nn.Linear(SIZE, channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = _restyled(_reflected(self.conv1, x), embedding, self.fc_gamma1, self.fc_beta1)
        y = _restyled(_reflected(self.conv2, F.relu_(y)), embedding, self.fc_gamma2, self.fc_beta2)
        return x + y


class Styled(nn.Module):
    """Nearest upsampling by 2 where asked for, convolution, styled instance norm, ReLU (not in the last)."""

    def __init__(
        self, channels: int, out: int, kernel: int, *, upsample: bool = False, last: bool = False
    ) -> None:
        super().__init__()
        self.upsample, self.last = upsample, last
        self.conv = nn.Conv2d(channels, out, kernel)
        self.fc_beta, self.fc_gamma = nn.Linear(SIZE, out), nn.Linear(SIZE, out)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = _restyled(_reflected(self.conv, x), embedding, self.fc_gamma, self.fc_beta)
        return x if self.last else F.relu_(x)


def _reflected(conv: nn.Conv2d, x: Tensor) -> Tensor:
    pad = conv.kernel_size[0] // 2
    return conv(F.pad(x, (pad, pad, pad, pad), mode="reflect"))


def _restyled(x: Tensor, embedding: Tensor, gamma: nn.Linear, beta: nn.Linear) -> Tensor:
    """Conditional instance norm: each image's own scale and shift per channel."""
    gamma_bc11, beta_bc11 = (linear(embedding)[:, :, None, None] for linear in (gamma, beta))
    return torch.addcmul(beta_bc11, F.instance_norm(x), gamma_bc11)
