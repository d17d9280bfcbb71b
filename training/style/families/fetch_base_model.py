"""`python -m training.style.families.fetch_base_model MODEL REVISION FOLDER`.

Downloads a base model into a folder.

For images that carry it: what the worker needs of the model, and nothing else. `BASE_MODEL` then
names the folder.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from jobs.kinds import TrainerOptions
from training.style.families.base_files import locate


def fetch(model: str, revision: str | None, folder: Path) -> None:
    """Copy a model's files, fetched from the hub where they must be, into `folder`.

    Raises:
        BaseModelUnavailable: There is no such model.
    """
    source, _ = locate(TrainerOptions(base_model=model, base_model_revision=revision))
    shutil.copytree(source, folder)  # the hub's cache holds links, which are followed


if __name__ == "__main__":
    fetch(sys.argv[1], sys.argv[2] or None, Path(sys.argv[3]))
