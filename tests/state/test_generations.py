"""Generations on disk: one is there as a whole, or the one before it is."""

import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from cbq.errors import InputError
from cbq.state import generations
from cbq.state.generations import DamagedError, Generations, OtherFormatError
from cbq.state.run_state import RunState


def tensors(value: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((3, 5), float(value)), "y": torch.tensor([value], dtype=torch.uint8)}


def commit(store: Generations, number: int) -> None:
    """Make generation `number`: "a" is always new, "b" in the first only, "c" comes with the second and goes again."""
    changed = {"a": lambda: tensors(number)} | ({"b": lambda: tensors(100)} if number == 1 else {})
    changed |= {"c": lambda: tensors(number)} if number == 2 else {}
    store.commit(changed, {"number": number}, dropped=["c"] if number > 2 else [])


@pytest.fixture
def store(tmp_path) -> Generations:
    """Three generations."""
    store = Generations(tmp_path / "state")
    for number in (1, 2, 3):
        commit(store, number)
    return store


def check(folder: Path, number: int) -> Generations:
    """The generation that is found is `number`, whole."""
    found = Generations(folder)
    assert found.find().facts == {"number": number}
    for name, value in {"a": number, "b": 100, **({"c": 2} if number == 2 else {})}.items():
        loaded = found.current.load(name)
        assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors(value).items())
        assert loaded["x"].dtype == torch.float32
    assert set(found.current.files) == ({"a", "b", "c"} if number == 2 else {"a", "b"})
    return found


def test_the_newest_is_found_and_two_are_kept(store):
    assert check(store.folder, 3).damaged == []
    names = sorted(path.name for path in store.folder.iterdir())
    files = ["a.2.safetensors", "a.3.safetensors", "b.1.safetensors", "c.2.safetensors"]
    assert names == [*files, "state.2.json", "state.3.json"]


def test_none(tmp_path):
    assert Generations(tmp_path / "nowhere").find() is None
    (tmp_path / "notes.txt").write_text("mine")
    assert Generations(tmp_path).find() is None


def flip(path: Path) -> None:
    """Change one bit somewhere."""
    content = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(len(content))
    content[place] ^= 1 << random.Random(place).randrange(8)
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["a.3.safetensors", "state.3.json"])
def test_damage_to_the_newest_leaves_the_one_before(store, name, damage):
    DAMAGES[damage](store.folder / name)
    found = check(store.folder, 2)
    if (damage, name) == ("deleted", "state.3.json"):  # nothing says that it was there
        assert found.damaged == []
    else:
        assert len(found.damaged) == 1
        assert name in found.damaged[0]
    commit(found, 4)
    check(store.folder, 4)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_what_both_share_is_said(store, damage):
    DAMAGES[damage](store.folder / "b.1.safetensors")
    before = sorted(store.folder.iterdir())
    with pytest.raises(DamagedError, match=r"b\.1\.safetensors (was changed|is missing)"):
        Generations(store.folder).find()
    assert sorted(store.folder.iterdir()) == before, "nothing is removed"


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"content": 3, "hash": ""}', "\x00"])
def test_a_manifest_that_is_none(store, text):
    (store.folder / "state.3.json").write_text(text)
    check(store.folder, 2)


def test_a_manifest_cannot_name_files_elsewhere(store, tmp_path):
    (tmp_path / "a.3.safetensors").write_bytes((store.folder / "a.3.safetensors").read_bytes())
    content = {"format_version": 1, "files": dict(store.current.files), "facts": {}}
    content["files"]["a"] = content["files"]["a"] | {"file": "../a.3.safetensors"}
    generations.write_text(
        store.folder / "state.3.json",
        generations.json.dumps({"hash": generations.hash_content(content), "content": content}),
    )
    check(store.folder, 2)


