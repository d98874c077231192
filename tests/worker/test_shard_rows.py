"""Rows that are not generated keep the shape of what is computed together."""

from collections.abc import Callable, Hashable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from vcf_batch.records import Reference, Row
from vcf_batch.worker.shard_rows import neutral

TEXTS = st.sampled_from(["", " ", "  ", "a", "b", "c"])
REFERENCES = [Reference("a.png"), Reference("b.png"), Reference(data=b"c")]


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    return [
        Row(
            number,
            str(number),
            draw(TEXTS),
            tuple(draw(st.lists(st.sampled_from(REFERENCES), max_size=3))),
            number,
            draw(st.none() | st.sampled_from(REFERENCES)),
            draw(st.fixed_dictionaries({}, optional={"negative_prompt": TEXTS, "strength": st.just(0.5)})),
        )
        for number in range(100, 100 + draw(st.integers(1, 8)))
    ]


def shape(values: Sequence[Hashable]) -> list[int]:
    """Which of the values are equal."""
    return [values.index(value) for value in values]


def _is_blank(value: Hashable) -> bool:
    return value not in REFERENCES if isinstance(value, Reference) else not str(value).strip()


@given(rows(), st.sets(st.integers(0, 7)), TEXTS)
def test_padding_brings_along_as_many_inputs_and_none_of_its_own(
    whole: list[Row], padding: set[int], run_text: str
) -> None:
    """Every other row's bytes are the same: what is equal stays equal, what differs stays different."""
    found = neutral(whole, padding, run_text)
    live = [position for position in range(len(whole)) if position not in padding]
    assert [found[position] for position in live] == [whole[position] for position in live]

    def texts(rows: list[Row]) -> list[str]:
        return [
            run_text,
            *(text for row in rows for text in (row.prompt, row.overrides.get("negative_prompt", run_text))),
        ]

    def references(rows: list[Row]) -> list[Reference]:
        return [reference for row in rows for reference in row.images]

    kinds: list[Callable[[list[Row]], Sequence[Hashable]]] = [texts, references]
    for of in kinds:
        assert shape(of(found)) == shape(of(whole))
        shared = set(of([whole[position] for position in live]))
        for before, after in zip(of(whole), of(found), strict=True):
            assert before == after if before in shared else _is_blank(after)
    assert [(row.number, row.seed, set(row.overrides)) for row in found] == [
        (row.number, row.seed, set(row.overrides)) for row in whole
    ]
