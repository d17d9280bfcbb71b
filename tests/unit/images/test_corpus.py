"""Images as users send them: used as intended, or left out with a reason."""

from __future__ import annotations

import dataclasses
import functools
import io
import random
import re
import resource
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from images.containers import PREVIEW, RAW
from images.decoder import CRASHED, PATIENCE_SECONDS, Answer, Decoder
from images.decoding import Refused, Request, Taken
from images.vetting import UnusableImage, Vetted, vet
from jobs.style import TrainingImage
from tests.corpus import files
from tests.corpus.files import chunk, encoded, iccp, profile
from tests.corpus.storages import Case, cases, srgb_of
from tests.unit.training.conftest import MakeRun
from training.style import dataset
from training.style.dataset import prepare
from training.style.families.sd15 import BaseModel
from utils.errors import Stopped, StopReason, WorkerCrashed
from utils.names import printable, shown_name
from utils.settings.groups import TrainerSettings

RAMP = np.repeat(np.arange(256, dtype=np.uint8)[None], 64, axis=0)
COLOURS = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def vetted(content: bytes) -> Vetted:
    """Vet with the limit that is shipped."""
    return vet(content, max_pixels=100_000_000)


def shown(content: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """The pixels that are trained on."""
    return np.asarray(vetted(content).image).astype(np.int64)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_an_image_shows_what_its_file_means_or_is_left_out_with_a_reason(case: Case) -> None:
    try:
        found = vetted(case.content)
    except UnusableImage as unusable:
        assert case.right is None or "16 bits a colour" in str(unusable)
        assert "export it as" in str(unusable)
    else:
        assert case.right is not None
        assert np.abs(np.asarray(found.image) - case.right).max() <= 2


def test_the_set_has_two_hundred_files_and_most_of_them_are_used() -> None:
    every = list(cases())
    assert len(every) >= 200
    assert sum(case.right is not None for case in every) >= 190


# ---- profiles ------------------------------------------------------------------------------------


def test_a_profile_is_judged_by_its_effect_and_not_by_its_name() -> None:
    linear = profile("RGB ", 1.0, "sRGB-elle-V2-g10.icc")
    found = shown(
        files.png(np.repeat(RAMP[..., None], 3, axis=2), files.RGB, before=[iccp(linear)])
    )
    assert np.abs(found[0, :, 0] - srgb_of(np.arange(256) / 255)).max() <= 1


def test_a_deep_image_in_a_linear_space_is_left_out_since_its_dark_levels_are_gone() -> None:
    deep = np.repeat(RAMP[..., None], 3, axis=2).astype(np.uint16) * 257
    linear = profile("RGB ", 1.0, "sRGB-elle-V2-g10.icc")
    with pytest.raises(UnusableImage, match="16 bits a colour in the colour space 'sRGB-elle"):
        vetted(files.png(deep, files.RGB, depth=16, before=[iccp(linear)]))


@pytest.mark.parametrize(
    ("before", "gamma"),
    [
        ([chunk(b"gAMA", struct.pack(">I", 100_000))], 1.0),
        ([chunk(b"gAMA", struct.pack(">I", 55_556))], 1.8),
        ([chunk(b"gAMA", struct.pack(">I", 45_455))], None),
        ([chunk(b"gAMA", struct.pack(">I", 100_000)), chunk(b"sRGB", b"\0")], None),
        ([chunk(b"cICP", bytes([1, 13, 0, 1])), chunk(b"gAMA", struct.pack(">I", 100_000))], None),
    ],
)
def test_the_gamma_that_a_png_states_is_heeded_unless_it_is_srgb(
    before: list[bytes], gamma: float | None
) -> None:
    found = shown(files.png(RAMP, files.GREY, before=before))[0, :, 0]
    right = srgb_of((np.arange(256) / 255) ** gamma) if gamma else np.arange(256)
    assert np.abs(found - right).max() <= 1


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ([chunk(b"cICP", bytes([9, 16, 0, 1]))], "coded for other screens"),
        ([chunk(b"cICP", bytes([9, 18, 0, 1]))], "coded for other screens"),
        (
            [
                chunk(
                    b"cHRM",
                    struct.pack(">8I", 31270, 32900, *(70800, 29200, 17000, 79700, 13100, 4600)),
                )
            ],
            "primary colours that are not sRGB's",
        ),
        ([chunk(b"gAMA", struct.pack(">I", 1))], "states a gamma"),
    ],
)
def test_a_png_in_colours_that_are_not_known_here_is_left_out(
    before: list[bytes], reason: str
) -> None:
    with pytest.raises(UnusableImage, match=reason):
        vetted(files.png(COLOURS, files.RGB, before=before))


