"""No model makes the host wait for the device in a forward pass, which a CUDA graph could not record either.

On tensors of a CUDA device that need not be there: FakeTensorMode knows shapes, dtypes and devices, and
raises where Python asks for a value.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rsmodels

TINY = rsmodels.list_models("*_tiny")
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Transfers(TorchDispatchMode):
    """Notes every copy between the host and the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if func in COPIES and len({tensor.device.type for tensor in tensors}) > 1:
            self.found.append(f"{func} of {tuple(tensors[0].shape)} from {tensors[0].device}")
        return out


class Losses(torch.nn.Module):
    """The sum of a model's losses on the batch that its images are made one of."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        model, size = self.model, len(images)
        mask = torch.zeros(size, *model.image_size, dtype=torch.int64, device=images.device)
        batch = {"image": images, "mask": mask}
        if getattr(model, "transfers", False):
            shape = (size, model.teacher_dim, *model.grid_size)
            batch["teacher"] = [torch.empty(shape, device=images.device) for _ in range(4)]
        return sum(model.losses(batch).values())


def transfers_of(module: torch.nn.Module, image_size: tuple[int, int]) -> tuple[torch.Tensor, list[str]]:
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    with FakeTensorMode() as fake:
        on_device = {name: fake.from_tensor(value).to("cuda") for name, value in state.items()}
        images = torch.empty(2, 3, *image_size, device="cuda")
        with Transfers() as transfers:
            out = functional_call(module, on_device, (images,))
    assert out.device.type == "cuda"
    return out, transfers.found


@pytest.mark.parametrize("name", TINY)
def test_inference_leaves_the_host_alone(name: str) -> None:
    model = rsmodels.create_model(name, num_classes=3, image_size=64).eval()
    with torch.no_grad():
        logits, found = transfers_of(model, model.image_size)
    assert found == [] and logits.shape == (2, 3, *model.image_size)


# Mask2Former's losses match queries and classes on the host, and draw points where masks have pixels.
@pytest.mark.parametrize("name", [n for n in TINY if not n.startswith(("crossearth", "rein"))])
def test_losses_leave_the_host_alone(name: str) -> None:
    model = rsmodels.create_model(name, num_classes=3, image_size=64).train()
    loss, found = transfers_of(Losses(model), model.image_size)
    assert found == [] and loss.shape == ()


def test_a_transfer_and_a_question_are_noticed() -> None:
    class Waits(torch.nn.Module):
        def __init__(self, asks: bool) -> None:
            super().__init__()
            self.asks = asks

        def forward(self, images):
            factor = torch.tensor([2.0], device=images.device)
            return images * factor if not self.asks or images.any() else images

    assert len(transfers_of(Waits(asks=False), (8, 8))[1]) == 1
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        transfers_of(Waits(asks=True), (8, 8))
