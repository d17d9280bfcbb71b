"""Settings: all problems are reported at once, no text shows a secret, `.env.example` is true."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import os
import re
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

import config
from config import load, load_local
from jobs.fields import Order
from jobs.kinds import REGISTRY
from jobs.llm import LlmParameters
from jobs.style import HyperParameters
from services.s3.s3_service import S3Service
from tests.unit.environment import DOCUMENTED, REQUIRED, TOKEN, problems, settings
from utils.errors import ConfigurationError
from utils.settings.values import Group, not_pinned
from utils.urls import origin_of

EXAMPLE = Path(__file__).parents[2] / ".env.example"
pytestmark = pytest.mark.usefixtures("own_settings")


def documented() -> dict[str, tuple[str, bool, str]]:
    """`.env.example`: name -> (value, whether it is commented out, the line above it)."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    found = {}
    for above, line in zip(lines, lines[1:]):
        if match := re.fullmatch(r"(#?)([A-Z][A-Z0-9_]*)=(.*)", line):
            assert match[2] not in found, f"{match[2]} is documented twice"
            found[match[2]] = (match[3], bool(match[1]), above)
    return found


# ---- .env.example --------------------------------------------------------------------------------


def test_every_setting_is_documented_and_nothing_else_is() -> None:
    assert set(documented()) == DOCUMENTED


def test_every_setting_has_a_separate_sentence_above_it() -> None:
    bare = [name for name, (_, _, text) in documented().items() if not text.startswith("# ")]
    assert not bare


def test_required_settings_are_ready_to_fill_in_and_all_others_are_commented_out() -> None:
    open_ones = {name for name, (_, commented, _) in documented().items() if not commented}
    assert open_ones == set(REQUIRED)


def test_every_documented_default_is_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {name: value for name, (value, commented, _) in documented().items() if commented}
    default = settings(monkeypatch)
    assert settings(monkeypatch, **shown) == default
    # An empty value is ignored, so it would agree with any default.
    empty = {name.lower() for name, value in shown.items() if not value}
    derived = {"model_bucket_name", "state_bucket_name", "image_buckets"}
    groups = [group for _, group in default if isinstance(group, Group)]
    values = {name: value for group in groups for name, value in group}
    values["llm_default_base_model"] = default.options["llm"].default_base_model or None
    assert not [name for name in empty - derived if values[name] not in (None, ())]


def test_the_example_starts_once_its_placeholders_are_filled_in_and_not_before(
    tmp_path: Path,
) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        load()
    told = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert told == ["BACKEND_API_URL", "INTERNAL_API_TOKEN"]
    assert "placeholder" in str(caught.value)
    for name in told:
        text = re.sub(rf"(?m)^{name}=.*$", f"{name}={REQUIRED[name]}", text)
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    assert load().storage.aws_storage_bucket_name == "stylelicense-media"
    assert config.unknown_names() is None


# ---- problems ------------------------------------------------------------------------------------


def test_all_missing_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load()
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == {
        "AWS_STORAGE_BUCKET_NAME: not set. Set it to the bucket of the images and models",
        "BACKEND_API_URL: not set. Set it to the base URL of the backend",
        "INTERNAL_API_TOKEN: not set. Set it to the bearer token that the backend expects",
    }