def test_the_colours_of_display_p3_are_converted_however_the_file_names_them() -> None:
    coded = vetted(files.png(COLOURS, files.RGB, before=[chunk(b"cICP", bytes([12, 13, 0, 1]))]))
    assert "Display P3" in coded.notes[0]
    assert np.abs(np.asarray(coded.image).astype(int) - COLOURS).max() > 10


def test_adobe_rgb_in_the_exif_data_of_a_camera_is_used() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 2
    plain = Image.fromarray(COLOURS)
    found = vetted(encoded(plain, "JPEG", quality=100, subsampling=0, exif=exif))
    assert any("Adobe RGB" in note for note in found.notes)


# ---- depths and containers -----------------------------------------------------------------------


def _dng() -> bytes:
    return files.tiff(
        COLOURS.tobytes(), (64, 64), {258: (8, 8, 8), 262: 2, 277: 3, 50706: b"\1\4\0\0"}
    )


def _nef() -> bytes:
    return files.tiff(COLOURS.tobytes(), (64, 64), {254: 1, 258: (8, 8, 8), 262: 2, 277: 3, 330: 8})


def _tiff_ep() -> bytes:
    return files.tiff(
        COLOURS.tobytes(), (64, 64), {258: (8, 8, 8), 262: 2, 277: 3, 37398: b"\1\0\0\0"}
    )


def _preview_first() -> bytes:
    return files.tiff(COLOURS.tobytes(), (64, 64), {254: 1, 258: (8, 8, 8), 262: 2, 277: 3})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(_dng, RAW, id="dng"),
        pytest.param(_nef, RAW, id="nef"),
        pytest.param(_tiff_ep, RAW, id="tiff/ep"),
        pytest.param(lambda: b"FUJIFILMCCD-RAW 0201" + bytes(200), RAW, id="raf"),
        pytest.param(lambda: b"\0\0\0\x18ftypcrx " + bytes(200), RAW, id="cr3"),
        pytest.param(lambda: b"IIU\0\x18\0\0\0" + bytes(200), RAW, id="rw2"),
        pytest.param(_preview_first, PREVIEW, id="preview first"),
    ],
)
def test_a_file_that_begins_with_a_preview_is_not_trained_on_it(
    content: Callable[[], bytes], reason: str
) -> None:
    with pytest.raises(UnusableImage) as caught:
        vetted(content())
    assert str(caught.value) == reason


def test_an_ordinary_tiff_with_other_images_inside_stays() -> None:
    tags = {258: (8, 8, 8), 262: 2, 277: 3, 330: 8}  # a full image that names smaller ones
    assert np.array_equal(shown(files.tiff(COLOURS.tobytes(), (64, 64), tags)), COLOURS)


# ---- metadata ------------------------------------------------------------------------------------


def _text(size: int) -> bytes:
    return np.random.default_rng(1).integers(65, 91, size, dtype=np.uint8).tobytes()


@pytest.mark.parametrize(
    "before",
    [
        pytest.param([chunk(b"tEXt", b"Comment\0" + _text(2 << 20))], id="long text"),
        pytest.param(
            [chunk(b"zTXt", b"parameters\0\0" + zlib.compress(_text(2 << 20)))], id="long zTXt"
        ),
        pytest.param([chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(200 << 20)))], id="bomb"),
        pytest.param(
            [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(64 << 20)))],
            id="bomb in XMP",
        ),
        pytest.param([chunk(b"tEXt", b"a\0b", sound=False)], id="wrong checksum"),
        pytest.param([chunk(b"zTXt", b"a\0\7b")], id="unknown compression"),
        pytest.param([chunk(b"tIME", b"\0", sound=False)], id="wrong checksum of a date"),
        pytest.param([chunk(b"gAMA", b"\0\0\0\1", sound=False)], id="wrong checksum of gamma"),
        pytest.param([chunk(b"eXIf", b"MM\0*", sound=False)], id="wrong checksum of EXIF"),
        pytest.param([iccp(b"\0" * 500, sound=False)], id="wrong checksum of a profile"),
        pytest.param([iccp(bytes(64 << 20))], id="profile as a bomb"),
        pytest.param(
            [chunk(b"iTXt", b"Comment\0\0\0\0\0" + _text(3 << 20))],
            id="long iTXt",
        ),
    ],
)
def test_metadata_never_costs_an_image_and_never_changes_its_pixels(before: list[bytes]) -> None:
    assert np.array_equal(shown(files.png(COLOURS, files.RGB, before=before)), COLOURS)


