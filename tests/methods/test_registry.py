import json

import pytest

from tokenexit.errors import ConfigError
from tokenexit.methods import METHODS, PAUMER, Dense, DoViT, DToP, FixedRatio, Truncated, as_method, build_method


def test_build_method__by_name_has_the_defaults():
    assert build_method("dense") == Dense()
    assert build_method("dtop") == DToP()
    assert build_method({"name": "dovit"}) == DoViT()
    assert build_method("paumer") == PAUMER()
    assert build_method("fixed_ratio") == FixedRatio()
    assert build_method("truncated") == Truncated()


def test_build_method__takes_the_methods_own_options_and_lists_as_tuples():
    method = build_method({"name": "dtop", "threshold": [0.9, 0.8], "keep_per_class": 2})
    assert method == DToP((0.9, 0.8), 2)
    assert hash(method) == hash(DToP((0.9, 0.8), 2))


def test_build_method__takes_lists_in_lists_as_they_come_from_json():
    method = DToP((0.9, (0.9, 0.8)), score="margin", temperature=(1.0, 2.0), boundary_guard=True)
    spec = json.loads(json.dumps({"name": "dtop", **vars(method)}))
    assert build_method(spec) == method
    assert hash(build_method(spec)) == hash(method)


def test_build_method__leaves_the_specification_as_it_was():
    spec = {"name": "dtop", "threshold": [0.9]}
    build_method(spec)
    assert spec == {"name": "dtop", "threshold": [0.9]}


def test_build_method__unknown_name_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"method 'tome' is unknown: choose one of dense, dtop, dovit"):
        build_method("tome")
    with pytest.raises(ConfigError, match=r"method 'None' is unknown"):
        build_method({"threshold": 0.5})


def test_build_method__unknown_option_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"method 'dovit' has no option 'k': it takes threshold, .*min_improvement"):
        build_method({"name": "dovit", "k": 3})
    with pytest.raises(ConfigError, match=r"method 'dense' has no option 'threshold': it takes none"):
        build_method({"name": "dense", "threshold": 3})


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (3, r"a method must be a text or a mapping, got 3"),
        ({"name": ["dtop"]}, r"name of a method must be a text or None, got \['dtop'\]"),
        ({"name": "dtop", "keep_per_class": 2.5}, r"keep_per_class of method 'dtop' must be a whole number, got 2.5"),
        ({"name": "dtop", "keep_per_class": 10**23}, r"got 100000000000000000000000, which is too large"),
        ({"name": "dtop", "boundary_guard": 1}, r"boundary_guard of method 'dtop' must be true or false, got 1"),
        ({"name": "dovit", "threshold": {"a": 1}}, r"threshold of method 'dovit' must be a number or a list"),
        ({"name": "gated", "method": "dtop", "closed": "x"}, r"closed of method 'gated' must be a list, each a whole"),
        ({"name": "gated", "method": None, "closed": []}, r"a method must be a text or a mapping, got None"),
        ({"name": "gated"}, r"method 'gated' is unknown"),
    ],
)
def test_build_method__values_of_other_types_are_refused_by_name(spec, words):
    with pytest.raises(ConfigError, match=words):
        build_method(spec)


def test_as_method__leaves_methods_and_builds_the_rest():
    method = DToP(0.5)
    assert as_method(method) is method
    assert as_method("dtop") == DToP()
    assert as_method({"name": "dtop", "threshold": 0.5}) == method


def test_methods__are_named_by_their_own_name():
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}
