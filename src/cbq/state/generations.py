"""Tensors and facts on disk that are replaced as a whole: a generation is there entirely, or the one before it is.

A generation is a manifest, `state.<number>.json`, and the safetensors files that it names with their sizes and hashes.
Files are written under new names, then the manifest that makes them valid; a generation shares the files that did not
change with the one before it. The newest two are kept, so that damage to one leaves the other.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cbq.durable import replacing, write_text
from cbq.hashes import hash_file

FORMAT_VERSION = 1
MANIFEST = re.compile(r"state\.(\d+)\.json")
FILE_NAME = re.compile(r"[\w-]+\.\d+\.safetensors")


class DamagedError(Exception):
    """What is on disk is not what was written; the message says which file."""


class OtherFormatError(Exception):
    """What is on disk is whole, but another version of cbq wrote it; the message says which file."""


@dataclass(frozen=True)
class Generation:
    """One that is whole.

    Args:
        folder: where its files are.
        number: they grow.
        files: by what is in them: "file", "bytes" and "hash".
        facts: of JSON's types.
    """

    folder: Path
    number: int
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any]

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one file, in host memory.

        Raises:
            DamagedError: it cannot be read.
        """
        try:
            # Cloned: matrix products may come out otherwise where memory is aligned otherwise.
            return {key: tensor.clone() for key, tensor in load_file(self.folder / self.files[name]["file"]).items()}
        except (OSError, KeyError, SafetensorError) as error:
            raise DamagedError(f"{self.folder / self.files.get(name, {}).get('file', name)}: {error}") from None


class Generations:
    """A folder of generations.

    Args:
        folder: made with the first of them.

    Attributes:
        current: the one that is gone on from; None: none yet.
        damaged: what `find` passed over, in words.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.current: Generation | None = None
        self.damaged: list[str] = []

    def find(self) -> Generation | None:
        """Make the newest generation that is whole the current one, and return it.

        Raises:
            DamagedError: there are some, and none is whole.
            OtherFormatError: the newest that is whole is another version's. One before it would lose what was done.
        """
        self.current, self.damaged = None, []
        for number in self._numbers():
            try:
                self.current = self._read(number)
                return self.current
            except DamagedError as error:
                self.damaged.append(str(error))
        if self.damaged:
            raise DamagedError("; ".join(self.damaged))
        return None

    def commit(
        self,
        changed: Mapping[str, Callable[[], Mapping[str, torch.Tensor]]],
        facts: dict[str, Any],
        dropped: Iterable[str] = (),
    ) -> None:
        """Make a new generation the current one.

        Args:
            changed: by what is in a file, what returns its tensors; called one at a time. The rest stays.
            facts: of JSON's types.
            dropped: files that are no longer part of it.

        Raises:
            OSError: it cannot be written, as on a full disk. The current one stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        number = max(self._numbers(), default=0) + 1
        files = dict(self.current.files) if self.current else {}
        for name in dropped:
            files.pop(name, None)
        manifest, written = self.folder / f"state.{number}.json", []
        try:
            for name, tensors in changed.items():
                written.append(self.folder / f"{name}.{number}.safetensors")
                with replacing(written[-1]) as temporary:
                    write_tensors(temporary, tensors())
                    size, digest = temporary.stat().st_size, hash_file(temporary)
                files[name] = {"file": written[-1].name, "bytes": size, "hash": digest}
            content = {"format_version": FORMAT_VERSION, "files": files, "facts": facts}
            sealed = {"hash": hash_content(content), "content": content}
            write_text(manifest, json.dumps(sealed) + "\n")
        except BaseException:
            if not manifest.exists():  # it may be interrupted right after it is in its place
                for path in written:
                    path.unlink(missing_ok=True)
            raise
        before, self.current = self.current, Generation(self.folder, number, files, facts)
        self._clean([generation for generation in (before, self.current) if generation])

    def discard(self) -> None:
        """Remove all of it, also where the folder is a link."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder.resolve(), ignore_errors=True)
        if self.folder.is_symlink():
            self.folder.unlink()
        self.current = None

    def _numbers(self) -> list[int]:
        """Return the numbers of all manifests, newest first."""
        if not self.folder.is_dir():
            return []
        found = (MANIFEST.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def _read(self, number: int) -> Generation:
        """Return a generation, each of whose files is what was written.

        Raises:
            DamagedError: one is not, or the manifest is not.
            OtherFormatError: the manifest is whole, and of another format.
        """
        path = self.folder / f"state.{number}.json"
        try:
            sealed = json.loads(path.read_text(encoding="utf-8"))
            content = sealed["content"]
            if sealed["hash"] != hash_content(content):
                raise DamagedError(f"{path} was changed")
            if content["format_version"] != FORMAT_VERSION:
                raise OtherFormatError(
                    f"{path} has format {content['format_version']}, this one reads {FORMAT_VERSION}"
                )
            for entry in content["files"].values():
                file = self.folder / entry["file"]
                if not FILE_NAME.fullmatch(entry["file"]) or file.is_symlink():
                    raise DamagedError(f"{path} names a file that is not its own: {entry['file']}")
                if not file.is_file():
                    raise DamagedError(f"{file} is missing")
                if file.stat().st_size != entry["bytes"] or hash_file(file) != entry["hash"]:
                    raise DamagedError(f"{file} was changed")
            return Generation(self.folder, number, content["files"], content["facts"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{path} cannot be read: {type(error).__name__}") from None

    def _clean(self, kept: list[Generation]) -> None:
        """Remove every file that belongs to none of the generations; what cannot be removed does no harm."""
        names = {entry["file"] for generation in kept for entry in generation.files.values()}
        names |= {f"state.{generation.number}.json" for generation in kept}
        for path in self.folder.iterdir():
            ours = MANIFEST.fullmatch(path.name) or FILE_NAME.fullmatch(path.name) or path.name.endswith(".tmp")
            if ours and path.name not in names:
                path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors of any device, also views of larger ones, as safetensors.

    Raises:
        OSError: there is no room.
    """
    try:
        save_file({name: own_memory(tensor) for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(None, str(error)) from None


def own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in host memory that shares none: itself, or a copy."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def hash_content(content: dict[str, Any]) -> str:
    """Return the hash of what a manifest says."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
