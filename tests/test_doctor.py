from typing import Any

import pytest
import torch
from click.testing import CliRunner

from rl_kernels.backends import registered, selection, streamed
from rl_kernels.commands import doctor
from rl_kernels.commands.doctor import doctor_command


def test_a_sound_installation_passes() -> None:
    result = CliRunner().invoke(doctor_command, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert torch.__version__.split("+")[0] in result.output
    for backend in registered():
        assert backend.name in result.output
    assert "mixed_conv_wgrad" in result.output and "passed" in result.output


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_broken_backend_fails_and_is_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = streamed._GradientPanels.finish

    def wrong(self: Any, g: torch.Tensor, *index: slice) -> None:
        if fault == "raises":
            raise RuntimeError("planted")
        right(self, g * torch.nan, *index)

    monkeypatch.setattr(streamed._GradientPanels, "finish", wrong)
    result = CliRunner().invoke(doctor_command, env={"COLUMNS": "160"})
    assert result.exit_code == 1
    assert ("planted" if fault == "raises" else "no finite gradient for") in result.output
    assert doctor.training_step("reference", "cpu").verdict == "passed"


def test_a_forced_backend_that_is_unknown_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_default", "nonsense")
    result = CliRunner().invoke(doctor_command)
    assert result.exit_code == 1 and "got 'nonsense'" in result.output
