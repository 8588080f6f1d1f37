"""The GPU check: its requirements, and a tiny run on the available device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from classer.tools.aot.accelerators import bf16_peak
from classer.tools.dev import gpu_check

SCRIPT = Path(__file__).parents[3] / "tools" / "dev" / "gpu_check.py"
BARE = "tensorflow tensorflow_text aqt grpc grain safetensors pyarrow tyro tqdm matplotlib"


def test_it_needs_jax_flax_and_optax_alone() -> None:
    code = (
        f"import sys\nfor name in {BARE!r}.split(): sys.modules[name] = None  # importing it fails\n"
        "import classer.tools.dev.gpu_check as check, jax\n"
        "check.random_weights(check.native('classer-5m', vocab_size=99), 3, 'int8')\n"
        "print('needs no more')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "needs no more\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_utilisation_is_of_the_devices_own_peak(device: str, tflops: float | None) -> None:
    assert bf16_peak(device) == (None if tflops is None else tflops * 1e12)


def test_what_does_not_fit_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore of it")

    monkeypatch.setattr(gpu_check, "compiled", full)
    rows = gpu_check.time_programs(gpu_check.TINY)
    assert [row["error"] for row in rows] == ["RESOURCE_EXHAUSTED: Out of memory"]
    products = [{"preset": "classer-5m", "shape": [2, 3, 4], "speedup": 1.0}]
    report = {"device": "x", "jax": "1", "numerics": [], "products": products, "programs": rows}
    assert gpu_check.draw(report, tmp_path) == "report.png"
    assert "| classer-5m | 2 | 16 | RESOURCE_EXHAUSTED: Out of memory |" in gpu_check.describe(report)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["", BARE])
def test_a_tiny_run_writes_its_report(tmp_path: Path, missing: str) -> None:
    code = (
        f"import runpy, sys\nfor name in {missing!r}.split(): sys.modules[name] = None  # importing it fails\n"
        f"sys.argv = [{str(SCRIPT)!r}, '--tiny', '--out', {str(tmp_path)!r}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["precision"] for row in report["numerics"] if row["ok"]} == {"float32", "bfloat16", "int8"}
    assert all(row["int8_products"] == 24 for row in report["programs"])  # four in each of six layers
    assert all(row["tokens_per_s"] > 0 for row in report["training"])
    said = (tmp_path / "report.md").read_text()
    assert "## Programs" in said
    assert (tmp_path / "report.png").exists() == (not missing)
    assert ("No pictures: matplotlib is not installed." in said) == bool(missing)
