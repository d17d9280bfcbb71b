"""The start of a worker: settings that no job could be done with are refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

import config
from consumer.life.stop_signal import Shutdown
from consumer.worker import run_worker
from utils.errors import ConfigurationError


def test_a_local_base_model_of_another_family_is_refused_before_the_machine_is_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    settings = config.load(
        _env_file=None,
        backend_api_url="https://backend.example",
        internal_api_token="t" * 32,
        aws_storage_bucket_name="media",
        base_model=str(tmp_path),
        http_port=0,
    )
    monkeypatch.setattr("consumer.worker.require_fit", lambda *_, **__: pytest.fail("was tested"))
    with pytest.raises(ConfigurationError, match="is Stable Diffusion XL.*Set BASE_MODEL"):
        run_worker(settings, Shutdown(1.0))
