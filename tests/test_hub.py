from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cbq import hub
from cbq.errors import InputError

RESPONSE = SimpleNamespace(headers={}, request=None)  # httpx or httpx2, by the version of huggingface_hub
ANSWERS = [
    (RepositoryNotFoundError("404", response=RESPONSE), "the hub has no such repository"),
    (GatedRepoError("403", response=RESPONSE), "gated"),
    (RevisionNotFoundError("404", response=RESPONSE), "no such revision"),
    (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
    (ConnectionError("refused"), r"cannot be reached \(ConnectionError: refused\)"),
]


@pytest.mark.parametrize(("answer", "message"), ANSWERS)
def test_every_refusal_of_the_hub_is_one_line(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, answer: Exception, message: str
) -> None:
    def repo_info(*_: object, **__: object) -> None:
        raise answer

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
    for fetch in (
        lambda: hub.fetch_file("allenai/c4", "en/x.json.gz"),
        lambda: hub.fetch_snapshot("huggyllama/llama-7b", ["*.json"], is_complete=lambda folder: True),
    ):
        with pytest.raises(InputError, match=message) as error:
            fetch()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (GatedRepoError("403", response=RESPONSE), "gated"),
        (RemoteEntryNotFoundError("404", response=RESPONSE), "no such file"),
        (LocalEntryNotFoundError("connection lost\nretry"), r"download failed \(connection lost\)"),
        (OSError("disk full"), "disk full"),
    ],
)
def test_failed_download_is_one_line(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str
) -> None:
    def download(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: None)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(InputError, match=message) as error:
        hub.fetch_file("allenai/c4", "en/x.json.gz")
    assert "\n" not in str(error.value)
