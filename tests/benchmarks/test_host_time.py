"""The host's time of a call of the CUDA kernels, measured without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import host_time
from rl_kernels.backends.cuda.extension import EXTENSION


@pytest.mark.skipif(EXTENSION.module is None, reason=f"the CUDA kernels: {EXTENSION.missing}")
def test_a_record(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    found = CliRunner().invoke(host_time.main, ["--rounds", "2", "--output", str(output)])
    assert found.exit_code == 0, found.output
    record = json.loads(output.read_text())
    assert [(cell["layer"], cell["way"]) for cell in record["cells"]] == [
        (layer, way) for layer in ("linear", "conv") for way in host_time.WAYS
    ]
    assert all(0 < cell[who]["least"] <= cell[who]["median"] for cell in record["cells"] for who in ("cuda", "torch"))
    assert {"created", "machine", "versions", "git", "load"} < record.keys()
    assert "linear, forward + backward: cuda " in found.output
