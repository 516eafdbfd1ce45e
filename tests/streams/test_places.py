"""Which place a run chooses for its streams, and what it leaves on a disk."""

import os
import weakref

import pytest
import torch

from cbq.errors import InputError
from cbq.streams import places
from cbq.streams.places import ON_DEVICE, OnDisk, OnHost, StreamPlacement, reserve

CPU = torch.device("cpu")
SHAPE = (4, 8, 16)


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the places seem to have free, in bytes."""
    free = {"device": 1000, "host": 1000, "disk": 1000}
    monkeypatch.setattr(places, "free_device_bytes", lambda device: free["device"])
    monkeypatch.setattr(places, "free_host_bytes", lambda: free["host"])
    monkeypatch.setattr(places, "free_disk_bytes", lambda folder: free["disk"])
    return free


@pytest.mark.parametrize(
    ("device", "host", "disk", "chosen"),
    [
        (800, 0, 0, "device"),  # 2 streams of 100 bytes; a quarter of the device
        (799, 400, 0, "host"),  # half of the host
        (799, 399, 200, "disk"),
        (799, 399, 199, None),
    ],
)
def test_auto_takes_the_first_with_room(rooms, tmp_path, device, host, disk, chosen):
    rooms.update(device=device, host=host, disk=disk)
    placement = StreamPlacement("auto", device_share=0.25, host_share=0.5)
    if chosen is None:
        with pytest.raises(InputError, match=r"activations\.cache=auto: 2 streams take .* GiB of disk"):
            placement.choose(2, 100, CPU, tmp_path)
    else:
        assert placement.choose(2, 100, CPU, tmp_path).name == chosen


@pytest.mark.parametrize("cache", ["device", "host", "disk"])
def test_a_named_place_is_taken_or_refused(rooms, tmp_path, cache):
    placement = StreamPlacement(cache, device_share=0.0, host_share=0.0)  # shares are for auto
    assert placement.choose(3, 333, CPU, tmp_path).name == cache
    with pytest.raises(InputError, match=rf"activations\.cache={cache}: 3 streams take"):
        placement.choose(3, 334, CPU, tmp_path)


def test_page_locked_memory_is_rounded_up():
    host = OnHost()
    assert [host.taken(size, torch.device("cuda")) for size in (2**31, 2**31 + 1, 5)] == [2**31, 2**32, 8]
    assert host.taken(5, CPU) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "ram"}, r"activations\.cache must be one of auto, device, host, disk, got 'ram'"),
        ({"cache": ["disk"]}, r"activations\.cache must be one of"),
        ({"device_share": 1.5}, r"activations\.device_share must be at most 1"),
        ({"host_share": -1}, r"activations\.host_share must be a number"),
        ({"folder": "/no/such/folder"}, r"activations\.folder must be a folder to write in"),
        ({"folder": 5}, r"activations\.folder must be a text or null"),
    ],
    ids=str,
)
def test_mistakes(options, message):
    with pytest.raises(InputError, match=message):
        StreamPlacement(**options)


def test_the_folder_of_the_files(tmp_path):
    run_folder = tmp_path / "not" / "made" / "yet"
    assert StreamPlacement("disk").choose(2, 100, CPU, run_folder).folder == run_folder
    assert StreamPlacement("disk", folder=str(tmp_path)).choose(2, 100, CPU, run_folder).folder == tmp_path


@pytest.mark.parametrize("place", [ON_DEVICE, OnHost()], ids=lambda place: place.name)
def test_a_cpu_has_one_memory(place):
    assert place.make(SHAPE, torch.bfloat16, CPU).tensor.device == CPU
    assert place.room(CPU) == pytest.approx(ON_DEVICE.room(CPU), rel=0.2)


def test_a_file_has_no_name_and_ends_with_its_stream(tmp_path):
    """So nothing is left of it, however the process ends."""
    stream = OnDisk(tmp_path).make(SHAPE, torch.float32, CPU)
    assert list(tmp_path.iterdir()) == []
    stream[0:1] = torch.ones(1, *SHAPE[1:])
    batch, file = stream[0:1], weakref.ref(stream.pages)
    assert file() is not None
    del stream
    assert file() is None
    assert (batch == 1).all(), "a batch outlives its stream"


@pytest.mark.parametrize("fallocate", [True, False], ids=["fallocate", "zeros"])
def test_room_on_the_disk_is_taken_before_it_is_used(tmp_path, monkeypatch, fallocate):
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with (tmp_path / "file").open("wb") as file:
        reserve(file.fileno(), 3_000_000)
        found = os.fstat(file.fileno())
    assert found.st_size == 3_000_000
    assert found.st_blocks * 512 >= 3_000_000


@pytest.mark.parametrize("fallocate", [True, False], ids=["fallocate", "zeros"])
def test_a_disk_that_fills_up_meanwhile(tmp_path, monkeypatch, fallocate):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    stream = OnDisk(tmp_path).make((3, 700, 700), torch.float32, CPU)
    assert (stream[:] == 0).all()
    monkeypatch.setattr(os, "posix_fallocate" if fallocate else "write", full, raising=False)
    with pytest.raises(InputError, match=r"activations\.cache=disk: .*No space left on device"):
        OnDisk(tmp_path).make(SHAPE, torch.float32, CPU)
    assert list(tmp_path.iterdir()) == []
