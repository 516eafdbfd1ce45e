"""Streams and batches of them against a plain tensor."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cbq.streams.kinds import DiskStream, Prefetch, Segments, Stream
from cbq.streams.places import ON_DEVICE, OnDisk, OnHost

CPU = torch.device("cpu")
KINDS = ["device", "host", "disk"]


@pytest.fixture
def make(tmp_path: Path):
    """Return a function that makes a stream of a kind with the values of a tensor."""

    def make(kind: str, values: torch.Tensor, device: torch.device = CPU) -> Stream:
        place = {"device": ON_DEVICE, "host": OnHost(), "disk": OnDisk(tmp_path)}[kind]
        stream = place.make(values.shape, values.dtype, device)
        for start in range(0, len(values), 3):
            stream[start : start + 3] = values[start : start + 3]
        return stream

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_stream_holds_what_was_written(make, kind, dtype):
    values = torch.randn(7, 5, 3, dtype=dtype)
    stream = make(kind, values)
    assert len(stream) == 7
    assert (stream.shape, stream.dtype) == (values.shape, dtype)
    for where in (slice(0, 7), slice(2, 5), slice(6, 7), [3], [4, 0, 4], torch.tensor([6, 1])):
        assert torch.equal(stream[where], values[where])
    stream[2:4] = torch.ones(2, 5, 3)  # float32, as a block may compute
    values[2:4] = 1
    assert torch.equal(stream[:], values)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_a_tensor_dataset(make, kind):
    """The same order and bits as torch's own, epoch after epoch, also prefetched."""
    first, second = torch.randn(7, 5, 3), torch.randn(7, 5, 3)

    def loader(dataset, **options) -> DataLoader:
        return DataLoader(dataset, 3, shuffle=True, generator=torch.Generator().manual_seed(5), **options)

    plain = loader(TensorDataset(first, second))
    own = loader(Segments([make(kind, first), make(kind, second)]), collate_fn=list)
    ahead = Prefetch(loader(Segments([make(kind, first), make(kind, second)]), collate_fn=list), CPU)
    assert len(ahead) == len(plain) == 3
    for _ in range(2):
        for expected, batch, fetched in zip(plain, own, ahead, strict=True):
            for a, b, c in zip(expected, batch, fetched, strict=True):
                assert torch.equal(a, b)
                assert torch.equal(a, c)


def test_prefetch_is_one_batch_ahead():
    asked = []
    batches = iter(Prefetch(([asked.append(i)] and [torch.tensor(i)] for i in range(3)), CPU))
    assert asked == []
    for expected, seen in ((0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])):
        assert next(batches)[0].item() == expected
        assert asked == seen
    assert list(batches) == []


def test_prefetch_passes_errors_on():
    def fail():
        yield [torch.tensor(0)]
        raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError, match="broken"):
        list(Prefetch(fail(), CPU))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="says what of a map is in memory")
def test_a_stream_on_disk_is_not_in_memory(make):
    values = torch.randn(64, 128, 128)  # 4 MiB

    def resident(stream: DiskStream) -> int:
        address = f"{stream.tensor.data_ptr():x}-"
        _, found, rest = Path("/proc/self/smaps").read_text().partition(address)
        assert found
        return int(re.search(r"^Rss:\s+(\d+) kB", rest, re.MULTILINE)[1]) * 1024

    stream = make("disk", values)
    if not hasattr(mmap, "MADV_DONTNEED"):
        pytest.skip("the system keeps the pages")
    assert resident(stream) == 0, "after writing"
    assert torch.equal(stream[:], values)
    assert torch.equal(stream[[5, 3]], values[[5, 3]])
    assert resident(stream) == 0, "after reading"
    assert stream.tensor[0, 0, 0] == values[0, 0, 0]
    assert resident(stream) > 0, "it shows when a page is there"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_batches_come_to_the_gpu(make, kind):
    """Also those that are prefetched while the GPU is busy and its memory is reused."""
    device = torch.device("cuda", torch.cuda.current_device())
    values = torch.randn(40, 256, 512)
    stream = make(kind, values, device)
    assert kind != "host" or stream.tensor.is_pinned()
    loader = DataLoader(Segments([stream]), 2, collate_fn=list)
    sums, busy = [], torch.randn(2048, 2048, device=device)
    for (batch,) in Prefetch(loader, device):
        assert batch.device == device
        for _ in range(20):
            busy = busy @ busy / 2048
        sums.append(batch.double().sum((1, 2)))
        del batch
    expected = values.double().sum((1, 2))
    torch.testing.assert_close(torch.cat(sums).cpu(), expected, rtol=1e-9, atol=1e-6)
    stream[3:5] = torch.ones(2, 256, 512, device=device)
    assert (stream[[3, 4]] == 1).all()
