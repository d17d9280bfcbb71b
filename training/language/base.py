"""The base of a language model: found, weighed before it is loaded, loaded, and left unchanged."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from torch.distributed.tensor import DTensor

from jobs.llm import BYTES_OF_A_PARAMETER, LlmRun
from training.runtime.device import choose_device
from training.runtime.team import ALONE, Team
from utils.errors import BaseModelGated, BaseModelUnavailable, GpuOutOfMemory, TrainingFailed
from utils.wording import spoken

_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*")


@dataclasses.dataclass(frozen=True, slots=True)
class BaseIdentity:
    """A base as a job wants it: where it is, and how it is loaded."""

    source: str
    quantization: str
    attention: str


@dataclasses.dataclass
class LanguageBase:
    """A frozen language model with its tokenizer.

    Attributes:
        identity: Its place, and how it is loaded.
        model: The model, in evaluation mode and without gradients.
        tokenizer: Its fast tokenizer.
        device: Its device.
        sha256: Hash over weight files, configuration, tokenizer and template.
        revision: Commit on the hub, or None for a local folder.
        warnings: Sentences for the report.
        state: The state when loaded, for `unchanged`.
    """

    identity: BaseIdentity
    model: Any
    tokenizer: Any
    device: torch.device
    sha256: str
    revision: str | None
    warnings: tuple[str, ...]
    state: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def unchanged(self) -> bool:
        """Whether the model has the weights, hooks, flags and settings it had when loaded."""
        return self.state == snapshot(self.model)


# pylint: disable=protected-access  # torch has no public names for versions and hooks
def snapshot(model: Any) -> dict[str, Any]:
    """Everything of a model that a run could leave changed.

    A tensor's version counts its changes in place, so that no byte has to be read.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": {
            name: (_own_part(t).data_ptr(), t._version, str(t.dtype), t.requires_grad)
            for name, t in tensors
        },
        "modules": {
            name: (
                type(module).__qualname__,
                module.training,
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                len(module._backward_hooks),
                bool(getattr(module, "gradient_checkpointing", False)),
            )
            for name, module in model.named_modules()
        },
        "config": model.config.to_json_string(use_diff=False),
        "generation": model.generation_config.to_json_string(use_diff=False),
    }


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor; all of it if the processes do not share it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def identity_of(run: LlmRun, *, cuda: bool, shards: bool = False) -> BaseIdentity:
    """How the base of a run is loaded.

    Args:
        run: The run.
        cuda: Whether there is a GPU.
        shards: Whether the processes share the weights out (FSDP).

    Raises:
        TrainingFailed: The run wants a quantised base, whose weights cannot be shared out.
    """
    quantization = run.parameters.quantization
    if shards and quantization in ("4bit", "8bit"):
        raise TrainingFailed(
            f"TRAINER_FSDP=true cannot share out a base model in {quantization}. Set quantization "
            "to none or auto, or set TRAINER_FSDP=false on the worker."
        )
    if shards:
        quantization = "none"
    elif quantization == "auto":
        wanted = "4bit" if run.use_4bit else "8bit" if run.use_8bit else "none"
        quantization = wanted if cuda else "none"
    attention = {"auto": "sdpa", "flash": "flash_attention_2"}.get(
        run.parameters.attention, run.parameters.attention
    )
    return BaseIdentity(run.base_source, quantization, attention)


def locate(run: LlmRun) -> tuple[Path, str | None]:
    """The folder of a base, fetched from the hub if needed, and its commit.

    Raises:
        BaseModelUnavailable: It is missing, incomplete, not in safetensors, or cannot be reached.
        BaseModelGated: The hub wants a token with access.
    """
    source = Path(run.base_source)
    revision = None
    if source.is_absolute():
        folder = source
        if not folder.is_dir():
            raise BaseModelUnavailable(
                f"The folder of the base model {run.base_model} does not exist. Correct "
                "LLM_BASE_MODELS."
            )
    else:
        folder = _from_hub(run.base_model, run.base_source)
        revision = folder.name
    if not (folder / "config.json").is_file():
        raise BaseModelUnavailable(f"The base model {run.base_model} has no config.json.")
    if not list(folder.glob("*.safetensors")):
        raise BaseModelUnavailable(
            f"The base model {run.base_model} has no weights in safetensors. Choose a model that "
            "has them; other formats can run code and are not loaded."
        )
    return folder, revision


