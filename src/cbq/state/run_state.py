"""Where a run is: written after preprocessing and after every window, read by the run that goes on.

Shapes: N segments, T tokens, D hidden.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from cbq.activations import ActivationCache
from cbq.errors import InputError
from cbq.evaluation.evaluation import NOT_RECALLED, circumstances
from cbq.evaluation.recall import Recall
from cbq.reconstruction.result import WindowResult
from cbq.reconstruction.window_solver import WindowSolver
from cbq.reconstruction.windows import Window
from cbq.state.blocks import Stage, kinds_of, restore_block_
from cbq.state.generations import DamagedError, Generations, OtherFormatError
from cbq.state.random import random_states, set_random_states
from cbq.streams.kinds import Stream

BYTES_A_FILE = 2**29  # of a stream: what is in memory once more while it is written


class Stateful(Protocol):
    """Part of a run that goes on from where it was."""

    def state_dict(self) -> dict[str, Any]:
        """Return where it is, of JSON's types."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class RunState:
    """What is on disk of a run.

    Blocks have a file each, always of their present stage; both streams are there as they are, because computing them
    again would only nearly agree; so are the random generators.

    Args:
        folder: of the state.
        solver: of the run.
        say: takes a line for the user.
        parts: what else goes on, by name.
        writes: otherwise what is there is gone on from, and nothing is written.

    Attributes:
        found: whether there is something to go on from.
        notes: what `find` has to say, in lines.
    """

    def __init__(
        self,
        folder: Path,
        solver: WindowSolver,
        say: Callable[[str], None],
        parts: Mapping[str, Stateful],
        writes: bool = True,
    ) -> None:
        self.generations = Generations(folder)
        self.solver = solver
        self.say = say
        self.parts = parts
        self.writes = writes
        self.found = False
        self.notes: list[str] = []
        self.identity: dict[str, Any] = {}
        self.unwritten: set[int] = set()  # blocks whose file is not of their present stage

    def find(self, identity: dict[str, Any], wanted: bool) -> None:
        """Look for a state, and take it up but for blocks, streams and random generators.

        Args:
            identity: what decides the result: versions, hashes of the configuration, of the model and of data; and the
                "commit" of cbq, of which another is only said.
            wanted: otherwise there is none to go on from.

        Raises:
            InputError: the state is another model's or version's, or all of it is damaged.
        """
        self.identity = identity
        try:
            found = self.generations.find() if wanted else None
        except DamagedError as error:
            raise damaged(str(error)) from None
        except OtherFormatError as error:
            raise InputError(
                f"the state to go on from was written by another version of cbq ({error}): go on with that one, or "
                "overwrite=true starts anew"
            ) from None
        for line in self.generations.damaged:
            self.notes.append(f"{line}: going on from the state before it")
        if found is None:
            return
        try:
            before = found.facts["identity"]
            differing = {
                key: f"{key} was {before.get(key)}, is {identity.get(key)}"
                for key in sorted(before.keys() | identity.keys())
                if before.get(key) != identity.get(key)
            }
        except (KeyError, TypeError, AttributeError):
            raise damaged("it does not say whose it is") from None
        commit = differing.pop("commit", None)
        if differing:
            raise InputError(
                f"the run in {self.generations.folder.parent} cannot go on, because the result would be another: "
                f"{'; '.join(differing.values())} (overwrite=true starts anew)"
            )
        try:
            for name, part in self.parts.items():
                part.load_state_dict(found.facts["parts"][name])
            self.notes.append(f"going on {self.describe()}")
        except (KeyError, TypeError, AttributeError):
            raise damaged("it does not say how far the run was") from None
        if commit:
            self.notes.append(f"the code of cbq is not what the run was begun with: its {commit}")
        self.found = True

    def recall(self, what: str) -> Recall:
        """Return what remembers scores of this run, so that one that goes on need not measure them again.

        Args:
            what: is measured: the hash of a model, or what is done to the one that the run began with.
        """
        if not self.writes:
            return NOT_RECALLED
        return Recall(self.generations.folder / "scores", (what, *map(str, self.identity.values()), *circumstances()))

    def begin(self, blocks: nn.ModuleList) -> None:
        """Write the blocks as preprocessing left them."""
        self.unwritten = set(range(len(blocks)))
        self._commit(blocks, {}, [], {})

    def recall_(self, cache: ActivationCache) -> list[WindowResult]:
        """Bring blocks, streams and random generators to where they were, if a state was found.

        Args:
            cache: at the first block.

        Returns:
            the windows that are done.

        Raises:
            InputError: a file was damaged since it was looked at.
        """
        if not self.found:
            return []
        generation = self.generations.current
        facts = generation.facts
        try:
            for index, block in enumerate(cache.blocks):
                stage, kinds = facts["stages"].get(str(index), [Stage.PREPARED.value, {}])
                restore_block_(block, Stage(stage), kinds, generation.load(role(index)), self.solver)
            if "streams" in facts:
                positions = facts["streams"]
                cache.put_back(
                    *((positions[name], self._chunks(name)) for name in ("full_precision", "quantized")),
                )
            set_random_states(generation.load("random"), facts["random"])
            return [WindowResult(**result) for result in facts["windows"]]
        except (DamagedError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise damaged(str(error)) from None

    def keep(self, cache: ActivationCache, window: Window, results: list[WindowResult]) -> None:
        """Write what a window changed.

        Args:
            cache: its quantized stream is at window.finished.
            window: the last that was solved; its finished blocks are fused.
            results: of all windows so far.
        """
        self.unwritten |= set(range(window.start, window.stop))
        files = {}
        for name, stream in (("full_precision", cache.full_precision), ("quantized", cache.quantized)):
            files |= {f"{name}-{index:03}": partial(chunk, stream, part) for index, part in enumerate(parts(stream))}
        self._commit(cache.blocks, files, results, self._stages(cache, window), streams_of(cache))

    def describe(self) -> str:
        """Say how far what is written is."""
        if self.generations.current is None:
            return "none was written"
        windows = self.generations.current.facts["windows"]
        return f"after window {len(windows)}" if windows else "after preprocessing, before the first window"

    def discard(self) -> None:
        """Remove the state of a run that is finished."""
        self.generations.discard()

    def _stages(self, cache: ActivationCache, window: Window) -> dict[str, list]:
        """Return, by block, its stage if it is no longer a prepared one, and what `kinds_of` says of it."""
        finished = {str(index): [Stage.FINISHED.value, {}] for index in range(window.finished)}
        overlap = range(window.finished, window.stop)
        return finished | {str(index): [Stage.LEARNED.value, kinds_of(cache.blocks[index])] for index in overlap}

    def _commit(
        self,
        blocks: nn.ModuleList,
        files: dict[str, Callable[[], dict[str, torch.Tensor]]],
        results: list[WindowResult],
        stages: dict[str, list],
        streams: dict[str, Any] | None = None,
    ) -> None:
        """Write a generation with all blocks that are not; where that fails, say so and stay with the one before."""
        if not self.writes:
            return
        tensors, states = random_states()
        facts = {
            "identity": self.identity,
            "windows": [asdict(result) for result in results],
            "stages": stages,
            "random": states,
            **({"streams": streams} if streams else {}),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        changed = {role(index): blocks[index].state_dict for index in sorted(self.unwritten)}
        try:
            self.generations.commit(changed | files | {"random": lambda: tensors}, facts)
            self.unwritten.clear()
        except OSError as error:
            reason = error.strerror or error
            self.say(f"the state was not written ({reason}): a resume would go on from the last that was")

    def _chunks(self, name: str) -> Iterable[torch.Tensor]:
        """Yield the parts of a stream, (B, T, D), in order."""
        generation = self.generations.current
        for file in sorted(file for file in generation.files if file.startswith(f"{name}-")):
            yield generation.load(file)["hidden"]


def damaged(reason: str) -> InputError:
    """Return the error of a state that cannot be gone on from."""
    return InputError(f"the state to go on from is damaged ({reason}): overwrite=true starts anew")


def role(index: int) -> str:
    """Return what the file of a block is called."""
    return f"block-{index:03}"


def parts(stream: Stream) -> list[slice]:
    """Return the segments of each file of a stream."""
    at_once = max(1, BYTES_A_FILE // stream.tensor[0].nbytes)
    return [slice(start, start + at_once) for start in range(0, len(stream), at_once)]


def chunk(stream: Stream, part: slice) -> dict[str, torch.Tensor]:
    """Return what a file of a stream holds."""
    return {"hidden": stream.tensor[part]}


def streams_of(cache: ActivationCache) -> dict[str, int]:
    """Return at which block each stream is."""
    return {"full_precision": cache.full_precision_at, "quantized": cache.quantized_at}
