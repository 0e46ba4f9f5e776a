"""What the encoder tests share: the relative error, and MTP's RVSA in miniature."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rsmodels.encoders.rvsa import RVSAViT

State = dict[str, Tensor]
PYRAMID = ("fpn1.0", "fpn1.1.ln", "fpn1.3", "fpn2.0")


class MTP:
    """A small encoder of MTP: its checkpoint, and what RVSAViT makes of it."""

    dim, depth, heads, global_blocks = sizes = 16, 3, 2, (1,)

    @staticmethod
    def layout(
        dim: int, depth: int, heads: int, global_blocks: Sequence[int], grid: tuple[int, int], s: int
    ) -> dict[str, tuple[int, ...]]:
        """Names and shapes of an encoder of MTP, in the order of its code."""
        d = dim // heads
        shapes: dict[str, tuple[int, ...]] = {
            "pos_embed": (1, grid[0] * grid[1], dim),
            "patch_embed.proj.weight": (dim, 3, 16, 16),
            "patch_embed.proj.bias": (dim,),
        }
        for i in range(depth):
            own: dict[str, tuple[int, ...]] = {"norm1.weight": (dim,), "norm1.bias": (dim,)}
            if i in global_blocks:
                own["attn.full_attn_rel_pos_h"] = (2 * grid[0] - 1, d)
                own["attn.full_attn_rel_pos_w"] = (2 * grid[1] - 1, d)
            else:
                own |= {"attn.rel_pos_h": (2 * s - 1, d), "attn.rel_pos_w": (2 * s - 1, d)}
                own["attn.relative_position_bias_table"] = ((2 * s - 1) ** 2, heads)
                own["attn.relative_position_index"] = (s * s, s * s)
                for name, size in (("offsets", 2), ("scales", 2), ("angles", 1)):
                    own[f"attn.sampling_{name}.2.weight"] = (size * heads, dim, 1, 1)
                    own[f"attn.sampling_{name}.2.bias"] = (size * heads,)
            for name, rows, columns in (
                ("attn.qkv", 3 * dim, dim),
                ("attn.proj", dim, dim),
                ("mlp.fc1", 4 * dim, dim),
                ("mlp.fc2", dim, 4 * dim),
            ):
                own |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
            own |= {"norm2.weight": (dim,), "norm2.bias": (dim,)}
            shapes |= {f"blocks.{i}.{name}": shape for name, shape in own.items()}
        shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
        for name in PYRAMID:
            shapes |= {f"{name}.weight": (dim,) if "ln" in name else (dim, dim, 2, 2), f"{name}.bias": (dim,)}
        return shapes

    def draw(self, grid: tuple[int, int], s: int, dtype: torch.dtype = torch.float64) -> State:
        """An encoder of MTP with random values in every parameter: windows that move, grow and turn."""
        generator = torch.Generator().manual_seed(0)
        state = {}
        for name, shape in self.layout(*self.sizes, grid, s).items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            scale = 1.2 * shape[1] ** -0.5 if name.endswith("weight") and len(shape) == 2 else 0.3
            state[name] = (scale * value + ("norm" in name and name.endswith("weight"))).to(dtype)
        for name in state:
            if name.endswith("relative_position_index"):
                state[name] = torch.arange(s**4).view(s * s, s * s)
        return state

    @staticmethod
    def named_as_theirs(name: str, global_blocks: Sequence[int] = global_blocks) -> str:
        """The name in MTP's file of a parameter of RVSAViT."""
        for kind in ("offsets", "scales", "angles"):
            name = name.replace(f"sampling_{kind}.", f"sampling_{kind}.2.")
        if ".rel_pos_" in name and int(name.split(".")[1]) in global_blocks:
            name = name.replace(".rel_pos_", ".full_attn_rel_pos_")
        return name

    def build(self, grid: tuple[int, int], s: int = 3) -> RVSAViT:
        return RVSAViT(*self.sizes, image_size=(16 * grid[0], 16 * grid[1]), window_size=s)

    def load(
        self,
        state: State,
        folder: Path,
        grid: tuple[int, int],
        s: int = 3,
        dtype: torch.dtype = torch.float64,
    ) -> RVSAViT:
        """What RVSAViT is after reading `state` from a file."""
        path = folder / "mtp.pth"
        torch.save({"state_dict": state}, path)
        encoder = self.build(grid, s).to(dtype)
        encoder.load_pretrained(str(path))
        return encoder


@pytest.fixture(scope="session")
def mtp() -> MTP:
    return MTP()


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """‖found − expected‖ / ‖expected‖."""

    def measure(found: Tensor, expected: Tensor) -> float:
        return ((found - expected).norm() / expected.norm()).item()

    return measure
