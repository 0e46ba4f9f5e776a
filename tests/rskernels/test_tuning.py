"""The product table: its rule, its file, its record, and that it decides which library computes."""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import rskernels
from rskernels import __main__ as command
from rskernels import tune, tuning


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("RSKERNELS_TUNING", str(path))
    return path


def test_shape_classes_have_the_order_of_the_extension(extension):
    sizes = {
        "wide/small": (64, 64, 64),
        "wide/medium": (256, 128, 512),
        "wide/large": (4096, 768, 768),
        "few/small": (31, 64, 64),
        "few/medium": (1, 2048, 2048),
        "few/large": (31, 4096, 4096),
        "thin/small": (100, 31, 64),
        "thin/medium": (4096, 768, 8),
        "thin/large": (32768, 4096, 31),
    }
    assert tuple(sizes) == tuning.SHAPES
    for index, shape in enumerate(sizes.values()):
        assert extension.shape_class(*shape) == index
    assert set(tune.SAMPLES) == {name for name in tuning.SHAPES if not name.endswith("/small")}
    for name, shapes in tune.SAMPLES.items():
        assert {tuning.SHAPES[extension.shape_class(*shape)] for shape in shapes} == {name}


@pytest.mark.parametrize("shape", ((4, 8, 6), (300, 64, 96), (256, 128, 512)))
def test_the_table_decides_which_library_computes(extension, shape):
    rows, inputs, outputs = shape
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    libraries = {
        "aten": F.linear(x, weight, bias),
        "onednn": torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""),
    }
    for product, expected in libraries.items():
        tuning.restore({**tuning.record(), "products": dict.fromkeys(tuning.KEYS, product)})
        assert torch.equal(rskernels.linear(x, weight, bias), expected)


def test_record_restores_and_is_plain_data():
    saved = json.loads(json.dumps(tuning.record()))
    tuning.restore({"version": 1, "products": dict.fromkeys(tuning.KEYS, "aten")})
    assert set(tuning.record()["products"].values()) == {"aten"}
    tuning.restore(saved)
    assert tuning.record() == saved


def test_a_named_file_that_is_missing_is_said(file):
    with pytest.warns(RuntimeWarning, match=f"RSKERNELS_TUNING names {file}, which does not exist"):
        tuning.load()
    assert tuning.record()["source"] == "default rule"
    assert f"default rule ({file} does not exist);" in tuning.describe()[0]


def test_explain_tells_a_restored_table_from_a_read_one():
    tuning.restore(tuning.record())
    assert "(restored from a record);" in tuning.describe()[0]


@pytest.mark.parametrize(
    ("saved", "match"),
    [
        ({}, "not a tuning table of version 1"),
        ([1], "not a tuning table of version 1"),
        ({"version": 2, "products": {}}, "not a tuning table of version 1"),
        ({"version": 1, "products": {"float32": "aten"}}, "54 expected keys"),
        ({"version": 1, "products": dict.fromkeys(tuning.KEYS, "mkl")}, "is 'mkl', expected one of"),
    ],
)
def test_restore_refuses_what_is_no_table(saved, match):
    before = tuning.record()
    with pytest.raises(ValueError, match=match):
        tuning.restore(saved)
    assert tuning.record() == before


