"""The GPU check: what it needs, and a tiny run of it on whatever device there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BARE = "tensorflow tensorflow_text aqt grpc grain safetensors pyarrow tyro tqdm matplotlib"


def test_it_needs_jax_flax_and_optax_alone() -> None:
    code = (
        f"import sys\nfor name in {BARE!r}.split(): sys.modules[name] = None  # importing it fails\n"
        "import classer.tools.gpu_check as check, jax\n"
        "check.random_weights(check.native('classer-5m', vocab_size=99), 3, 'int8')\n"
        "print('needs no more')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "needs no more\n", done.stderr[-2000:]


@pytest.mark.slow
def test_a_tiny_run_writes_its_report(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "tools" / "gpu_check.py"
    command = [sys.executable, str(script), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["precision"] for row in report["numerics"] if row["ok"]} == {"float32", "bfloat16", "int8"}
    assert all(row["int8_products"] == 24 for row in report["programs"])  # four in each of six layers
    assert all(row["tokens_per_s"] > 0 for row in report["training"])
    assert "## Programs" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").exists()
