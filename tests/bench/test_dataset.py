"""Data sets: what is read, what is refused and how it is named; what prepare-dataset writes."""

import json
import statistics

import pytest

from jaxinfer.bench import dataset
from jaxinfer.bench.__main__ import main
from jaxinfer.errors import DatasetError
from jaxinfer.tokenizer import Tokenizer

GOOD = {"task_id": 7, "input_ids": [1, 2, 3], "output_tokens": 4}


@pytest.fixture
def file(tmp_path):
    def write(*lines):
        path = tmp_path / "data.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        return path

    return write


def test_ids_win_over_the_prompt_and_names_default_to_the_place(file):
    path = file(
        GOOD,
        {"prompt": "text", "input_ids": [5], "output_tokens": 1},
        "",
        {"prompt": "ab", "output_tokens": 2},
    )
    data = dataset.read(path, encode=lambda text: [ord(c) for c in text])
    assert [(item.task_id, item.input_ids) for item in data.items] == [
        (7, [1, 2, 3]), (1, [5]), (3, [97, 98]),
    ]  # fmt: skip
    assert data.skipped == []
    assert [item.task_id for item in dataset.read(path, num_requests=2).items] == [7, 1]


BAD = {
    "{nonsense": "property name",
    "[1, 2]": "must be a JSON object",
    "[" * 100_000: "maximum recursion depth",
    '{"input_ids": [1]}': "output_tokens must be a whole number above 0, got None",
    '{"input_ids": [1], "output_tokens": 0}': "above 0, got 0",
    '{"input_ids": [], "output_tokens": 1}': "the prompt has no tokens",
    '{"input_ids": [-1], "output_tokens": 1}': "whole numbers from 0",
    '{"output_tokens": 1}': "needs prompt or input_ids",
    '{"prompt": 3, "output_tokens": 1}': "prompt must be a string, got 3",
    '{"prompt": "x", "output_tokens": 1}': "there is no tokenizer: set --tokenizer",
    '{"input_ids": [1], "output_token": 1}': "did you mean 'output_tokens'",
    '{"task_id": true, "input_ids": [1], "output_tokens": 1}': "task_id must be",
    '{"task_id": 7, "input_ids": [1], "output_tokens": 1}': "task_id 7 comes twice",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named_and_skipped_only_on_demand(file, line):
    path = file(GOOD, line, {**GOOD, "task_id": 8})
    with pytest.raises(DatasetError) as caught:
        dataset.read(path)
    assert f"{path}, line 2: " in str(caught.value)
    assert BAD[line] in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    data = dataset.read(path, skip_bad=True)
    assert [item.task_id for item in data.items] == [7, 8]
    assert [fault.split(": ")[0] for fault in data.skipped] == [f"{path}, line 2"]


def test_no_requests_is_an_error_with_the_remedy(file, tmp_path):
    for path, words in ((file(), "has no requests"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(DatasetError, match=words) as caught:
            dataset.read(path)
        assert "prepare-dataset" in str(caught.value)
    with pytest.raises(DatasetError, match="1 bad lines were skipped"):
        dataset.read(file("{}"), skip_bad=True)
    with pytest.raises(DatasetError, match="has 1 usable requests, fewer than --num-requests 2"):
        dataset.read(file(GOOD), num_requests=2)


def test_what_the_engine_cannot_serve_is_a_bad_line(file):
    data = dataset.read(file(GOOD, {**GOOD, "task_id": 8, "output_tokens": 99}))
    with pytest.raises(DatasetError, match=r"line 2: 3 prompt and 99 output tokens exceed max_seq"):
        dataset.keep_servable(data, 64, 100)
    kept = dataset.keep_servable(data, 64, 100, skip_bad=True)
    assert [item.task_id for item in kept.items] == [7]
    assert len(kept.skipped) == 1
    with pytest.raises(DatasetError, match=r"line 1: input_ids has 3, .* vocabulary is 0 … 2"):
        dataset.keep_servable(data, 1000, 3)


def test_the_shipped_data_set_is_sound(fixtures):
    data = dataset.read(dataset.SHIPPED)
    assert len(data.items) == 256
    assert dataset.SHIPPED.stat().st_size <= 300_000
    dataset.keep_servable(data, 2048, 4096)
    lengths = [len(item.input_ids) for item in data.items]
    # Long-tailed: the mean lies well above the median.  README.md beside it has both.
    assert statistics.mean(lengths) > 1.5 * statistics.median(lengths)
    words = (dataset.SHIPPED.parent / "README.md").read_text()
    outputs = [item.output_tokens for item in data.items]
    for values in (lengths, outputs):
        assert f"| {statistics.mean(values):.1f} | {statistics.median(values):g} |" in words
    tokenizer = Tokenizer.from_folder(dataset.SHIPPED.parents[2] / "demo" / "model")
    text = "".join(tokenizer.decode(item.input_ids) for item in data.items)
    assert text.count("self.") > 100
    assert "def " in text


# -- prepare-dataset --------------------------------------------------------------------------

NORM = [
    "token-norm-dist",
    "--num-requests",
    "400",
    "--input-mean",
    "50",
    "--input-stdev",
    "10",
    "--output-mean",
    "20",
    "--output-stdev",
    "5",
]
UNIF = [
    "token-unif-dist",
    "--num-requests",
    "400",
    "--input-min",
    "5",
    "--input-max",
    "9",
    "--output-min",
    "1",
    "--output-max",
    "3",
]


def prepare(capsys, *words):
    assert main(["prepare-dataset", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [NORM, UNIF])
def test_the_same_seed_gives_the_same_lines(capsys, tmp_path, words):
    one = prepare(capsys, *words, "--vocab-size", "100", "--seed", "3")
    assert one == prepare(capsys, *words, "--vocab_size", "100", "--random_seed", "3")
    assert one != prepare(capsys, *words, "--vocab-size", "100", "--seed", "4")
    prepare(capsys, *words, "--vocab-size", "100", "--seed=3", "--output", str(tmp_path / "o"))
    assert (tmp_path / "o").read_text() == one
    assert len(dataset.read(tmp_path / "o").items) == 400


def test_lengths_and_tokens_are_distributed_as_asked(capsys, tmp_path):
    prepare(capsys, *NORM, "--vocab-size", "100", "--output", str(tmp_path / "o"))
    items = dataset.read(tmp_path / "o").items
    lengths = [len(item.input_ids) for item in items]
    assert statistics.mean(lengths) == pytest.approx(50, abs=2)  # four standard errors
    assert statistics.stdev(lengths) == pytest.approx(10, abs=1.5)
    assert {token for item in items for token in item.input_ids} == set(range(100))
    prepare(capsys, *UNIF, "--tokenizer", "demo", "--output", str(tmp_path / "o"))
    items = dataset.read(tmp_path / "o").items
    assert {len(item.input_ids) for item in items} == {5, 6, 7, 8, 9}
    assert {item.output_tokens for item in items} == {1, 2, 3}
    assert 4000 < max(max(item.input_ids) for item in items) < 4096


def test_real_prompts_are_pieces_of_the_text(capsys, tmp_path):
    text = "".join(f"def function_{i}(x):\n    return x + {i}\n\n" for i in range(200))
    (tmp_path / "code.py").write_text(text)
    words = (
        f"real --text {tmp_path} --tokenizer demo --num-requests 300 --input-mean 20 "
        "--input-stdev 20 --input-max 100 --output-mean 9 --output-stdev 0"
    ).split()
    tokenizer = Tokenizer.from_folder(dataset.SHIPPED.parents[2] / "demo" / "model")
    lengths = []
    for line in prepare(capsys, *words).splitlines():
        record = json.loads(line)
        piece = tokenizer.decode(record["input_ids"])
        assert piece in text
        assert text[text.index(piece) - 1] in "\n" or text.startswith(piece)
        assert record["output_tokens"] == 9
        lengths.append(len(record["input_ids"]))
    assert max(lengths) <= 100
    # A log-normal with mean = deviation has its median at mean/√2.
    assert statistics.median(lengths) == pytest.approx(20 / 2**0.5, abs=3)
    assert json.loads(prepare(capsys, *words, "--write", "prompt").splitlines()[0])["prompt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*NORM], "give --vocab-size, or --tokenizer"),
        ([*NORM, "--vocab-size", "0"], "--vocab-size must be at least 1"),
        ([*NORM, "--num-requests", "0"], "--num-requests must be at least 1"),
        ([*NORM, "--vocab-size", "9", "--input-mean", "0"], "--input-mean must be at least 1"),
        ([*UNIF, "--vocab-size", "9", "--output-max", "0"], "--output-min must be at least 1"),
        ([*NORM, "--tokenizer", "/none"], "/none"),
        ([*NORM, "--vocab-size", "9", "--input-mean", "inf"], "--input-mean must be at least 1"),
        ([*NORM, "--vocab-size", "9", "--output-mean", "1e20"], "both at most 2147483647"),
        ([*UNIF, "--vocab-size", "9", "--output-max", str(2**40)], "that at most 2147483647"),
    ],
)
def test_senseless_options_are_refused(capsys, words, message):
    assert main(["prepare-dataset", *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_seed_is_no_negative_number(capsys):
    with pytest.raises(SystemExit):
        main(["prepare-dataset", *NORM, "--vocab-size", "9", "--seed", "-1"])
    assert "--random-seed: must be 0 or more, got -1" in capsys.readouterr().err
