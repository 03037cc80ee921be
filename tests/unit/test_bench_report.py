"""Promise: every bench's JSON has one form, and ratios are taken round by round."""

from __future__ import annotations

import io
import json

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from qemu_postcopy.bench.commands import bench_commands, chunk_size, listed, thread_count
from qemu_postcopy.bench.report import Ratio, Report, Result, describe_host
from qemu_postcopy.paging.pager import DEFAULT_CHUNK_SIZE


def example() -> Report:
    report = Report("example", describe_host(), notes=["A note."])
    report.results.append(Result("fast", "faults/s", [3000.0, 1000.0, 2000.0]))
    report.ratios.append(Ratio.by_round("rate", "fast", "slow", [30.0, 10.0, 20.0], [10, 10, 10]))
    return report


def test_the_json_has_the_form_of_every_bench() -> None:
    report = json.loads(json.dumps(example().as_json()))
    assert list(report) == ["bench", "host", "results", "ratios"]
    assert report["results"] == [
        {"name": "fast", "unit": "faults/s", "runs": 3, "min": 1000, "median": 2000, "max": 3000}
    ]
    assert report["ratios"] == [{"name": "rate", "of": "fast", "to": "slow", "median": 2}]


def test_a_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians() -> None:
    ratio = Ratio.by_round("rate", "a", "b", [1.0, 100.0, 9.0], [1.0, 50.0, 3.0])
    assert ratio.as_json()["median"] == 2


def test_sides_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Ratio.by_round("rate", "a", "b", [1.0], [1.0, 2.0])


def test_the_host_is_described() -> None:
    host = describe_host()
    assert set(host) == {
        "cpu",
        "cpus",
        "kernel",
        "architecture",
        "memory",
        "thp",
        "load_average",
    }
    assert host["cpus"] >= 1


def test_the_table_shows_what_was_measured() -> None:
    output = io.StringIO()
    example().print(Console(file=output, width=160))
    text = output.getvalue()
    for part in ("A note.", "fast", "faults/s", "1,000", "2,000", "3,000", "rate", "slow", "2.000"):
        assert part in text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4KiB", 4096),
        ("64k", 65536),
        ("64KB", 65536),
        ("2MiB", 2 << 20),
        ("default", DEFAULT_CHUNK_SIZE),
    ],
)
def test_chunk_sizes(text: str, size: int) -> None:
    assert chunk_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "4", "5KiB", "4MiB", "-4096", "2KiB", "4.5K", "K"])
def test_what_is_not_a_chunk_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a chunk size"):
        chunk_size(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "65", "x", "1.5"])
def test_what_is_not_a_thread_count(text: str) -> None:
    with pytest.raises(ValueError, match="not a number"):
        thread_count(text)


def test_lists_keep_their_order_and_lose_repetitions() -> None:
    context = click.Context(bench_commands)
    option = click.Option(["--threads"])
    assert listed(thread_count)(context, option, "4, 1,4") == (4, 1)


def test_a_bad_list_is_a_usage_error() -> None:
    result = CliRunner().invoke(bench_commands, ["faults", "--chunk", "4K,5K"])
    assert result.exit_code == 2
    assert "5K" in result.output
