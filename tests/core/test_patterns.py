"""Regular expressions of users: the grammar of `re`, and an end."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.core.reading import fullmatch, search, substitute

PATTERNS = ["layers", r"layers\.\d+\.", "^model", "proj$", "(q|k)_proj", "(?i)MODEL", r"\bnorm\b", "", "x{2,3}",
            r"(.)\1", "(?P<n>a)(?P=n)", "[^.]+", "(?<=a)b", "a+?b*"]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(pattern=st.sampled_from(PATTERNS), name=st.text("ablayersmodelqk_proj.0123x", max_size=30))
def test_the_same_as_the_standard_library(pattern, name):
    assert bool(search(pattern, name, "x")) == bool(re.search(pattern, name))
    assert bool(fullmatch(pattern, name, "x")) == bool(re.fullmatch(pattern, name))
    assert substitute(pattern, "<>", name, "x") == re.sub(pattern, "<>", name)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*a){20}$", "((a*)*)*b", r"(\w+\s?)+!"])
def test_a_search_has_an_end(pattern):
    start = time.monotonic()
    try:
        assert not search(pattern, "a" * 60 + "?", "train.freeze")
    except BurnishError as error:
        assert "takes too long" in str(error) and "train.freeze" in str(error)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<", "a{2", r"\1", "(?z)", "x" * 5000, "(?<=a*)("])
def test_what_is_no_regular_expression(pattern):
    try:
        re.compile(pattern)
        plain = True
    except re.error:
        plain = False
    if not plain or len(pattern) > 1000:
        with pytest.raises(BurnishError, match="regular expression"):
            search(pattern, "aaa", "--include")


def test_replacements():
    assert substitute(r"old\.(\d)", r"new.\1.\g<1>", "old.3", "--rename") == "new.3.3"
    for wrong in (r"\9", r"\g<nobody>", r"\g<"):
        with pytest.raises(BurnishError, match="no regular expression"):
            substitute("(o)ld", wrong, "old", "--rename")


def test_names_of_tensors_have_an_end_too():
    from burnish.weights.names import check_patterns, match_names, selected

    name, endless = "a" * 200, "(a|a|aa)+$b"
    for call in (lambda: check_patterns([endless], [name], "--include"), lambda: selected(name, (), [endless]),
                 lambda: match_names([name], ["b"], [(endless, "x")])):  # fmt: skip
        with pytest.raises(BurnishError, match="takes too long"):
            call()
