"""Environment and confinement of the trainer process.

The trainer decodes images from untrusted sources. Therefore it gets no secret that it does not
need, and cannot read the files that hold secrets.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from utils.confined import Confinement
from utils.cpus import training_threads

ROOT = Path(__file__).resolve().parents[2]

_SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASS|KEY|CREDENTIAL|AUTH|DSN", re.IGNORECASE)
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_SHORT = 8  # characters; a shorter secret, such as "guest", is a part of many values

HIDDEN_AT_HOME = (
    *(".aws", ".azure", ".boto", ".config/gcloud", ".config/gh", ".config/rclone"),
    *(".docker", ".git-credentials", ".gnupg", ".kube", ".local/share/keyrings"),
    *(".netrc", ".pgpass", ".pypirc", ".runpod", ".s3cfg", ".ssh"),
)
"""Files and folders below the home folder in which common programs keep their keys."""

HIDDEN_ON_MACHINE = ("/run/secrets", "/var/run/secrets", "/etc/rp_environment")
"""Secrets of Docker, of Kubernetes (the service account) and of RunPod's start script."""

_HIDDEN_BY_NAME = (
    "AWS_CONFIG_FILE",
    "KUBECONFIG",
    "DOCKER_CONFIG",
    "CLOUDSDK_CONFIG",
    "BOTO_CONFIG",
)
_CACHES = (
    *("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCH_HOME", "CUDA_CACHE_PATH"),
    *("TRITON_CACHE_DIR", "TMPDIR"),
)
_LOOPBACK = "lo"
_HUB_PORTS = (53, 443)  # names over TCP, and the hub


def trainer_environment(
    environment: Mapping[str, str],
    *,
    own: Iterable[str],
    secrets: Iterable[str],
    hf_token: str | None,
    hf_home: Path | None,
    cuda_visible_devices: str | None,
    threads: str | None,
    deterministic: bool = False,
    processes: int = 1,
) -> dict[str, str]:
    """The whole environment of the trainer.

    Args:
        environment: The environment of this process.
        own: Names of settings. The trainer gets the settings over its pipe.
        secrets: Values that no variable may hold.
        hf_token, hf_home, cuda_visible_devices: Settings that libraries read from the environment.
        threads: `OMP_NUM_THREADS` of each process; None for one thread per usable core.
        deterministic: The GPU must give the same bits each time.
        processes: Processes that train a run together. They share the cores, and what they exchange
            stays on this machine.
    """
    names, values = set(own), [secret for secret in secrets if len(secret) >= _SHORT]
    made = {
        name: value
        for name, value in environment.items()
        if name.upper() not in names
        and not _SECRET_NAMES.search(name)
        and not any(secret in value for secret in values)
        and not (_has_password(value) and name.upper() not in _PROXIES)
    }
    if hf_token:
        made["HF_TOKEN"] = hf_token
    if hf_home:
        made["HF_HOME"] = str(hf_home)
    if cuda_visible_devices is not None:
        made["CUDA_VISIBLE_DEVICES"] = cuda_visible_devices
    made["OMP_NUM_THREADS"] = threads or str(max(1, training_threads() // processes))
    if processes > 1:
        made |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _LOOPBACK)
    # A waiting thread gives its core away. If it spins, it takes the core from the thread that it
    # waits for as soon as another program computes on this machine.
    made.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if deterministic:
        # With workspaces of another size the sums of cuBLAS may differ from run to run.
        made.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return made


def confinement(
    environment: Mapping[str, str],
    *,
    own: Iterable[str],
    files: Iterable[Path],
    writable: Iterable[Path],
    caches: Mapping[str, str],
    among_themselves: bool = False,
) -> Confinement:
    """Files, folders and ports that the trainer can and cannot reach.

    Args:
        environment: The environment of this process; some variables name files with secrets.
        own: Names of settings. Their values do not name such files.
        files: Settings files.
        writable: Folders that the trainer works in.
        caches: The trainer's environment; some variables name the folders of its caches.
        among_themselves: The trainer has several processes, which connect to each other.
    """
    home = Path(os.path.expanduser("~"))
    hidden = [*files, *map(Path, HIDDEN_ON_MACHINE), *(home / name for name in HIDDEN_AT_HOME)]
    hidden += _named_files(environment, set(own))
    # The next worker would run a changed program, or a file that Python or a shell reads at its
    # start, with all secrets.
    read_only = {ROOT, Path(sys.prefix), Path(sys.base_prefix), home} - {Path("/")}
    places = [*writable, Path(tempfile.gettempdir()), home / ".cache"]
    places += [Path(caches[name]) for name in _CACHES if os.path.isabs(caches.get(name, ""))]
    for place in places:  # the confined trainer cannot make them
        with contextlib.suppress(OSError):  # a read-only disk; the program that needs it reports it
            place.mkdir(parents=True, exist_ok=True)
    places += [home / name for name in (".nv", ".triton")]
    return Confinement(
        hidden=_paths(hidden),
        read_only=_paths(read_only),
        writable=_paths(places),
        ports=tuple(sorted({*_HUB_PORTS, *_ports(caches)})),
        among_themselves=among_themselves,
    )


def _named_files(environment: Mapping[str, str], own: set[str]) -> Iterator[Path]:
    """Files with a secret, by the variable's name, such as `AWS_WEB_IDENTITY_TOKEN_FILE`."""
    for name, value in environment.items():
        path = Path(value) if os.path.isabs(value) else None
        if path is None or name.upper() in own:
            continue
        if name.upper() in _HIDDEN_BY_NAME or (_SECRET_NAMES.search(name) and path.is_file()):
            yield path


def _ports(environment: Mapping[str, str]) -> Iterator[int]:
    """The ports of the hub's address and of the proxies."""
    for name, value in environment.items():
        if name.upper() in ("HF_ENDPOINT", *_PROXIES):
            with contextlib.suppress(ValueError):
                parts = urlsplit(value if "://" in value else f"http://{value}")
                yield parts.port or (443 if parts.scheme == "https" else 80)


def _has_password(value: str) -> bool:
    return bool(re.search(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@", value, re.IGNORECASE))


def _paths(paths: Iterable[Path]) -> tuple[str, ...]:
    return tuple(sorted({os.path.abspath(path) for path in paths}))
