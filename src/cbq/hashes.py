"""Fast hashes: whether numbers are the same to the bit. They are no protection from who changes them on purpose."""

from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash

CHUNK = 2**24  # bytes


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the hash of some tensors: names, dtypes, shapes and bits."""
    digest = xxhash.xxh3_128()  # of billions of numbers: the others take minutes
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the hash of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
