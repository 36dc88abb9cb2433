"""The doctor: what is missing or not what its name promises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_hdpo.health import doctor


def lines() -> dict[str, bool]:
    return dict(doctor.findings())


def test_this_machine_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        doctor.main()
    said = capsys.readouterr().out
    assert exit.value.code == 0, said
    for name in doctor.REQUIRED:
        assert f"ok   {name} " in said
    assert "BAD" not in said


def test_the_set_at_hand_is_named() -> None:
    versions = {"torch": "2.14.1", "megatron-core": "0.19.2", "transformers": "5.23.0", "triton": "3.8.0"}
    assert list(doctor._set_at_hand(versions, "3.12")) == [("versions: the set cpu-py312 (docs/install.md)", True)]
    ((none, state),) = doctor._set_at_hand(versions, "3.14")
    assert none.startswith("versions: there is no set for Python 3.14 (3.11, 3.12, 3.13 have one") and state is None
    del versions["triton"]
    (near, state), (misfit, fatal) = doctor._set_at_hand(versions, "3.12")
    assert "nearest to the set cpu-py312, but for triton is missing" in near and state is None
    assert misfit == "megatron-core 0.19.2 imports triton, which is missing: pip install triton" and fatal is False


def test_a_missing_package_is_bad(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("pebble", "mlflow") else version(name))
    with pytest.raises(SystemExit) as exit:
        doctor.main()
    said = capsys.readouterr().out
    assert exit.value.code == 1
    assert "BAD  pebble is missing: pip install pebble\n" in said
    assert "-    mlflow not installed (optional, extra tracking)\n" in said
    assert said.count("BAD") == 1


def pretend_package(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, text: str = "") -> Path:
    """Put a package of this name, with this code, where imports find it first."""
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    return package


def test_transformer_engine_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_package(monkeypatch, tmp_path, "transformer_engine", "raise RuntimeError('no libtransformer_engine.so')")
    said, fine = doctor._transformer_engine()
    assert not fine
    assert "does not load (RuntimeError: no libtransformer_engine.so)" in said and "uninstall it" in said


def test_the_other_apex(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_package(monkeypatch, tmp_path, "apex")
    said, fine = doctor._apex()
    assert not fine and "not NVIDIA's Apex" in said and "pip uninstall apex" in said


def test_apex_without_its_extensions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (pretend_package(monkeypatch, tmp_path, "apex") / "multi_tensor_apply").mkdir()
    said, fine = doctor._apex()
    assert not fine and "APEX_CUDA_EXT=1" in said


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["amp_C"], "without fused_weight_gradient_mlp_cuda"),
        (["amp_C", "fused_weight_gradient_mlp_cuda"], "weight gradients that Transformer Engine's layers add"),
    ],
)
def test_apex_with_kernels(modules: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Found without importing it: importing these would fail."""
    (pretend_package(monkeypatch, tmp_path, "apex", "raise RuntimeError('imported')") / "multi_tensor_apply").mkdir()
    for module in modules:
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('imported')")
    text, fine = doctor._apex()
    assert fine and said in text


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert list(doctor._gpu()) == [("no GPU: training runs on the CPU (gloo, plain torch layers)", None)]


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "Large GPU", 80 * 2**30

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: Properties())
    assert [said for said, _ in doctor._gpu()] == ["GPU 0: Large GPU, 80 GiB", "GPU 1: Large GPU, 80 GiB"]