def test_another_format_is_no_damage_and_stays(store):
    """The one before it is not gone on from: the next commit would remove the newest."""
    path = store.folder / "state.3.json"
    content = generations.json.loads(path.read_text())["content"] | {"format_version": 2}
    generations.write_text(
        path, generations.json.dumps({"hash": generations.hash_content(content), "content": content})
    )
    before = {path: path.read_bytes() for path in store.folder.iterdir()}
    with pytest.raises(OtherFormatError, match=r"state\.3\.json has format 2, this one reads 1"):
        Generations(store.folder).find()
    state = RunState(store.folder, None, print, {})
    with pytest.raises(InputError, match=r"written by another version of cbq \(.*\): .* overwrite=true starts anew"):
        state.find({}, wanted=True)
    assert {path: path.read_bytes() for path in store.folder.iterdir()} == before
    state.find({}, wanted=False)  # as with overwrite=true


@pytest.mark.parametrize("failing", ["a", "c"])
def test_a_full_disk_keeps_what_is_there(store, monkeypatch, failing):
    def full(path: Path, tensors: dict) -> None:
        if f".{failing}." in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(path, tensors)

    save = generations.write_tensors
    with monkeypatch.context() as patch:
        patch.setattr(generations, "write_tensors", full)
        with pytest.raises(OSError, match="No space left"):
            store.commit({"a": lambda: tensors(4), "c": lambda: tensors(4)}, {"number": 4})
    assert store.current.facts == {"number": 3}
    assert not [path for path in store.folder.iterdir() if ".4." in path.name]
    check(store.folder, 3)
    commit(store, 4)
    check(store.folder, 4)


def test_killed_at_any_moment_of_a_commit(store, monkeypatch):
    """Whatever is left is the old generation or the new one, and the next commit works."""
    seen, real = [], {"replace": os.replace, "fsync": os.fsync, "unlink": Path.unlink}

    def dying(name: str, moment: int):
        def call(*args, **kwargs):
            seen.append(name)
            if len(seen) == moment:
                raise SystemExit  # a kill, as far as the disk can tell: nothing more is done
            if len(seen) < moment:
                return real[name](*args, **kwargs)

        return call

    newest = 3
    for moment in range(1, 30):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying("replace", moment))
            patch.setattr(os, "fsync", dying("fsync", moment))
            patch.setattr(Path, "unlink", dying("unlink", moment))
            dead = Generations(store.folder)
            dead.find()
            with suppress(SystemExit):
                dead.commit({"a": lambda newest=newest: tensors(newest + 1)}, {"number": newest + 1})
        left = Generations(store.folder).find().facts["number"]
        assert left in (newest, newest + 1)
        newest = left
        check(store.folder, newest)
        if len(seen) < moment:
            break
    assert moment > 8, "the kill was tried at every step"
    commit(check(store.folder, newest), newest + 1)
    assert not [path for path in store.folder.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(22, "Invalid argument")], ids=["ctrl-c", "einval"])
def test_interrupted_at_any_moment_of_a_commit(store, monkeypatch, error):
    """Not killed: what is cleaned up then is nothing that the newest manifest names."""
    real, newest = {"replace": os.replace, "fsync": os.fsync}, 3
    for moment in range(1, 30):
        seen = []

        def failing(name: str, seen: list = seen, moment: int = moment):
            def call(*args, **kwargs):
                result = real[name](*args, **kwargs)
                seen.append(name)
                if len(seen) == moment:
                    raise error
                return result

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing("replace"))
            patch.setattr(os, "fsync", failing("fsync"))
            again = Generations(store.folder)
            again.find()
            with suppress(KeyboardInterrupt, OSError):
                again.commit({"a": lambda newest=newest: tensors(newest + 1)}, {"number": newest + 1})
        found = Generations(store.folder).find()
        assert found.facts["number"] in (newest, newest + 1)
        assert Generations(store.folder).damaged == []
        newest = found.facts["number"]
        check(store.folder, newest)
        if len(seen) < moment:
            break
    assert moment > 5


def test_a_state_behind_a_link_is_removed(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "scratch")
    store = Generations(tmp_path / "state")
    commit(store, 1)
    store.discard()
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "scratch"])


def test_tensors_of_a_larger_memory(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    store = Generations(tmp_path)
    store.commit({"part": lambda: {"row": whole[1], "column": whole[:, 2], "none": whole[:0]}}, {})
    loaded = Generations(tmp_path).find().load("part")
    assert loaded["row"].tolist() == [4, 5, 6, 7]
    assert loaded["column"].tolist() == [2, 6, 10]
    assert loaded["none"].shape == (0, 4)
