"""Any four-stage network of timm as an encoder (https://github.com/huggingface/pytorch-image-models)."""

from typing import Any

from torch import nn

from rsmodels.weights import LoadReport, load_part, read_state, resolve, sha256_of

REDUCTIONS = [4, 8, 16, 32]


def timm_stages(name: str, **options: Any) -> Any:
    """timm's create_model(name, features_only=True): images → maps (B, C_i, ·, ·) at 1/4, 1/8, 1/16, 1/32.

    Args:
        name: a timm model whose last four stages are at 1/4, 1/8, 1/16 and 1/32 of the input.
        options: timm's own, e.g. drop_path_rate; weights are loaded by the caller.
    """
    import timm  # imports torchvision and Pillow, which other models do without

    try:
        network: Any = timm.create_model(name, pretrained=False, features_only=True, out_indices=4, **options)
    except (RuntimeError, TypeError, AttributeError, IndexError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"student {name!r}: timm cannot build it as a feature pyramid with the options {options} "
            f"({reason}); see timm.list_models() for names, and the network for its options"
        ) from None
    reductions = network.feature_info.reduction()
    if reductions != REDUCTIONS:
        raise ValueError(
            f"student {name!r}: its last stages are at 1/{', 1/'.join(map(str, reductions))} of the input; "
            "expected four at 1/4, 1/8, 1/16 and 1/32, as those of convnext_base or resnet50"
        )
    return network


def load_timm_stages(model: nn.Module, part: str, source: str) -> LoadReport:
    """Load timm's weights of a whole network into the feature pyramid `part` of `model`; print and return the
    report. What comes behind the last stage, such as the classifier, is dropped."""
    path = resolve(source)
    stages = model.get_submodule(part)
    # timm flattens the names of a pyramid's stages: stages.0.blocks becomes stages_0.blocks.
    own = {key.replace(".", "_"): key for key in stages.state_dict()}
    children = tuple(f"{name}_" for name, _ in stages.named_children())
    report = LoadReport(str(source), sha256_of(path))
    state = {}
    for key, value in read_state(path).items():
        flat = key.replace(".", "_")
        if flat in own or flat.startswith(children):
            state[own.get(flat, key)] = value
        else:
            report.dropped[key] = "behind the last stage"
    load_part(stages, state, report, part)
    report.finish(model)
    return report
