"""Any four-stage network of timm as an encoder (https://github.com/huggingface/pytorch-image-models)."""

from typing import Any

import timm
from torch import nn

from rsmodels.weights import LoadReport, load_part, read_state, resolve, sha256_of


def timm_stages(name: str, **options: Any) -> nn.Module:
    """`timm.create_model(name, features_only=True)`: images → its maps (B, C_i, H/4, W/4), ... (…, H/32, W/32).

    Args:
        name: a timm model with stages at 1/4, 1/8, 1/16 and 1/32 of the input.
        options: timm's own, e.g. drop_path_rate; weights are loaded by the caller.
    """
    try:
        network = timm.create_model(name, pretrained=False, features_only=True, **options)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"student {name!r}: timm cannot build it as a feature pyramid ({reason}); see "
            "timm.list_models() for names"
        ) from None
    reductions = network.feature_info.reduction()
    if reductions[-4:] != [4, 8, 16, 32]:
        raise ValueError(
            f"student {name!r}: has stages at 1/{', 1/'.join(map(str, reductions))} of the input; expected "
            "four at 1/4, 1/8, 1/16 and 1/32"
        )
    if len(reductions) > 4:  # a stem at 1/2
        indices = network.feature_info.out_indices[-4:]
        network = timm.create_model(
            name, pretrained=False, features_only=True, out_indices=indices, **options
        )
    return network


def load_timm_stages(model: nn.Module, part: str, source: str) -> LoadReport:
    """Load timm's weights of a whole network into the feature pyramid `part` of `model`; print and return the
    report. Weights of the classifier, which a pyramid lacks, are dropped."""
    path = resolve(source)
    stages = model.get_submodule(part)
    # timm flattens the names of a pyramid's stages: stages.0.blocks becomes stages_0.blocks.
    own = {key.replace(".", "_"): key for key in stages.state_dict()}
    report = LoadReport(str(source), sha256_of(path))
    state = {}
    for key, value in read_state(path).items():
        if key.startswith(("head.", "fc.", "classifier.")):
            report.dropped[key] = "the classifier's"
        else:
            state[own.get(key.replace(".", "_"), key)] = value
    load_part(stages, state, report, part)
    report.finish(model)
    return report