def test_a_profile_of_several_megabytes_is_used(decoder: Decoder, tmp_path: Path) -> None:
    linear = profile("RGB ", 1.0, "large", padding=3 << 20)
    content = files.png(np.repeat(RAMP[..., None], 3, axis=2), files.RGB, before=[iccp(linear)])
    fact = taken_in(decoder, tmp_path, content).fact
    assert isinstance(fact, Taken) and any("profile 'large'" in note for note in fact.notes)


def test_damaged_metadata_that_counts_is_reported() -> None:
    content = files.png(COLOURS, files.RGB, before=[iccp(b"x", sound=False)])
    assert vetted(content).notes == ("has damaged metadata (iCCP), which was ignored",)


# ---- limits --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    """A decoder with the limits that are shipped."""
    with Decoder() as started:
        yield started


def taken_in(decoder: Decoder, folder: Path, *contents: bytes) -> Answer:
    """The answer of the decoder for the last of these files."""
    requests = []
    for number, content in enumerate(contents):
        path = folder / f"{number}.img"
        path.write_bytes(content)
        requests.append(Request(str(path), 100_000_000, 64))
    return list(decoder.answers(requests))[-1]


def test_an_image_that_takes_too_long_is_left_out_and_the_rest_is_used(tmp_path: Path) -> None:
    slow, sound = files.jpeg_of_many_scans(1500, 5000), encoded(Image.fromarray(COLOURS))
    assert len(slow) < 300_000
    paths = [tmp_path / name for name in ("a.png", "slow.jpg", "b.png")]
    for path, content in zip(paths, (sound, slow, sound), strict=True):
        path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with Decoder() as decoder:
        requests = [Request(str(path), 100_000_000, 64) for path in paths]
        facts = [answer.fact for answer in decoder.answers(requests)]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert [type(fact) for fact in facts] == [Taken, Refused, Taken]
    assert isinstance(facts[1], Refused) and "longer than 8 seconds" in facts[1].reason
    # Computing time, since the clock of a busy machine means little; two starts are included.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 12


