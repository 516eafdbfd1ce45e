"""Names of folders that `conf/` computes."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cbq.cli.resolvers import MAX_SWEEP_NAME, typed_sweep


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["calibration.path=a/b,c"], ["calibration.path=a_b,c"]),
        (["cbd.window=range(1,4)"], ["cbd.window=range(1,5)"]),
        (["model.path=" + "x" * 300, "seed=0,1"], ["model.path=" + "x" * 300, "seed=0,2"]),
        (["seed=0,1"], ["seed=0,1", "quant=w4a4"]),
        ([], ["seed=0,1"]),
        (["~report"], ["report"]),
    ],
    ids=str,
)
def test_another_sweep_has_another_name(first, second):
    names = {typed_sweep(words, ["overwrite"]) for words in (first, second)}
    assert len(names) == 2
    for name in names:
        assert name.isprintable()
        assert 0 < len(name) <= MAX_SWEEP_NAME
        assert not {*"/ '\"\\*?:(){}[]$"} & {*name}


@pytest.mark.parametrize("words", [["seed=0,1", "quant=w4a4"], ["model.path=/a b/c", "seed=range(3)"]], ids=str)
def test_what_decides_no_result_and_the_order_are_not_in_a_name(words):
    hidden = ["overwrite", "tracking.mode"]
    expected = typed_sweep(words, hidden)
    assert typed_sweep([*reversed(words), "overwrite=true", "+tracking.mode=online"], hidden) == expected


def test_a_short_sweep_is_named_as_it_is_typed():
    words = ["cbd.window=1,2", "quant=w4a4,w2a16"]
    assert OverridesParser.create().parse_overrides(words)
    assert typed_sweep(words, []) == ",".join(words)
