"""The dispatch table: what serves what, explicit choices, compilation, life without the extension."""

import itertools
import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch

import rskernels
from rskernels import __main__ as command
from rskernels import dispatch, library, tuning

PUBLIC = set(rskernels.__all__) - {
    "__version__", "backend", "explain", "get_backend", "instruction_set", "set_backend",
}  # fmt: skip


def smallest_call(op, dtype):
    """A valid call of each operator on the CPU."""

    def z(*shape):
        return torch.zeros(*shape, dtype=dtype)

    calls = {
        "rel_pos_attention": lambda: rskernels.rel_pos_attention(
            z(1, 2, 2, 48), z(3, 16), z(3, 16), num_heads=1
        ),
        "linear": lambda: rskernels.linear(z(2, 3), z(4, 3), z(4)),
        "layer_norm": lambda: rskernels.layer_norm(z(2, 3), z(3), z(3)),
        "lora_linear": lambda: rskernels.lora_linear(z(2, 3), z(4, 3), z(4), z(1, 3), z(4, 1), scale=1.0),
        "lora_qkv": lambda: rskernels.lora_qkv(
            z(2, 3), z(6, 3), z(6), z(1, 3), z(2, 1), z(1, 3), z(2, 1), scale=1.0
        ),
        "cross_attention": lambda: rskernels.cross_attention(z(1, 1, 2, 4), z(1, 1, 3, 4), z(1, 1, 3, 4)),
        "distillation_loss": lambda: rskernels.distillation_loss(z(1, 2, 2, 2), z(1, 2, 2, 2)),
        "dilated_aspp": lambda: rskernels.dilated_aspp(z(1, 1, 4, 4), [z(1, 1, 3, 3)], [None], dilations=[1]),
        "deformable_attention": lambda: rskernels.deformable_attention(
            z(1, 4, 1, 2), [(2, 2)], z(1, 1, 1, 1, 1, 2), z(1, 1, 1, 1, 1)
        ),
    }
    return calls[op]()


def test_the_table_has_every_public_operator():
    assert set(dispatch.TABLE) == PUBLIC
    listed = {
        n
        for rows in dispatch.TABLE.values()
        for dtypes in rows.values()
        for names in dtypes.values()
        for n in names
    }
    assert listed <= set(dispatch.BACKENDS) - {*dispatch.AUTO, "reference"}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize(("op", "name"), list(itertools.product(sorted(PUBLIC), dispatch.BACKENDS)))
def test_a_named_backend_serves_or_says_why_not(op, name, dtype):
    serves = name in (*dispatch.AUTO, "reference") or (
        name not in dispatch.UNAVAILABLE and name in dispatch.TABLE[op].get("cpu", {}).get(dtype, ())
    )
    with rskernels.backend(name):
        if serves:
            smallest_call(op, dtype)
            return
        with pytest.raises(ValueError) as caught:
            smallest_call(op, dtype)
    message = str(caught.value)
    for part in (repr(name), op, str(dtype).removeprefix("torch."), "cpu", "set_backend('auto')"):
        assert part in message
    assert "\n" not in message


def test_set_backend_and_context_manager():
    rskernels.set_backend("reference")
    with pytest.raises(RuntimeError, match="on purpose"), rskernels.backend("auto"):
        assert rskernels.get_backend() == "auto"
        raise RuntimeError("on purpose")
    assert rskernels.get_backend() == "reference"
    with pytest.raises(
        ValueError, match=r"set_backend: unknown backend 'fast'; expected one of auto, auto\+triton, "
    ):
        rskernels.set_backend("fast")
    assert rskernels.get_backend() == "reference"


