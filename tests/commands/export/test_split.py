"""The split of a row follows from its values alone, and equal values stay together."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcf_batch.commands.export.settings import SPLIT_BY
from vcf_batch.commands.export.split import Split, parse
from vcf_batch.errors import UsageError

SHARES = st.lists(st.integers(1, 100), min_size=1, max_size=4).map(
    lambda parts: {f"s{number}": Fraction(part, sum(parts)) for number, part in enumerate(parts)}
)
ROWS = st.lists(
    st.tuples(st.text(max_size=3), st.sampled_from("abcdef"), st.lists(st.sampled_from("uvwxyz"), max_size=2)),
    max_size=12,
)


@settings(max_examples=50)
@given(SHARES, st.sampled_from(SPLIT_BY), ROWS)
def test_equal_values_are_in_one_split(
    shares: dict[str, Fraction], by: str, rows: list[tuple[str, str, list[str]]]
) -> None:
    """Whatever the rows: no prompt, no reference and no key is in two splits, where that is what decides."""
    split = Split(shares, by)
    found: dict[tuple[str, str], set[str]] = {}
    for key, prompt, references in rows:
        place = split.of(key, prompt, references)
        assert place == Split(shares, by).of(key, prompt, references)
        if place is None:
            continue
        assert place in shares
        values = {"key": [key], "prompt": [prompt], "reference": references}
        for column in by.split(","):
            for value in values[column]:
                found.setdefault((column, value), set()).add(place)
    assert all(len(places) == 1 for places in found.values())


@pytest.mark.parametrize("by", SPLIT_BY)
def test_each_split_gets_its_share(by: str) -> None:
    """Of 40,000 rows with every pair of 200 prompts and references, of those that are kept."""
    shares = parse("train=0.7,validation=0.2,test=0.1")
    split = Split(shares, by)
    found = Counter(
        split.of(f"{prompt} {reference}", str(prompt), [str(reference)])
        for prompt, reference in itertools.product(range(200), range(200))
    )
    straddling = found.pop(None, 0)
    assert (straddling > 0) == (by == "prompt,reference")
    total = sum(found.values())
    for name, share in shares.items():
        assert abs(found[name] / total - share) < (0.01 if by == "key" else 0.08), found


def test_a_row_stays_in_its_split() -> None:
    """What an older version said stays true: these are the splits of an export that people have."""
    split = Split(parse("train=0.5,validation=0.5"), "key")
    told = "".join(str(split.of(f"{number:09d}", "", []))[0] for number in range(20))
    assert told == "tvvvttttttttvvttvvvv"


def test_a_row_without_references_goes_by_its_prompt() -> None:
    shares = parse("train=0.5,validation=0.5")
    for prompt in map(str, range(20)):
        assert Split(shares, "reference").of("k", prompt, []) == Split(shares, "prompt").of("k", prompt, [])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train=0.98,validation=0.01", "--split sums to 0.99; the shares must sum to 1, such as train=0.98,validation"),
        ("train=0.3,test=0.7000001", "sums to 1.0000001"),
        ("train", "--split has 'train'; give each split a name of letters, digits and _ and a share"),
        ("train=1,", "--split has ''"),
        ("../up=1", "--split has '../up=1'"),
        ("train=half,test=0.5", "the share of train is 'half'; give a number"),
        ("train=nan", "the share of train is nan; it must be above 0 and at most 1"),
        ("train=0,test=1", "the share of train is 0; it must be above 0"),
        ("train=0.5,train=0.5", "'train' is named twice"),
        ("references=1", "'references' is the folder of references"),
    ],
)
def test_shares_that_are_none_are_refused(text: str, told: str) -> None:
    """With the value, the limit and the remedy."""
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert told in str(caught.value)
