"""What is no floating-point tensor is refused by every operator, by name, before anything is computed."""

import pytest
import torch

import rskernels

ROWS, MAPS = torch.ones(2, 6), torch.ones(1, 3, 4, 5)
HEADS, WEIGHT = torch.ones(1, 2, 4, 8), torch.ones(6, 6)
FACTORS = {"a_q": torch.ones(1, 6), "b_q": torch.ones(2, 1), "a_v": torch.ones(1, 6), "b_v": torch.ones(2, 1)}

# operator -> its tensor arguments, its other arguments
CALLS = {
    "linear": ({"x": ROWS, "weight": WEIGHT, "bias": torch.ones(6)}, {}),
    "layer_norm": ({"x": ROWS, "weight": torch.ones(6), "bias": torch.ones(6)}, {}),
    "lora_linear": (
        {"x": ROWS, "weight": WEIGHT, "bias": torch.ones(6), "a": torch.ones(1, 6), "b": torch.ones(6, 1)},
        {"scale": 1.0},
    ),
    "lora_qkv": ({"x": ROWS, "weight": WEIGHT, "bias": torch.ones(6), **FACTORS}, {"scale": 1.0}),
    "rel_pos_attention": (
        {
            "qkv": torch.ones(1, 3, 3, 12),
            "rel_pos_h": torch.ones(3, 4),
            "rel_pos_w": torch.ones(3, 4),
            "pad_qkv": torch.ones(12),
        },
        {"num_heads": 1, "window_size": 2},
    ),
    "cross_attention": (
        {"q": HEADS, "k": HEADS, "v": HEADS, "mask": torch.ones(1, 4, 4, dtype=torch.bool)},
        {},
    ),
    "distillation_loss": ({"student": MAPS, "teacher": MAPS}, {}),
    "deformable_attention": (
        {
            "value": torch.ones(1, 4, 1, 2),
            "sampling_locations": torch.ones(1, 1, 1, 1, 1, 2),
            "attention_weights": torch.ones(1, 1, 1, 1, 1),
        },
        {"spatial_shapes": [(2, 2)]},
    ),
}
# Tables come together: one of them alone is another error, see test_rel_pos_attention_contract.py.
OPTIONAL = {"bias", "mask", "pad_qkv", "rel_pos_h", "rel_pos_w"}


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, (tensors, _) in CALLS.items() for name in tensors]
)
def test_what_is_no_tensor_is_named(op, name):
    tensors, options = CALLS[op]
    call = getattr(rskernels, op)
    call(**tensors, **options)
    wrong = {"list": [1.0], "float": 1.0, "torch.int64": torch.ones(6, 6, dtype=torch.int64)}
    if name not in OPTIONAL or op == "layer_norm":
        wrong["None"] = None
    for found, value in wrong.items():
        expected = r"expected (a floating-point tensor|torch\.bool)"
        with pytest.raises(TypeError, match=rf"^{op}: {name} is {found}; {expected}"):
            call(**{**tensors, name: value}, **options)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("features is None; expected a list", {"features": None}),
        (r"features\[0\] is float", {"features": [1.0]}),
        (r"features\[0\] is None", {"features": [None]}),
        ("weights is None; expected a list", {"weights": None}),
        ("weights is a tensor; expected a list", {"weights": torch.ones(1, 2, 3, 3, 3)}),
        (r"weights\[0\] is None", {"weights": [None]}),
        ("biases is None; expected a list", {"biases": None}),
        (r"biases\[0\] is list", {"biases": [[1.0, 2.0]]}),
        ("dilations is None; expected a list", {"dilations": None}),
        ("shift is None", {"scale_shift": (torch.ones(2), None)}),
        ("projection weight is None", {"projection": (None, None)}),
        ("projection bias is float", {"projection": (torch.ones(4, 2), 1.0)}),
    ],
)
def test_lists_of_tensors(match, changes):
    call = {"features": [MAPS], "weights": [torch.ones(2, 3, 3, 3)], "biases": [None], "dilations": [1]}
    rskernels.dilated_aspp(**call)
    with pytest.raises(TypeError, match=f"^dilated_aspp: {match}"):
        rskernels.dilated_aspp(**{**call, **changes})


@pytest.mark.parametrize("shapes", [[2, 2], [(2, 2, 1)], None, [(2.0, 2.0)], torch.tensor([[2, 2]])])
def test_spatial_shapes_that_are_none(any_backend, shapes) -> None:
    value, locations = torch.randn(1, 4, 1, 2), torch.rand(1, 3, 1, 1, 2, 2)
    with pytest.raises(TypeError, match=r"deformable_attention: spatial_shapes .*\(height, width\) ints"):
        rskernels.deformable_attention(value, shapes, locations, torch.rand(1, 3, 1, 1, 2))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"projection": torch.randn(2, 2)}, "projection"),
        ({"projection": (torch.randn(2, 2),)}, "projection"),
        ({"scale_shift": (torch.randn(2),)}, "scale_shift"),
        ({"scale_shift": torch.randn(2)}, "scale_shift"),
        ({"dilations": 1}, "dilations"),
        ({"dilations": [1.5]}, "dilations"),
    ],
)
def test_pairs_and_lists_that_are_none(any_backend, options, named) -> None:
    arguments = {"dilations": [1], **options}
    with pytest.raises(TypeError, match=f"dilated_aspp: {named} is .*expected"):
        rskernels.dilated_aspp(torch.randn(1, 2, 4, 4), [torch.randn(2, 2, 3, 3)], [None], **arguments)