def _from_hub(name: str, source: str) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=list(_FILES)))
    except GatedRepoError as error:
        raise BaseModelGated(
            f"The base model {name} is gated. Request access on huggingface.co/{name}, and set "
            "HF_TOKEN to a token of that account."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise BaseModelUnavailable(
            f"The base model {name} cannot be fetched ({type(error).__name__}). Check its name "
            "and the connection to huggingface.co."
        ) from error


def parameters_in(folder: Path) -> int:
    """Number of parameters, from the headers of the weight files; no weight is read.

    Raises:
        BaseModelUnavailable: A file is damaged.
    """
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                if length > file.stat().st_size:
                    raise ValueError("the header is longer than the file")
                header = json.loads(opened.read(length))
            needed = max((e["data_offsets"][1] for k, e in header.items() if k != "__metadata__"))
            if 8 + length + needed > file.stat().st_size:
                raise ValueError("the file is cut off")
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise BaseModelUnavailable(
                f"The base model's file {file.name} is damaged or cut off. Fetch it again."
            ) from error
        for name, entry in header.items():
            if name != "__metadata__":
                size = 1
                for side in entry["shape"]:
                    size *= side
                total += size
    return total


def predicted_bytes(folder: Path, run: LlmRun, quantization: str, *, cuda: bool) -> int:
    """Memory that a job needs, estimated from above: base, LoRA, optimizer and activations."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config = config.get("text_config", config)
        hidden = int(config.get("hidden_size", 0))
        layers = int(config.get("num_hidden_layers", 0))
        vocabulary = int(config.get("vocab_size", 0))
        each = (
            BYTES_OF_A_PARAMETER[quantization]
            if cuda
            else {"none": 4.0}.get(quantization, BYTES_OF_A_PARAMETER[quantization])
        )
        weights = parameters_in(folder) * each
        modules = (
            7
            if run.parameters.target_modules == "all-linear"
            else (run.parameters.target_modules.count(",") + 1)
        )
        adapter = 16 * 2.5 * hidden * run.parameters.rank * layers * modules
        tokens = run.parameters.batch_size * run.parameters.max_length
        activations = tokens * (hidden * 2 * (layers + 34) + 8 * vocabulary)
        return int(weights + adapter + activations)
    return 0


def refuse_too_large(
    folder: Path, run: LlmRun, quantization: str, device: torch.device, team: Team = ALONE
) -> int:
    """Compare the predicted memory with what is free; returns the prediction.

    Args:
        folder, run, quantization, device: The base, and how it is loaded.
        team: The processes that load it at the same time. On a CPU they share the memory.

    Raises:
        GpuOutOfMemory: Even the base does not fit.
    """
    cuda = device.type == "cuda"
    needed = predicted_bytes(folder, run, quantization, cuda=cuda)
    base = parameters_in(folder) * (BYTES_OF_A_PARAMETER[quantization] if cuda else 4.0)
    if cuda and team.shards:
        base /= team.size
    free = torch.cuda.mem_get_info(device)[0] if cuda else _free_memory() // team.size
    if free and base > free:
        raise GpuOutOfMemory(
            f"The base model {run.base_model} needs about {spoken(int(base))} with quantization "
            f"{quantization}, and {spoken(free)} are free. Set quantization to 4bit, or choose a "
            "smaller base model."
        )
    return needed


def _free_memory() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


# One variable for each part of a base.
def load(  # pylint: disable=too-many-locals
    run: LlmRun, *, allow_cpu: bool, team: Team = ALONE
) -> LanguageBase:
    """Load a base.

    Args:
        run: The run that needs it.
        allow_cpu: Whether a CPU may train.
        team: The processes that train together. Each has a GPU, and the whole base on it or, with
            FSDP, its share.

    Raises:
        GpuBroken: There is no GPU, and the CPU is not allowed.
        BaseModelUnavailable: The base cannot be loaded.
        GpuOutOfMemory: It does not fit.
    """
    device, _, warnings = choose_device("bf16", allow_cpu=allow_cpu)
    identity = identity_of(run, cuda=device.type == "cuda", shards=team.shards)
    if team.size > 1 and device.type == "cuda":
        device = torch.device("cuda", team.rank)
    if team.leads:  # the others find the files in the cache
        locate(run)
    team.meet()
    folder, revision = locate(run)
    refuse_too_large(folder, run, identity.quantization, device, team)
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": "cpu" if team.shards else device},
            attn_implementation=identity.attention,
            quantization_config=_quantization(identity.quantization, dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise BaseModelUnavailable(
            f"The base model {run.base_model} cannot be loaded ({type(error).__name__}: {said})."
        ) from error
    if not tokenizer.is_fast:
        raise BaseModelUnavailable(
            f"The base model {run.base_model} has no fast tokenizer (tokenizer.json)."
        )
    model.requires_grad_(False)
    model.eval()
    _never_pack(model)
    if team.shards:
        names = set(model._no_split_modules or ())
        blocks = [module for module in model.modules() if type(module).__name__ in names]
        team.shard(model, blocks, device.type)
    made = LanguageBase(
        identity, model, tokenizer, device, _hash(folder, tokenizer), revision, warnings
    )
    made.state = snapshot(model)
    return made


def _quantization(name: str, dtype: torch.dtype) -> Any:
    if name == "none":
        return None
    if name == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _never_pack(model: Any) -> None:
    """Keep 4-bit weights trainable on a CPU.

    bitsandbytes packs them in evaluations, and packed weights pass no gradient on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _hash(folder: Path, tokenizer: Any) -> str:
    digest = hashlib.sha256(str(tokenizer.chat_template).encode())
    names = sorted(
        [*folder.glob("*.safetensors"), folder / "config.json", *folder.glob("tokenizer*")]
    )
    for file in names:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