def test_problems_of_every_kind_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    text = problems(
        monkeypatch,
        RABBITMQ_PORT="amqp",
        MODEL_BUCKET_NAME="s3://models",
        BACKEND_API_URL="http://backend.example",
        INTERNAL_API_TOKEN="short",
        EPOCHS="0",
        RESOLUTION="100",
        LORA_DROPOUT="nan",
        LR_SCHEDULE="polynomial",
        RETRY_DELAYS_SECONDS="10,soon",
        MIXED_PRECISION="fp8",
        WEBHOOK_SIGNING_SECRET="whsec_short",
        AWS_ENDPOINT_URL_S3="localhost:9000",
        AWS_S3_REGION_NAME="Seoul!",
        AWS_ACCESS_KEY_ID="an-id",
        RABBITMQ_HOST="broker,other:5672",
    )
    expected = {
        "RABBITMQ_PORT: Input should be a valid integer",
        "MODEL_BUCKET_NAME: is not a bucket name",
        "BACKEND_API_URL: http://backend.example is plain http",
        "INTERNAL_API_TOKEN: must have 32 characters or more",
        "EPOCHS: epochs is 0; it must",
        "RESOLUTION: resolution is 100; it must",
        "LORA_DROPOUT: dropout is nan; it must",
        "LR_SCHEDULE: lr_schedule is 'polynomial'; choose one of",
        "RETRY_DELAYS_SECONDS: item 2: Input should be a valid number",
        "MIXED_PRECISION: Input should be 'fp16', 'bf16' or 'no'",
        "WEBHOOK_SIGNING_SECRET: must be whsec_ and base64 of at least 24 bytes",
        "AWS_ENDPOINT_URL_S3: must be an address like https://",
        "AWS_S3_REGION_NAME: is not the name of a region",
        "AWS_SECRET_ACCESS_KEY: belongs to AWS_ACCESS_KEY_ID",
        "RABBITMQ_HOST: item 2: is not a host name. Set the port in RABBITMQ_PORT",
    }
    lines = text.splitlines()[1:]
    assert {start for start in expected if any(ln.strip().startswith(start) for ln in lines)} == (
        expected
    )
    assert len(lines) == len(expected)


def test_a_wrong_bucket_is_reported_once_and_not_for_settings_that_default_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = problems(monkeypatch, AWS_STORAGE_BUCKET_NAME="No Bucket")
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == [
        "AWS_STORAGE_BUCKET_NAME"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INTERNAL_API_TOKEN", "hunter2-hunter2"),
        ("WEBHOOK_SIGNING_SECRET", "whsec_hunter2,hunter2-hunter2"),
        ("BACKEND_API_URL", "https://trainer:hunter2@backend.example"),
        ("BACKEND_API_URL", "https://trainer:hunter2"),
        ("WEBHOOK_ALLOWED_ORIGINS", "https://trainer:hunter2@backend.example"),
        ("AWS_ENDPOINT_URL_S3", "https://trainer:hunter2@minio"),
        ("RABBITMQ_HOST", "amqp://trainer:hunter2@broker"),
    ],
)
def test_no_problem_shows_a_secret(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    text = problems(monkeypatch, **{name: value}, RABBITMQ_PASS="hunter2", RABBITMQ_PORT="0")
    assert name in text and "RABBITMQ_PORT" in text
    assert "hunter2" not in text


def test_no_secret_shows_in_the_settings_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "whsec_" + base64.b64encode(b"k" * 24).decode()
    secrets = {
        "RABBITMQ_PASS": "hunter2-of-the-rabbit",
        "AWS_SECRET_ACCESS_KEY": "hunter2-of-the-bucket",
        "HF_TOKEN": "hf_hunter2",
        "WEBHOOK_SIGNING_SECRET": key,
    }
    loaded = settings(monkeypatch, AWS_ACCESS_KEY_ID="an-id", **secrets)
    for value in (*secrets.values(), TOKEN):
        assert value not in repr(loaded) + str(loaded) + repr(loaded.model_dump())
        assert value in loaded.secrets()


def test_a_dotenv_file_that_is_not_text_is_reported_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"EPOCHS=\xff\xfe")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        load()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL_S3", "http://minio:9000"),
        ("AWS_ENDPOINT_URL_S3", "https://[::1]:9000/prefix"),
        ("RABBITMQ_HOST", "::1"),
        ("RABBITMQ_HOST", "my_broker.internal."),
        ("RABBITMQ_HOST", "10.0.0.5"),
    ],
)
def test_an_address_of_each_usual_form_is_accepted(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    assert value in repr(settings(monkeypatch, **{name: value}))


@pytest.mark.parametrize(
    "name",
    ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "STATE_AWS_ENDPOINT_URL_S3"]
    + ["OTEL_EXPORTER_OTLP_ENDPOINT"],
)
@pytest.mark.parametrize("end", ["?x=1", "#top", "/a?x", "/../b"])
def test_an_address_of_which_a_part_would_be_dropped_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, end: str
) -> None:
    told = problems(monkeypatch, **{name: f"https://store.example.org{end}"})
    assert f"{name}: must " in told