def test_rule_without_a_measurement(monkeypatch, tmp_path, recwarn):
    monkeypatch.delenv("RSKERNELS_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.load()
    assert not recwarn
    products = tuning.record()["products"]
    assert tuning.record()["source"] == "default rule" and set(products) == set(tuning.KEYS)
    assert products["float32/forward/wide/large"] == "onednn"
    assert products["float32/forward/wide/small"] == "aten"
    assert products["bfloat16/grad_weight/wide/large"] == "aten"


def test_measuring_stores_a_table_that_the_next_import_reads(
    extension, file, monkeypatch, run_python, capsys
):
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    monkeypatch.setattr(tune, "SAMPLES", {name: ((4, 8, 6),) for name in tune.SAMPLES})
    monkeypatch.setattr("sys.argv", ["rskernels", "tune"])
    assert command.main() == 0
    assert capsys.readouterr().out.count("as fast") == len(tuning.KEYS) * 2 // 3
    stored = json.loads(file.read_text())
    assert stored["measured_with"]["threads"] == torch.get_num_threads()
    expected = {"version": 1, "source": file.name, "products": stored["products"], "triton": {}}
    assert tuning.record() == expected
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    code = "from rskernels import tuning; import json; print(json.dumps(tuning.record()))"
    assert json.loads(run_python(code, RSKERNELS_TUNING=str(file)).stdout) == tuning.record()
    ignored = json.loads(run_python(code, RSKERNELS_TUNING="off").stdout)
    assert ignored["source"] == "default rule"


def test_a_faster_product_replaces_the_rule_by_a_margin_only(extension, file, monkeypatch):
    gain = {"bfloat16/grad_input/wide/large": 0.5, "bfloat16/grad_input/few/large": 0.99}
    monkeypatch.setattr(tune, "_measure", lambda key: {"aten": 1.0, "onednn": gain.get(key, 1.0)})
    table = tune.tune()
    changed = {key for key, product in tuning.default_table().items() if table[key] != product}
    assert changed == {"bfloat16/grad_input/wide/large"}


def test_a_table_stored_in_a_named_file_is_in_use(extension, file, monkeypatch, tmp_path):
    """Even where RSKERNELS_TUNING names another file, or is off."""
    gain = {"bfloat16/grad_input/wide/large": 0.5}
    monkeypatch.setattr(tune, "_measure", lambda key: {"aten": 1.0, "onednn": gain.get(key, 1.0)})
    for variable in (str(file), "off"):
        monkeypatch.setenv("RSKERNELS_TUNING", variable)
        with pytest.warns(RuntimeWarning) if variable != "off" else nullcontext():
            tuning.load()
        assert tuning.record()["products"] == tuning.default_table()
        other = tmp_path / "elsewhere" / f"{len(variable)}.json"
        table = tune.tune(other)
        stored = json.loads(other.read_text())
        assert stored["products"] == table != tuning.default_table()
        assert tuning.record() == {"version": 1, "source": other.name, "products": table, "triton": {}}
        assert not file.exists()


def test_an_interrupted_measurement_changes_nothing(extension, file, monkeypatch):
    before = tuning.record()

    def interrupt(key):
        tuning.restore({"version": 1, "products": dict.fromkeys(tuning.KEYS, "aten")})
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "_measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune.tune()
    assert tuning.record() == before and not file.exists()


def test_tune_with_tables_switched_off(extension, monkeypatch, capsys):
    monkeypatch.setenv("RSKERNELS_TUNING", "off")
    monkeypatch.setattr("sys.argv", ["rskernels", "tune"])
    assert command.main() == 2
    assert "RSKERNELS_TUNING is 'off'" in capsys.readouterr().err


def test_the_record_does_not_tell_where_the_table_lies(file):
    file.parent.mkdir()
    file.write_text(json.dumps({"version": 1, "products": dict.fromkeys(tuning.KEYS, "aten")}))
    tuning.load()
    assert str(file) in tuning.describe()[0]
    assert tuning.record()["source"] == file.name
    assert str(file.parent) not in json.dumps(tuning.record())


def test_a_broken_file_is_ignored_with_a_warning(file):
    file.parent.mkdir()
    file.write_text("{")
    with pytest.warns(RuntimeWarning, match="ignoring the tuning table"):
        tuning.load()
    assert tuning.record()["source"] == "default rule"


def test_default_place(monkeypatch, tmp_path):
    monkeypatch.delenv("RSKERNELS_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.path() == tmp_path / "rskernels" / "tuning.json"


def test_a_home_that_cannot_be_read_is_no_reason_to_fail(monkeypatch) -> None:
    before = tuning.record()

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.exists", refuse)
    monkeypatch.delenv("RSKERNELS_TUNING", raising=False)
    try:
        tuning.load()
        assert tuning.record()["source"] == "default rule"
        assert "Permission denied" in tuning.describe()[0]
    finally:
        tuning.restore(before)