def test_a_slow_image_does_not_fail_the_job_and_each_image_counts_as_progress(
    base: BaseModel, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow.jpg"
    slow.write_bytes(files.jpeg_of_many_scans(1500, 3000))
    run = make_run(count=3)
    first, *others = run.images
    images = (first, TrainingImage("s3://media/slow.jpg", str(slow)), *others)
    progress: list[None] = []
    monkeypatch.setattr(dataset, "Decoder", functools.partial(Decoder, seconds=1))
    data = prepare(
        dataclasses.replace(run, images=images), base, on_image=lambda: progress.append(None)
    )
    assert [entry.status for entry in data.entries] == ["used", "left_out", "used", "used"]
    assert "takes longer than 1 seconds to decode" in data.entries[1].reasons[0]
    assert len(progress) == 4 and len(data.usable) == 3


def test_the_trainer_does_not_look_stalled_while_an_image_is_waited_for() -> None:
    assert PATIENCE_SECONDS < TrainerSettings().stall_seconds / 2


def test_the_largest_image_that_is_allowed_takes_less_than_700_mebibytes(tmp_path: Path) -> None:
    content = files.flat_png(10_000)
    assert len(content) < 1_000_000
    with Decoder() as decoder:
        fact = taken_in(decoder, tmp_path, content).fact
        # pylint: disable-next=protected-access
        process = decoder._process and decoder._process._process
        assert process
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    assert isinstance(fact, Refused) and "single colour" in fact.reason  # after it was decoded
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    assert int(peak) < 700 * 1024


def test_an_image_cannot_take_more_memory_than_the_decoder_may(tmp_path: Path) -> None:
    content = encoded(Image.new("RGBA", (6000, 6000), "teal"))
    with Decoder(memory=64 * 1024**2) as decoder:
        fact = taken_in(decoder, tmp_path, content).fact
    assert isinstance(fact, Refused) and "too large to be decoded" in fact.reason


def test_pixels_are_counted_in_bytes_before_any_is_decoded() -> None:
    content = files.png(COLOURS, files.RGB)
    header = struct.pack(">IIBBBBB", 13000, 13000, 8, 2, 0, 0, 0)
    announced = content.replace(content[8:33], chunk(b"IHDR", header))
    with pytest.raises(UnusableImage, match="645 MiB of memory"):
        vet(announced, max_pixels=200_000_000)


def test_a_large_image_is_made_smaller_while_it_is_read() -> None:
    large = Image.fromarray(COLOURS).resize((7000, 6000))
    for kind in ("PNG", "JPEG"):
        found = vetted(encoded(large, kind))
        assert found.size == (7000, 6000) and found.image.size == (3500, 3000)
        near = np.asarray(large.resize((64, 64))).astype(int)
        assert np.abs(np.asarray(found.image.resize((64, 64))).astype(int) - near).mean() < 2


def test_a_decoder_that_crashes_costs_one_image(tmp_path: Path) -> None:
    sound = encoded(Image.fromarray(COLOURS))
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        path.write_bytes(sound)
    with Decoder() as decoder:
        answers = decoder.answers([Request(str(path), 100_000_000, 64) for path in paths])
        assert isinstance(next(answers).fact, Taken)
        process = decoder._process  # pylint: disable=protected-access
        assert process is not None
        # pylint: disable-next=protected-access
        died = process._process
        died.kill()
        died.wait()
        facts = [answer.fact for answer in answers]
    # The second one may have been answered before the signal came.
    assert facts[0] == Refused(CRASHED) or isinstance(facts[0], Taken)
    assert isinstance(facts[1], Taken)


def test_lines_of_a_c_library_reach_the_log_and_no_file_can_flood_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = io.BytesIO()
    noise = random.Random(3).randbytes(96 * 96)
    Image.frombytes("L", (96, 96), noise).save(buffer, "TIFF", compression="tiff_lzw")
    damaged = bytearray(buffer.getvalue())
    damaged[2000:2040] = b"\xff" * 40
    talkative = "import os, sys; os.write(2, b'x' * 1000 + b'\\n' + b'line\\n' * 1_000_000)"
    with Decoder() as decoder:
        taken_in(decoder, tmp_path, bytes(damaged))
    assert any("Using code not yet in table" in each for each in _native_lines(caplog))
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("images.decoder.subprocess.Popen", _instead(talkative))
        with Decoder() as decoder, pytest.raises(WorkerCrashed):
            taken_in(decoder, tmp_path, b"anything")
    *lines, omitted = _native_lines(caplog)
    assert lines == ["x" * 300, *["line"] * 4]
    assert re.fullmatch(r"\d+ more lines", omitted)


def _native_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [vars(each)["text"] for each in caplog.records if each.message == "native_stderr"]


def _instead(program: str) -> Callable[..., subprocess.Popen[bytes]]:
    """Starts this program in place of any other."""
    popen = subprocess.Popen
    # pylint: disable-next=consider-using-with  # the decoder closes it
    return lambda command, **how: popen([command[0], "-c", program], **how)


def test_a_decoder_that_cannot_start_is_the_workers_fault_and_no_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("images.decoder.sys.executable", "/bin/false")
    with Decoder() as decoder, pytest.raises(WorkerCrashed, match="could not be started"):
        taken_in(decoder, tmp_path, b"anything")


def test_a_stop_is_obeyed_while_an_image_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "slow.jpg").write_bytes(files.jpeg_of_many_scans(1500, 4000))
    began = time.monotonic()
    with Decoder() as decoder, pytest.raises(Stopped):
        list(
            decoder.answers(
                [Request(str(tmp_path / "slow.jpg"), 100_000_000, 64)],
                should_stop=lambda: StopReason.SHUTDOWN,
            )
        )
    assert time.monotonic() - began < 5


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("s3://media/a/what?v=1.png", "what?v=1.png"),
        ("what?v=1.png", "what?v=1.png"),
        ("https://bucket.s3.amazonaws.com/a/b.png?X-Amz-Signature=abc", "b.png"),
        ("s3://media/a/b.png?X-Amz-Signature=abc", "b.png"),
        ("\udcb0\udca1.jpg", r"\xb0\xa1.jpg"),
        ("half \ud800.png", r"half \ud800.png"),
        ("two\nlines.png", r"two\nlines.png"),
        ("한글 é.jpg", "한글 é.jpg"),
    ],
)
def test_a_name_is_shown_in_full_and_printable(source: str, name: str) -> None:
    assert shown_name(source) == name
    assert printable(source).isprintable()
