"""Calls of lora_qkv, and the C++ kernels compared with the formula in float64."""

import torch

import rskernels

DTYPES = (torch.float32, torch.bfloat16)
QKV = ("x", "weight", "bias", "a_q", "b_q", "a_v", "b_v")
RESULTS = ("y", "x", "a_q", "b_q", "a_v", "b_v")


def qkv_arguments(dtype, *, rows=(3, 50), inputs=24, dim=16, ranks=(4, 2), bias=True):
    """x, weight, bias, a_q, b_q, a_v, b_v with gradients where lora_qkv gives them."""
    x = torch.randn(*rows, inputs).to(dtype).requires_grad_()
    weight = (torch.randn(3 * dim, inputs) / max(inputs, 1) ** 0.5).to(dtype)
    factors = [
        torch.randn(*shape).to(dtype).requires_grad_()
        for rank in ranks
        for shape in ((rank, inputs), (dim, rank))
    ]
    return [x, weight, torch.randn(3 * dim).to(dtype) if bias else None, *factors]


def formula(x, weight, bias, a_q, b_q, a_v, b_v, *, scale):
    """The merged-weight form, written independently of the package."""
    update = torch.zeros_like(weight)
    dim = weight.shape[0] // 3
    update = update.index_add(0, torch.arange(dim), b_q @ a_q)
    update = update.index_add(0, torch.arange(2 * dim, 3 * dim), b_v @ a_v)
    out = x @ (weight + scale * update).T
    return out if bias is None else out + bias


def gradients(call, args, grad):
    leaves = [a for a in args if a is not None and a.requires_grad]
    out = call(*args, scale=0.75)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def as_dtype(args, dtype):
    return [None if a is None else a.detach().to(dtype).requires_grad_(a.requires_grad) for a in args]


def conditioning(args, exact, grad):
    """Relative errors of the factors' gradients that come from sums whose terms are off by what is allowed,
    independently of each other: more than that where a sum is nearly zero, as one number may be."""
    x, _, _, *factors = (t if t is None else t.detach().double().square() for t in args)
    allowed = {torch.float32: 2e-6, torch.bfloat16: 5e-3}[args[0].dtype]
    x, grad = x.flatten(0, -2), grad.double().square().flatten(0, -2)
    dim = factors[1].shape[0]
    variances = []
    for (a, b), g in zip((factors[:2], factors[2:]), (grad[:, :dim], grad[:, 2 * dim :]), strict=True):
        variances += [(g @ b).T @ x, g.T @ (x @ a.T)]
    sizes = [t.norm().clamp_min(1e-30) for t in exact[2:]]
    errors = [0.75 * allowed * v.sum().sqrt() / size for v, size in zip(variances, sizes, strict=True)]
    return [0.0, 0.0, *(error.item() for error in errors)]


def compare(assert_accurate, args, grad, dtype):
    """lora_qkv in C++ against the formula in float64, output and every gradient, eager as the measure."""
    exact = gradients(formula, as_dtype(args, torch.float64), grad)
    with rskernels.backend("reference"):
        eager = gradients(rskernels.lora_qkv, as_dtype(args, dtype), grad)
    with rskernels.backend("cpp"):
        ours = gradients(rskernels.lora_qkv, args, grad)
    unavoidable = conditioning(args, exact, grad)
    for name, out, peer, reference, error in zip(RESULTS, ours, eager, exact, unavoidable, strict=True):
        assert out.dtype == dtype
        assert_accurate(out, peer, reference, name, error)