def test_choose(extension):
    x = torch.zeros(2)
    assert dispatch.choose("linear", x, None, x) == "cpp"
    assert dispatch.choose("linear", None, x.double()) == "reference"
    assert dispatch.choose("linear", x, x.bfloat16()) == "reference"
    assert dispatch.choose("linear", x, torch.zeros(2, device="meta")) == "reference"
    assert dispatch.choose("linear", x, without={"cpp": "too small"}) == "reference"
    with rskernels.backend("cpp"):
        with pytest.raises(ValueError, match="cannot serve linear for float32 on cpu: too small"):
            dispatch.choose("linear", x, without={"cpp": "too small"})
        with pytest.raises(
            ValueError, match="cannot serve linear for mixed dtypes on cpu: it serves linear for"
        ):
            dispatch.choose("linear", x, x.bfloat16())


def test_auto_with_another_takes_that_first(extension, monkeypatch):
    x, gpu = torch.zeros(2), torch.zeros(2, device="meta")
    monkeypatch.delitem(dispatch.UNAVAILABLE, "triton", raising=False)
    monkeypatch.setitem(dispatch.TABLE["linear"], "meta", {torch.float32: ()})
    for op in ("lora_qkv", "rel_pos_attention"):
        monkeypatch.setitem(dispatch.TABLE[op], "meta", dispatch.TABLE[op]["cuda"])
    with rskernels.backend("auto+sdpa"):
        assert dispatch.choose("rel_pos_attention", x) == "sdpa"
        assert dispatch.choose("rel_pos_attention", x, without={"sdpa": "too wide"}) == "cpp"
        assert dispatch.choose("linear", x) == "cpp"
    with rskernels.backend("auto+triton"):
        assert dispatch.choose("lora_qkv", gpu) == "triton"
        assert dispatch.choose("linear", gpu) == "reference"
        # Not SDPA, which is there to compare with.
        assert dispatch.choose("rel_pos_attention", gpu, without={"triton": "too wide"}) == "reference"
    assert dispatch.choose("lora_qkv", gpu) == "reference"


