"""Attributes that objects have for a while."""

from types import SimpleNamespace

import pytest

from cbq.attributes import temporarily


def test_each_object_gets_back_its_own():
    objects = [SimpleNamespace(kind=kind) for kind in "ab"]
    with temporarily((one for one in objects), "kind", "c"):
        assert [one.kind for one in objects] == ["c", "c"]
        with temporarily(objects[:1], "kind", "d"):
            assert [one.kind for one in objects] == ["d", "c"]
        assert [one.kind for one in objects] == ["c", "c"]
    assert [one.kind for one in objects] == ["a", "b"]


def test_also_after_an_error():
    one = SimpleNamespace(kind="a")
    with pytest.raises(ZeroDivisionError), temporarily([one], "kind", "c"):
        raise ZeroDivisionError
    assert one.kind == "a"


def test_an_attribute_that_is_not_there_changes_nothing():
    objects = [SimpleNamespace(kind="a"), SimpleNamespace()]
    with pytest.raises(AttributeError, match="kind"), temporarily(objects, "kind", "c"):
        pass
    assert objects[0].kind == "a"