@pytest.mark.parametrize(
    "name",
    ["INTERNAL_API_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"]
    + ["RABBITMQ_PASS", "RABBITMQ_USER", "HF_TOKEN", "SENTRY_DSN", "STATE_AWS_SECRET_ACCESS_KEY"],
)
def test_a_secret_that_ends_with_the_line_break_of_its_file_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    told = problems(monkeypatch, **{name: "hunter2" * 6 + "\n"})
    assert f"{name}: must not contain a line break" in told
    assert "hunter2" not in told


@pytest.mark.parametrize("token", ["a token of several words, long enough", "é" * 40])
def test_a_token_that_no_header_carries_is_refused(
    monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    told = problems(monkeypatch, INTERNAL_API_TOKEN=token)
    assert "INTERNAL_API_TOKEN: must be ASCII without spaces" in told


def test_the_settings_refuse_the_addresses_that_the_s3_client_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for address in ("localhost:9000", "http://mini_o:9000", "minio", "http://"):
        assert "AWS_ENDPOINT_URL_S3: " in problems(monkeypatch, AWS_ENDPOINT_URL_S3=address)
        with pytest.raises(ConfigurationError, match="No S3 client can be made of the settings"):
            S3Service(region="eu-central-1", endpoint_url=address)


# ---- sources of the values -----------------------------------------------------------------------


def test_the_environment_wins_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("EPOCHS=7\nLORA_RANK=8\n", encoding="utf-8")
    loaded = settings(monkeypatch, EPOCHS="9")
    assert (loaded.parameters["style"].epochs, loaded.parameters["style"].rank) == (9, 8)


def test_empty_values_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = settings(
        monkeypatch, EPOCHS="", WORK_DIR="", RABBITMQ_HOST="", MODEL_BUCKET_NAME="", HF_TOKEN=""
    )
    assert empty == settings(monkeypatch)
    assert "INTERNAL_API_TOKEN: not set" in problems(monkeypatch, INTERNAL_API_TOKEN="")


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = settings(
        monkeypatch,
        RABBITMQ_HOST="one, two,",
        RETRY_DELAYS_SECONDS="0.5, 60",
        IMAGE_BUCKETS="first,second",
        WEBHOOK_ALLOWED_ORIGINS="https://A.example.com:443/path,http://localhost:8000",
    )
    assert loaded.broker.rabbitmq_host == ("one", "two")
    assert loaded.limits.retry_delays_seconds == (0.5, 60.0)
    assert loaded.storage.image_buckets == ("first", "second")
    assert loaded.webhooks.webhook_allowed_origins == (
        "https://a.example.com/path",
        "http://localhost:8000",
    )


@pytest.mark.parametrize("name", ["RABBITMQ_HOST", "RETRY_DELAYS_SECONDS", "IMAGE_BUCKETS"])
def test_an_empty_list_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert f"{name}: " in problems(monkeypatch, **{name: " , "})


def test_curves_without_their_library_are_refused_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert settings(monkeypatch, TENSORBOARD="true").options["style"].tensorboard
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    told = problems(monkeypatch, TENSORBOARD="true", EPOCHS="none")
    assert "TENSORBOARD: " in told and "not installed" in told and "EPOCHS" in told
    assert not settings(monkeypatch, TENSORBOARD="false", EPOCHS="1").options["style"].tensorboard


def test_an_empty_signing_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "WEBHOOK_SIGNING_SECRET: " in problems(monkeypatch, WEBHOOK_SIGNING_SECRET=",")


def test_buckets_default_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = settings(monkeypatch).storage
    assert {plain.model_bucket_name, plain.state_bucket_name} == {"stylelicense-media"}
    assert plain.image_buckets == ("stylelicense-media",)
    own = settings(monkeypatch, MODEL_BUCKET_NAME="models").storage
    assert (own.model_bucket_name, own.state_bucket_name) == ("models", "models")
    assert own.image_buckets == ("stylelicense-media", "models")
    apart = settings(monkeypatch, STATE_BUCKET_NAME="state").storage
    assert (apart.model_bucket_name, apart.state_bucket_name) == ("models", "state")


def test_settings_cannot_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = settings(monkeypatch)
    with pytest.raises(ValidationError, match="frozen"):
        loaded.pages.http_port = 4
    with pytest.raises(ValidationError, match="frozen"):
        loaded.pages = loaded.pages
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.parameters["style"].epochs = 3


# ---- folders -------------------------------------------------------------------------------------


def test_a_relative_folder_starts_at_the_folder_in_which_the_program_was_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = settings(monkeypatch, BASE_MODEL="./base", HF_HOME="hub", WORK_DIR="~/work")
    monkeypatch.chdir("/")
    assert loaded.trainer.base_model == str(tmp_path / "base")
    assert loaded.trainer_environment()["HF_HOME"] == str(tmp_path / "hub")
    assert loaded.worker.work_dir == Path("~/work").expanduser()


@pytest.mark.parametrize("value", ["base", "../base", "a/b/c", ".hidden/base"])
def test_a_name_that_the_hub_cannot_have_is_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    resolved = os.path.normpath(tmp_path / value)
    assert settings(monkeypatch, BASE_MODEL=value).trainer.base_model == resolved


def test_a_name_on_the_hub_is_kept_unless_such_a_folder_exists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert settings(monkeypatch, BASE_MODEL="owner/name").trainer.base_model == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert (
        settings(monkeypatch, BASE_MODEL="owner/name").trainer.base_model
        == f"{tmp_path}/owner/name"
    )


# ---- the base model's revision -------------------------------------------------------------------


def test_the_default_base_model_is_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = settings(monkeypatch)
    default = loaded.trainer
    assert re.fullmatch("[0-9a-f]{40}", default.base_model_revision or "")
    assert loaded.trainer_options().base_model_revision == default.base_model_revision
    assert not not_pinned(default.base_model, default.base_model_revision)


def test_the_commit_of_the_default_model_is_not_used_for_another_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert settings(monkeypatch, BASE_MODEL="owner/name").trainer.base_model_revision is None
    assert settings(monkeypatch, BASE_MODEL=str(tmp_path)).trainer.base_model_revision is None


def test_a_revision_that_is_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(monkeypatch, BASE_MODEL_REVISION="main").trainer.base_model_revision == "main"


def test_a_branch_on_the_hub_is_not_pinned_and_a_folder_is(tmp_path: Path) -> None:
    assert "no revision is set" in not_pinned("owner/name", None)
    assert "main is a branch or a tag" in not_pinned("owner/name", "main")
    assert not not_pinned("owner/name", "0123456789abcdef" * 2 + "01234567")
    assert not not_pinned(str(tmp_path), None)


def test_a_container_image_with_the_model_has_the_same_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dockerfile = (EXAMPLE.parent / "Dockerfile").read_text(encoding="utf-8")
    default = settings(monkeypatch).trainer
    assert f"ARG MODEL={default.base_model}\n" in dockerfile
    assert f"ARG MODEL_REVISION={default.base_model_revision}\n" in dockerfile


# ---- webhooks ------------------------------------------------------------------------------------


def test_the_signing_secret_is_derived_from_the_token_by_the_protocols_formula(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest = hmac.new(
        TOKEN.encode(), b"training-server webhook signing v1", hashlib.sha256
    ).digest()
    loaded = settings(monkeypatch)
    assert loaded.webhooks.signing_secrets() == ("whsec_" + base64.b64encode(digest).decode(),)
    assert loaded.webhooks.signing_secrets()[0] in loaded.secrets()


def test_several_signing_secrets_sign_while_keys_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tuple("whsec_" + base64.b64encode(bytes([n]) * 24).decode() for n in (1, 2))
    loaded = settings(monkeypatch, WEBHOOK_SIGNING_SECRET=", ".join(keys))
    assert loaded.webhooks.signing_secrets() == keys


@pytest.mark.parametrize("name", ["BACKEND_API_URL", "WEBHOOK_ALLOWED_ORIGINS"])
def test_plain_http_is_allowed_only_on_this_machine_or_on_request(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert "ALLOW_INSECURE_WEBHOOKS=true" in problems(monkeypatch, **{name: "http://10.0.0.5"})
    settings(monkeypatch, **{name: "http://[::1]:8000"})
    settings(monkeypatch, **{name: "http://10.0.0.5"}, ALLOW_INSECURE_WEBHOOKS="true")


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://API.example.com/webhooks?x=1", "https://api.example.com"),
        ("https://api.example.com:443", "https://api.example.com"),
        ("http://localhost:80/", "http://localhost"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_origin_is_scheme_host_and_port(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    "url", ["api.example.com", "ftp://a", "https://", "https://u:p@a", "https://a:99999", ""]
)
def test_an_address_without_a_web_origin_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        origin_of(url)


# ---- training ------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_hyper_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(monkeypatch).parameters == {
        "style": HyperParameters(),
        "llm": LlmParameters(),
    }


def test_the_parameters_of_a_message_win_over_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = settings(monkeypatch, EPOCHS="50", LORA_RANK="4", LORA_ALPHA="8")
    order = Order({"style_id": 1, "images": ["a.jpg"], "parameters": {"epochs": 7}}, "data.")
    parameters = loaded.kinds().of("style").read(order).hyper_parameters
    assert (parameters.epochs, parameters.rank, parameters.alpha) == (7, 4, 8.0)


def test_every_hyper_parameter_has_a_setting() -> None:
    fields = {field.name for field in dataclasses.fields(HyperParameters)}
    settings_of_style = config.settings_of_kinds("parameters")["style"].names
    assert set(settings_of_style.values()) == fields
    assert {f"STYLE_{name}".upper() for name in settings_of_style} <= DOCUMENTED


def test_local_training_requires_no_setting() -> None:
    assert load_local().trainer_options().base_model.startswith("stable-diffusion-v1-5/")


def test_the_trainer_s_environment_has_no_secret_but_the_hub_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "a-key")
    monkeypatch.setenv("rabbitmq_user", "lower-case-works-too")
    monkeypatch.setenv("COPY_OF_IT", f"Bearer {TOKEN}")
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "all")
    loaded = settings(
        monkeypatch,
        AWS_ACCESS_KEY_ID="an-id",
        AWS_SECRET_ACCESS_KEY="a-secret-key",
        HF_TOKEN="hf_token",
        HF_HOME="/models",
        CUDA_VISIBLE_DEVICES="1",
    )
    environment = loaded.trainer_environment()
    assert environment["HF_TOKEN"] == "hf_token"
    assert environment["HF_HOME"] == "/models"
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert environment["PATH"] == os.environ["PATH"]
    text = repr({k: v for k, v in environment.items() if k != "HF_TOKEN"})
    for value in (TOKEN, "an-id", "a-secret-key", "a-key", "lower-case", "hf_token"):
        assert value not in text


@pytest.mark.parametrize(
    ("deterministic", "given", "expected"),
    [("true", None, ":4096:8"), ("true", ":16:8", ":16:8"), ("false", None, None)],
)
def test_cublas_gives_the_same_bits_each_time_if_the_setting_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, deterministic: str, given: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if given:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    environment = settings(monkeypatch, DETERMINISTIC=deterministic).trainer_environment()
    assert environment.get("CUBLAS_WORKSPACE_CONFIG") == expected


def test_the_secrets_of_local_training_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    loaded = load_local()
    assert loaded.trainer.hf_token == SecretStr("hf_token")
    assert loaded.secrets() == ("hf_token",)


def test_the_path_of_an_address_is_kept_and_a_query_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = settings(monkeypatch, BACKEND_API_URL="https://api.example.org/prod/")
    assert loaded.webhooks.backend_api_url == "https://api.example.org/prod"
    for address in ("https://api.example.org/?a=b", "https://api.example.org/#top"):
        told = problems(monkeypatch, BACKEND_API_URL=address)
        assert "BACKEND_API_URL: must not have a query" in told
    told = problems(
        monkeypatch,
        BACKEND_API_URL="https://api.example.org/one",
        WEBHOOK_ALLOWED_ORIGINS="https://api.example.org/two",
    )
    assert re.search("WEBHOOK_ALLOWED_ORIGINS: .*two paths", told)


def test_a_file_of_certificates_and_a_proxy_are_checked_at_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty.pem").write_text("none")
    told = problems(monkeypatch, WEBHOOK_CA_FILE=str(tmp_path / "empty.pem"))
    assert re.search("WEBHOOK_CA_FILE: .*certificates in PEM", told)
    monkeypatch.delenv("WEBHOOK_CA_FILE")
    for proxy in ("proxy.example.org", "socks5://a:1", "http://user:hunter2@a", "http://a:1/x"):
        told = problems(monkeypatch, WEBHOOK_PROXY=proxy)
        assert "WEBHOOK_PROXY: must be" in told
        assert "hunter2" not in told
    proxy = "http://user:hunter2@proxy.example.org:3128"
    assert proxy in settings(monkeypatch, WEBHOOK_PROXY=proxy).secrets()


# ---- kinds ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _ToyParameters:
    """Parameters of a second kind, one of them with the name of one of the style's."""

    epochs: int = 7

    def __post_init__(self) -> None:
        if self.epochs > 9:
            raise ValueError(f"epochs is {self.epochs}; it must be at most 9")


class _ToyKind:
    parameters_type = _ToyParameters
    options_type = None


@pytest.fixture(name="toy")
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "toy", f"{__name__}:_ToyKind")