def test_another_thread_sees_the_same_backend():
    seen = []
    with rskernels.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(rskernels.get_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_compiled_code_follows_the_switch(extension):
    """The choice is traced away: no graph break, another graph when the backend changes."""
    graphs = []

    def capture(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(lambda x, w: rskernels.linear(x, w), fullgraph=True, backend=capture)
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    fused = compiled(x, w)
    with rskernels.backend("reference"):
        plain = compiled(x, w)
    compiled(x, w)
    torch.testing.assert_close(fused, plain)
    assert [any("rskernels.linear_forward" in t for t in targets) for targets in graphs] == [True, False]


def test_backward_uses_what_forward_used(extension):
    x, w = torch.randn(300, 64, requires_grad=True), torch.randn(96, 64, requires_grad=True)
    with rskernels.backend("cpp"):
        out = rskernels.linear(x, w).sum()
    (expected,) = torch.autograd.grad(out, w, retain_graph=True)
    with rskernels.backend("reference"):
        (found,) = torch.autograd.grad(out, w)
    assert torch.equal(found, expected)


def test_explain_names_everything(capsys):
    text = rskernels.explain()
    assert capsys.readouterr().out == text + "\n"
    threads = f"CPU threads: {torch.get_num_threads()}"
    for part in (rskernels.__version__, torch.__version__, threads, "backend: auto", *dispatch.TABLE):
        assert part in text
    for name, reason in dispatch.UNAVAILABLE.items():
        assert f"  {name}: {reason}" in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert len(text.splitlines()) <= 25 or torch.cuda.is_available()


def explained(text, op):
    """What explain() says serves `op` on the CPU, by dtype."""
    (row,) = [line.split() for line in text.splitlines() if line.split()[:2] == [op, "cpu"]]
    return dict(zip(("float32", "bfloat16", "float16", "float64"), row[2:], strict=True))


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_explain_says_what_a_backend_really_serves(name, capsys):
    with rskernels.backend(name):
        text = rskernels.explain()
        assert f"backend: {name}, " in text
        for op in sorted(PUBLIC):
            for dtype, served in explained(text, op).items():
                x = torch.zeros(2, dtype=getattr(torch, dtype))
                if served == "error":
                    with pytest.raises(ValueError, match=f"cannot serve {op}"):
                        dispatch.choose(op, x)
                else:
                    assert dispatch.choose(op, x) == served
        assert ("error: the call raises" in text) == (name not in (*dispatch.AUTO, "reference"))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_explain_instruction_set_and_tiles(extension, capsys):
    text = rskernels.explain()
    assert f"instruction set: {extension.cpu_capability()}" in text
    assert ("bfloat16 tiles: yes" in text) == extension.has_bf16_tiles()
    best = extension.cpu_supported()
    for level in ("baseline", "avx2"):
        if level == "avx2" and best == "baseline":
            continue
        before = extension.cpu_capability()
        try:
            extension.set_cpu_capability(level)
            text = rskernels.explain()
        finally:
            extension.set_cpu_capability(before)
        lowered = "" if level == best else f", lowered from {best}"
        assert f"instruction set: {level}{lowered} (RSKERNELS_ISA)" in text
        assert f"bfloat16 tiles: no, they need avx512_bf16, {level} is in use; " in text


def test_explain_in_other_surroundings(extension, run_python, tmp_path):
    """In fresh processes: what the environment asks for is what the text says."""

    def text(**environment):
        result = run_python("import rskernels; rskernels.explain()", **environment)
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.splitlines()) <= 25 or torch.cuda.is_available()
        return result.stdout

    if extension.cpu_supported() != "baseline":
        lowered = text(RSKERNELS_ISA="avx2", OMP_NUM_THREADS="1")
        assert "instruction set: avx2" in lowered and "CPU threads: 1 " in lowered
        assert "bfloat16 tiles: no" in lowered
    table = tmp_path / "table.json"
    table.write_text(json.dumps(tuning.record()))
    assert f"linear's products: {table};" in text(RSKERNELS_TUNING=str(table))
    rule = "linear's products: default rule"
    ruled = text(RSKERNELS_TUNING="off")
    assert f"{rule} (RSKERNELS_TUNING is 'off');" in ruled
    small = "linear's small calls, below 4,194,304 multiply-adds and not compiled:"
    assert f"{small} PyTorch directly for float32, bfloat16\n" in ruled
    assert f"{small} as all others\n" in text(RSKERNELS_BACKEND="cpp")
    default = tmp_path / "rskernels" / "tuning.json"
    assert f"{rule} ({default} does not exist);" in text(XDG_CACHE_HOME=str(tmp_path))
    named = tmp_path / "named.json"
    assert f"{rule} ({named} does not exist);" in text(RSKERNELS_TUNING=str(named))
    named.write_text("{")
    assert f"{rule} ({named} cannot be used);" in text(RSKERNELS_TUNING=str(named))
    unknown = text(RSKERNELS_BACKEND="fast")
    assert "backend: fast, unknown, expected one of auto" in unknown
    assert set(explained(unknown, "linear").values()) == {"error"}
    without = text(RSKERNELS_DISABLE_EXT="1")
    assert "extension: none, " in without and "bfloat16 tiles" not in without
    assert "  cpp: the extension rskernels._C is switched off by RSKERNELS_DISABLE_EXT" in without
    assert set(explained(without, "linear").values()) == {"reference"}
    for word in ("", "0", "false", "Off"):
        assert "extension: built against" in text(RSKERNELS_DISABLE_EXT=word)


def test_explain_of_an_unknown_backend_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "_requested", "fast")
    monkeypatch.setattr("sys.argv", ["rskernels", "explain"])
    assert command.main() == 2
    printed = capsys.readouterr()
    assert "backend: fast, unknown, expected one of auto" in printed.out
    assert printed.err.startswith("error: RSKERNELS_BACKEND: unknown backend 'fast'; expected one of auto")
    assert len(printed.err.splitlines()) == 1
    monkeypatch.setattr(dispatch, "_requested", "reference")
    assert command.main() == 0 and not capsys.readouterr().err


