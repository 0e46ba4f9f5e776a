"""rskernels: the fused operators of rsmodels. It knows tensors and nothing of models.

Every operator has a plain-PyTorch reference that defines it, and accelerated backends behind one
dispatch table; `explain()` prints which serves what on this machine, `set_backend` steers it.
"""

__version__ = "0.1.0"

from rskernels.dispatch import backend, get_backend, set_backend
from rskernels.explain import explain, instruction_set
from rskernels.ops.cross_attention import cross_attention
from rskernels.ops.deformable_attention import deformable_attention
from rskernels.ops.dilated_aspp import dilated_aspp
from rskernels.ops.distillation_loss import distillation_loss
from rskernels.ops.layer_norm import layer_norm
from rskernels.ops.linear import linear
from rskernels.ops.lora import lora_linear, lora_qkv
from rskernels.ops.rel_pos_attention import rel_pos_attention

__all__ = [
    "__version__",
    "backend",
    "cross_attention",
    "deformable_attention",
    "dilated_aspp",
    "distillation_loss",
    "explain",
    "get_backend",
    "instruction_set",
    "layer_norm",
    "linear",
    "lora_linear",
    "lora_qkv",
    "rel_pos_attention",
    "set_backend",
]