def test_a_parameter_can_be_set_with_and_without_the_prefix_of_its_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = settings(monkeypatch, STYLE_EPOCHS="9", SEED="5", STYLE_LORA_RANK="8", MIN_IMAGES="4")
    style = loaded.parameters["style"]
    assert (style.epochs, style.seed, style.rank) == (9, 5, 8)
    assert loaded.options["style"].min_images == 4
    assert "STYLE_EPOCHS: epochs is 0" in problems(monkeypatch, STYLE_EPOCHS="0")


def test_two_names_of_one_setting_with_different_values_are_refused_by_both_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("STYLE_EPOCHS=9\n", encoding="utf-8")
    text = problems(monkeypatch, EPOCHS="8", RABBITMQ_PORT="0")
    assert "STYLE_EPOCHS and EPOCHS: two names of one setting" in text and "RABBITMQ_PORT: " in text
    assert settings(monkeypatch, EPOCHS="9", RABBITMQ_PORT="1").parameters["style"].epochs == 9


@pytest.mark.usefixtures("toy")
def test_names_without_a_prefix_belong_to_the_first_kind_that_the_worker_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = settings(monkeypatch, EPOCHS="3", KINDS="style, toy").parameters
    assert (both["style"].epochs, both["toy"].epochs) == (3, 7)
    toy_first = settings(monkeypatch, KINDS="toy,style").parameters
    assert (toy_first["style"].epochs, toy_first["toy"].epochs) == (100, 3)
    text = problems(monkeypatch, KINDS="toy", EPOCHS="10", STYLE_EPOCHS="0")
    assert "EPOCHS: epochs is 10; it must be at most 9" in text
    assert "STYLE_EPOCHS: epochs is 0" in text


def test_an_unknown_kind_is_refused_with_the_kinds_that_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert settings(monkeypatch).worker.kinds == ("style",)
    assert settings(monkeypatch, KINDS="style,style").kinds().served == ("style",)
    text = problems(monkeypatch, KINDS="style,video", EPOCHS="0")
    assert "KINDS: unknown kind video. Known kinds: style" in text and "EPOCHS: " in text


def test_the_bucket_of_the_models_has_a_second_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(monkeypatch, S3_BUCKET="models").storage.model_bucket_name == "models"
    assert config.unknown_names() is None
    assert "S3_BUCKET: is not a bucket name" in problems(monkeypatch, S3_BUCKET="s3://models")


def test_the_setting_of_compilation_has_no_effect_and_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("COMPILE_FROM_STEPS=none\n", encoding="utf-8")
    settings(monkeypatch)
    assert "COMPILE_FROM_STEPS (has no effect: compilation was removed)" in str(
        config.unknown_names()
    )