def test_extension_runs_on_torchs_threads(extension):
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert extension.parallel_threads() == threads


def test_instruction_set_override(extension, run_python):
    before = extension.cpu_capability()
    try:
        extension.set_cpu_capability("baseline")
        assert extension.cpu_capability() == "baseline" and "instruction set: baseline" in rskernels.explain()
    finally:
        extension.set_cpu_capability(before)
    code = "from rskernels import _C; print(_C.cpu_capability())"
    assert run_python(code, RSKERNELS_ISA="baseline").stdout.strip() == "baseline"
    with pytest.raises(ValueError, match="sse9"):
        extension.set_cpu_capability("sse9")


def test_make_sanitize_tests_the_sanitized_extension(extension, run_python):
    """Here and in fresh processes; elsewhere the extension is the ordinary one."""
    sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")
    assert ("sanitizer" in extension.build_info()) == sanitized
    code = "from rskernels import _C; print('sanitizer' in _C.build_info())"
    assert run_python(code).stdout.strip() == str(sanitized)


def test_without_the_extension_the_reference_serves(run_python):
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import rskernels
    import torch
    for _ in range(2):
        out = rskernels.linear(torch.ones(2, 3), torch.ones(4, 3), activation="relu")
print(len([w for w in caught if "rskernels" in str(w.message)]), out.sum().item())
rskernels.explain()
op = torch.ops.rskernels.linear_forward(torch.ones(2, 3), torch.ones(4, 3), None, "relu", False)[0]
assert torch.equal(op, out)
try:
    rskernels.set_backend("cpp")
    rskernels.linear(torch.ones(2, 3), torch.ones(4, 3))
except ValueError as error:
    print(error)
"""
    result = run_python(code, RSKERNELS_DISABLE_EXT="1")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "1 24.0"
    assert any(line.startswith("extension: ") and "RSKERNELS_DISABLE_EXT" in line for line in lines)
    assert any(line.split() == ["linear", "cpu", *["reference"] * 4] for line in lines)
    assert "backend 'cpp' cannot serve linear" in lines[-1] and "RSKERNELS_DISABLE_EXT" in lines[-1]


def test_environment_chooses_the_backend(run_python):
    code = "import rskernels; print(rskernels.get_backend())"
    assert run_python(code, RSKERNELS_BACKEND="reference").stdout.strip() == "reference"
    code = "import rskernels, torch; x = torch.ones(1, 4); rskernels.linear(x, x, None)"
    wrong = run_python(code, RSKERNELS_BACKEND="fast")
    assert wrong.returncode != 0 and "RSKERNELS_BACKEND: unknown backend 'fast'" in wrong.stderr


def test_what_triton_takes_is_asked_of_every_tensor() -> None:
    """Operators have optional first arguments, and lists of tensors."""
    half, mask = torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.bool)
    found = list(library._tensors_in((None, [half, half], 3, mask, "relu", [True, False])))
    assert len(found) == 3 and library.takes_triton(found)
    assert not library.takes_triton([half, torch.ones(1, dtype=torch.float64)])


def test_a_device_that_the_tiles_do_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(name: str, major: int, minor: int, shared: int) -> str:
        chip = SimpleNamespace(name=name, major=major, minor=minor, shared_memory_per_block_optin=shared)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: chip)
        dispatch.device_problem.cache_clear()
        return dispatch.device_problem(torch.device("cuda", 0))

    assert device("H100", 9, 0, 232_448) == device("A100", 8, 0, 166_912) == ""
    assert "T4 has 7.5" in device("T4", 7, 5, 65_536)
    assert "RTX 4090 has 101,376" in device("RTX 4090", 8, 9, 101_376)
    dispatch.device_problem.cache_clear()
