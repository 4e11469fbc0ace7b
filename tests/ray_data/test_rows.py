"""What rows ask for, whatever Arrow, pandas and JSON made of them."""

import pytest

pytest.importorskip("ray.data")

import pandas as pd
import pyarrow as pa

from kivi_jax import Completion, GenerationSettings, Output
from kivi_jax.ray_data.rows import (
    COLUMNS,
    Result,
    add_results,
    check_columns,
    read_output,
    read_rows,
    refused,
)

DEFAULTS = GenerationSettings(7, temperature=0.5)


def errors(table: pa.Table) -> list[str]:
    return [row.error for row in read_rows(table, DEFAULTS) if isinstance(row, Result)]


def test_rows_have_settings_of_their_own():
    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "max_new_tokens": [3, None, 5],
            "temperature": [None, 0.0, 1.0],
            "stop": [["x"], None, ["y", "z"]],
            "ignore_eos": [True, None, False],
            "n": [9, 9, 9],  # of theirs, whatever it is
            "other": [1, 2, 3],
        }
    )
    assert read_rows(table, DEFAULTS) == [
        ("a", GenerationSettings(3, temperature=0.5, stop=["x"], ignore_eos=True)),
        ("b", GenerationSettings(7, temperature=0.0)),
        ("c", GenerationSettings(5, temperature=1.0, stop=["y", "z"])),
    ]


def test_whole_numbers_that_pandas_made_floats():
    frame = pd.DataFrame({"prompt": ["a", "b"], "max_new_tokens": [3, None], "top_k": [None, 2]})
    table = pa.Table.from_pandas(frame)
    assert table.schema.field("top_k").type == pa.float64()
    assert read_rows(table, DEFAULTS) == [
        ("a", GenerationSettings(3, temperature=0.5)),
        ("b", GenerationSettings(7, temperature=0.5, top_k=2)),
    ]
    (error,) = errors(pa.table({"prompt": ["a"], "top_k": [2.5]}))
    assert "top_k" in error


def test_messages_lose_the_fields_that_arrow_added():
    messages = [
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": "b", "name": "eve"}, {"role": "assistant", "content": ""}],
    ]
    table = pa.table({"messages": messages})
    assert table.column("messages").to_pylist() != messages
    assert [prompt for prompt, _ in read_rows(table, DEFAULTS)] == messages


def test_rows_that_cannot_be_read_tell_why():
    either = "a row needs either a prompt or messages, and has "
    both = pa.table({"prompt": ["a", None], "messages": [[{"role": "user", "content": "a"}], None]})
    assert errors(both) == [either + "prompt and messages", either + "neither"]
    assert errors(pa.table({"prompt": [3]})) == ["prompt must be a text, got 3"]
    assert errors(pa.table({"messages": ["a"]})) == ["messages must be a list of messages, got 'a'"]
    assert errors(pa.table({"messages": [["a"]]})) == ["a message must have a role and a content, got 'a'"]
    assert errors(pa.table({"prompt": ["a"], "top_p": [1.5]})) == ["top_p must be in (0, 1], got 1.5"]


def test_datasets_that_no_row_of_could_be_done_are_refused():
    with pytest.raises(ValueError, match="rows need a column 'prompt' or 'messages', got 'id', 'text'"):
        check_columns(["id", "text"])
    with pytest.raises(
        ValueError, match="columns 'finish_reason', 'error' already, which results would replace"
    ):
        check_columns(["prompt", "error", "finish_reason"])
    check_columns(["id", "messages"])


def test_results_are_columns_of_one_schema_whether_there_are_errors_or_not():
    good = read_output(Output(3, 4, (Completion("text", [1, 2], "length"),), True))
    assert good == Result("text", "length", 4, 2, "")
    overflowed = read_output(Output(3, 4, (Completion("", [], "error", error="no numbers"),), True))
    assert overflowed == Result("", "error", 4, 0, "no numbers")
    bad = refused(ValueError("prompt 0 is empty; give it at least one token"))
    assert bad == Result(error="the prompt is empty; give it at least one token")
    assert refused(KeyError()).error == "KeyError"
    table = pa.table({"prompt": ["a"]})
    schemas = {
        add_results(part, results).schema
        for part, results in ((table, [good]), (table, [bad]), (table.slice(1), []))
    }
    assert schemas == {pa.schema({"prompt": pa.string(), **COLUMNS})}
    assert COLUMNS["prompt_tokens"] == pa.int64()
    assert COLUMNS["error"] == pa.string()
