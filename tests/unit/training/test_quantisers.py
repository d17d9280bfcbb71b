"""bitsandbytes stays out of jobs that quantise nothing, and is found by those that do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from peft.tuners.lora import model

from training.runtime import quantisers

ROOT = Path(__file__).parents[3]
STYLE = """
import importlib.util, sys
import training.style.work
from jobs.kinds import TrainerOptions
from jobs.style import HyperParameters
from training.style.families.sd15 import BaseModel

base = BaseModel.load(TrainerOptions(sys.argv[1], allow_cpu=True))
base.attach(HyperParameters(rank=2))
base.detach()
print("bitsandbytes" in sys.modules, importlib.util.find_spec("bitsandbytes") is not None)
"""


def test_a_style_job_does_not_import_bitsandbytes_and_prints_no_warning(stand_in: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STYLE, str(stand_in)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]
    assert "gemm_4bit" not in done.stderr


def test_peft_looks_for_quantised_layers_as_soon_as_the_library_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantisers.look_for_quantised_layers_only_if_loaded()
    monkeypatch.delitem(sys.modules, quantisers.LIBRARY, raising=False)
    assert not model.is_bnb_available() and not model.is_bnb_4bit_available()
    monkeypatch.setitem(sys.modules, quantisers.LIBRARY, model)
    assert model.is_bnb_available() and model.is_bnb_4bit_available()


def test_the_import_is_refused_to_the_helpers_of_peft_only_and_once_installed() -> None:
    quantisers.keep_out()
    quantisers.keep_out()
    ours = [each for each in sys.meta_path if type(each).__module__ == quantisers.__name__]
    assert len(ours) == 1
    assert ours[0].find_spec(quantisers.LIBRARY, None) is None
    assert ours[0].find_spec("json", None) is None
