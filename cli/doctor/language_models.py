"""Checks of the base models of language models: the allow-list, local folders, and the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, parse_local_safetensors_file_metadata
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, SafetensorsParsingError

from cli.doctor.findings import Finding, fail, ok, warn
from cli.doctor.machine import GIB, memory_limit
from jobs.llm import BYTES_OF_A_PARAMETER, LlmOptions
from utils.gpu_monitor import GpuMonitor
from utils.settings.groups import TrainerSettings

KIND = "llm"
CHECK = "language models"
_HUB_SECONDS = 15.0
_PATTERN = frozenset("*?[")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def examine(
    options: LlmOptions,
    trainer: TrainerSettings,
    environment: Mapping[str, str],
    kinds: Sequence[str],
) -> Iterator[Finding]:
    """Judge the allow-list, its local folders, its models of the hub, and the default.

    Args:
        options: The allow-list, the default, and the quantization.
        trainer: The token of the hub, and whether a CPU may train.
        environment: The trainer process's environment.
        kinds: The kinds that the worker takes.
    """
    if KIND not in kinds:
        return
    if not options.entries():
        yield fail(CHECK, "LLM_BASE_MODELS allows no model.", "List names, or name=folder.")
    default = options.default_base_model
    if default and options.source_of(default) is None:
        yield fail(
            CHECK,
            f"LLM_DEFAULT_BASE_MODEL is {default}, which LLM_BASE_MODELS does not allow.",
            "Add the model to LLM_BASE_MODELS, or change the default.",
        )
    memory = _memory(allow_cpu=trainer.allow_cpu)
    for name, source in _named(options).items():
        if Path(source).is_absolute():
            yield _local(name, Path(source), options, memory)
        else:
            yield _of_the_hub(name, options, trainer, environment, memory)


def _named(options: LlmOptions) -> dict[str, str]:
    """Names with their sources: entries without a pattern, and the default."""
    named = {name: folder or name for name, _, folder in options.entries() if not _is_pattern(name)}
    default = options.default_base_model
    source = options.source_of(default) if default else None
    return named | ({default: source} if source else {})


def _is_pattern(name: str) -> bool:
    return bool(_PATTERN & set(name))


def _local(name: str, folder: Path, options: LlmOptions, memory: int) -> Finding:
    if not folder.is_dir():
        return fail(
            CHECK,
            f"{name}: the folder {folder} does not exist.",
            "Correct LLM_BASE_MODELS, or copy the model to the folder.",
        )
    again = "Download the model again, with its weights in safetensors."
    missing = [each for each in ("config.json", "tokenizer.json") if not (folder / each).is_file()]
    if missing:
        return fail(CHECK, f"{name}: {folder} has no {' and no '.join(missing)}.", again)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return fail(CHECK, f"{name}: {folder} has no weights in safetensors.", again)
    parameters = 0
    for file in files:
        try:
            metadata = parse_local_safetensors_file_metadata(file)
            end = max((int(each.data_offsets[1]) for each in metadata.tensors.values()), default=0)
            with file.open("rb") as opened:
                header = int.from_bytes(opened.read(8), "little")
        except (OSError, SafetensorsParsingError, AttributeError, TypeError, ValueError):
            return fail(CHECK, f"{name}: {file} is not a valid safetensors file.", again)
        if file.stat().st_size < 8 + header + end:
            return fail(CHECK, f"{name}: {file} is truncated.", again)
        parameters += sum(metadata.parameter_count.values())
    return _weighed(f"{name} is complete in {folder}", name, parameters, options, memory)


def _of_the_hub(
    name: str,
    options: LlmOptions,
    trainer: TrainerSettings,
    environment: Mapping[str, str],
    memory: int,
) -> Finding:
    if any(environment.get(each, "").upper() in ("1", "ON", "YES", "TRUE") for each in _OFFLINE):
        return warn(
            CHECK,
            f"{name} was not looked up, since HF_HUB_OFFLINE forbids it.",
            f"Map it to a folder in LLM_BASE_MODELS: {name}=/FOLDER.",
        )
    endpoint = environment.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = trainer.hf_token.get_secret_value() if trainer.hf_token else False
    try:
        api = HfApi(endpoint, token)
        info = api.model_info(name, timeout=_HUB_SECONDS)
        if info.gated:
            api.auth_check(name)
    except GatedRepoError:
        return _gated(name, has_token=bool(token))
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "Correct LLM_BASE_MODELS. A private model needs an HF_TOKEN with access to it."
        if status not in (401, 403, 404):
            remedy = "The hub, or a proxy in front of it, has a problem: try again later."
        return fail(CHECK, f"{name}: {endpoint} answers {status}.", remedy)
    except Exception as error:  # pylint: disable=broad-exception-caught  # of httpx, JSON, sockets
        return fail(
            CHECK,
            f"{name}: {endpoint} cannot be reached ({error}).",
            f"Check the network, or map the model to a folder: {name}=/FOLDER.",
        )
    return _offered(name, info, options, memory)


def _gated(name: str, *, has_token: bool) -> Finding:
    why = "HF_TOKEN is of an account without access" if has_token else "HF_TOKEN is not set"
    return fail(
        CHECK,
        f"{name} is gated, and {why}.",
        f"Request access on huggingface.co/{name}, and set HF_TOKEN to a token of that account.",
    )


def _offered(name: str, info: ModelInfo, options: LlmOptions, memory: int) -> Finding:
    files = {file.rfilename for file in info.siblings or ()}
    if not any(file.endswith(".safetensors") for file in files):
        return fail(
            CHECK,
            f"{name}: the hub has no weights in safetensors.",
            "Choose a model that has them. Other formats can run code and are not loaded.",
        )
    parameters = info.safetensors.total if info.safetensors else 0
    return _weighed(f"The hub has {name}", name, parameters, options, memory)


def _weighed(detail: str, name: str, parameters: int, options: LlmOptions, memory: int) -> Finding:
    """Compare a model's predicted memory with what there is."""
    quantization = "4bit" if options.use_4bit else "8bit" if options.use_8bit else "none"
    needed = int(parameters * BYTES_OF_A_PARAMETER[quantization])
    if not parameters:
        return warn(CHECK, f"{detail}; its size is not known.", "Read the model's page.")
    detail = (
        f"{detail}: {parameters / 1e9:.2f} billion parameters need about {needed / GIB:.1f} GiB "
        f"with quantization {quantization}"
    )
    if memory and needed > memory:
        return fail(
            CHECK,
            f"{detail}, and there are {memory / GIB:.1f} GiB.",
            f"Take {name} off LLM_BASE_MODELS, set LLM_USE_4BIT=true, or take a larger GPU.",
        )
    return ok(CHECK, f"{detail}.")


def _memory(*, allow_cpu: bool) -> int:
    """Bytes of the largest GPU; those of RAM without one if a CPU may train; else 0."""
    monitor = GpuMonitor()
    try:
        largest = max((each.memory_total_bytes for each in monitor.read()), default=0)
    finally:
        monitor.stop()
    return largest or (memory_limit() if allow_cpu else 0)
