"""Tokenizers against the answers of transformers, and texts that arrive in pieces."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from itertools import chain
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from jaxinfer.chat_template import ChatTemplates
from jaxinfer.errors import RequestError, TokenizerError
from jaxinfer.tokenizer import IncrementalDecoder, Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("tokenizer", "tokenizer-jinja", "tokenizer-bytefallback")
TOKENIZERS = {name: Tokenizer.from_folder(FIXTURES / name) for name in NAMES}
EXPECTED = {name: json.loads((FIXTURES / name / "expected.json").read_text()) for name in NAMES}
CASES = {
    kind: [(name, case) for name in NAMES for case in EXPECTED[name][kind]]
    for kind in ("texts", "decodes", "chats")
}


def made_of(decoder: decoders.Decoder | None) -> Tokenizer:
    """A tokenizer with another decoder; its words are of the kinds that decoders tell apart."""
    words = ["▁", "▁the", "▁cat", "s", "##ing", "dog", "end</w>", ".", "\ufffd", "é", "a "]
    raw = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "s"))
    if decoder is not None:
        raw.decoder = decoder
    return Tokenizer(raw, {}, ChatTemplates({}, "a test"))


DECODERS = {
    "metaspace": made_of(decoders.Metaspace()),
    "wordpiece": made_of(decoders.WordPiece()),
    "bpe": made_of(decoders.BPEDecoder()),
    "none": made_of(None),
}
ALL = {**TOKENIZERS, **DECODERS}


# -- as transformers has it -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), CASES["texts"])
def test_encode_and_decode(name: str, case: dict[str, Any]) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.encode(case["text"]) == case["ids_special"]
    assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
    assert tokenizer.decode(case["ids_special"]) == case["decoded_skip"]
    assert tokenizer.decode(case["ids_special"], skip_special_tokens=False) == case["decoded"]


@pytest.mark.parametrize(("name", "case"), CASES["decodes"])
def test_decode_cut_characters(name: str, case: dict[str, Any]) -> None:
    tokenizer = TOKENIZERS[name]
    for skip, text in ((True, case["decoded_skip"]), (False, case["decoded"])):
        assert tokenizer.decode(case["ids"], skip_special_tokens=skip) == text
        decoder = IncrementalDecoder(tokenizer, [], skip)
        assert "".join(decoder.push([i]) for i in case["ids"]) + decoder.flush() == text


@pytest.mark.parametrize(("name", "case"), CASES["chats"])
def test_chat_template(name: str, case: dict[str, Any]) -> None:
    tokenizer, options = TOKENIZERS[name], {"add_generation_prompt": False, **case["kwargs"]}
    if "error" in case:
        with pytest.raises(RequestError, match=name) as caught:
            tokenizer.apply_chat_template(case["messages"], **options)
        assert case["error"] in str(caught.value)
    else:
        text = tokenizer.apply_chat_template(case["messages"], **options)
        assert text == case["prompt"]
        assert tokenizer.encode(text, add_special_tokens=False) == case["ids"]


def test_facts() -> None:
    tokenizer = TOKENIZERS["tokenizer"]
    assert tokenizer.vocab_size == 402
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (4,))
    assert tokenizer.special_tokens["pad_token"] == "<|pad|>"
    # In objects, as transformers 4 wrote them.
    fallback = TOKENIZERS["tokenizer-bytefallback"]
    assert (fallback.bos_token_id, fallback.eos_token_ids) == (1, (2,))


def test_ends_of_the_generation_config_count(tmp_path: Path) -> None:
    folder = copied("tokenizer", tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    assert Tokenizer.from_folder(folder).eos_token_ids == (4, 2)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert Tokenizer.from_folder(folder).eos_token_ids == (4, 2)


def test_token_text_keeps_leading_spaces() -> None:
    for name in ("tokenizer", "tokenizer-bytefallback", "metaspace"):
        tokenizer = ALL[name]
        (token,) = [i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i) == " the"][:1]
        assert tokenizer.token_text(token) == " the"
    assert TOKENIZERS["tokenizer"].token_text(1) == "<|bos|>"
    assert TOKENIZERS["tokenizer-bytefallback"].token_text(3 + ord("\n")) == "\n"
    assert TOKENIZERS["tokenizer-bytefallback"].token_text(3 + 0xE6) == "\ufffd"


def test_a_lone_surrogate_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        TOKENIZERS["tokenizer"].encode("a\ud83d")


# -- incremental decode -----------------------------------------------------------------------


def continuation(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> str:
    """What ids add to the text of the prompt, decoded at once."""
    before, whole = tokenizer.decode(prompt, skip), tokenizer.decode([*prompt, *ids], skip)
    return whole[len(commonprefix([before, whole])) :]  # noqa: RUF071  # no paths


@st.composite
def pieces(draw: st.DrawFn, tokenizer: Tokenizer) -> tuple[list[int], list[list[int]], bool]:
    """Prompt, output in pieces, skip_special_tokens; ids of texts, of single bytes, or any."""
    some = st.integers(0, tokenizer.vocab_size + 2)  # the last ones are unknown
    text = st.text(max_size=8).map(lambda t: tokenizer.encode(t, add_special_tokens=False))
    run = st.lists(st.sampled_from(CUT_BYTES[id(tokenizer)]) | some, max_size=8)
    ids = st.lists(text | run, max_size=4).map(lambda parts: list(chain(*parts)))
    output = draw(ids)
    cuts = sorted(draw(st.lists(st.integers(0, len(output)), max_size=len(output))))
    parts = [output[a:b] for a, b in zip([0, *cuts], [*cuts, len(output)], strict=True)]
    if draw(st.booleans()):
        parts = [[token] for token in output]
    return draw(ids), parts, draw(st.booleans())


# Ids that make up the characters of a few bytes, to be strewn.
CUT_BYTES = {
    id(t): sorted({*t.encode("é😀龘\n\ufffdx 🇫", add_special_tokens=False), 0})
    for t in ALL.values()
}


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_pieces_join_to_the_whole(name: str, data: st.DataObject) -> None:
    tokenizer = ALL[name]
    prompt, parts, skip = data.draw(pieces(tokenizer))
    decoder = IncrementalDecoder(tokenizer, prompt, skip)
    shown, given_ = "", []
    for part in parts:
        shown += decoder.push(part)
        given_ += part
        so_far = continuation(tokenizer, prompt, given_, skip)
        assert shown + decoder.pending == so_far
    assert shown + decoder.flush() == continuation(tokenizer, prompt, given_, skip)
    assert decoder.flush() == decoder.pending == ""


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(), prompt=st.text(max_size=5))
def test_text_comes_out_whole_and_without_replacements(name: str, text: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    text, prompt = text.replace("\ufffd", ""), "say:" + prompt.replace("\ufffd", "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoder = IncrementalDecoder(tokenizer, tokenizer.encode(prompt), False)
    shown = [decoder.push([token]) for token in ids] + [decoder.flush()]
    assert not any("\ufffd" in piece for piece in shown)
    if name == "tokenizer-bytefallback" and text:
        text = " " + text  # this one puts a space before every text it encodes
        text = text.replace("▁", " ")
    assert "".join(shown) == text


def test_emoji_over_several_tokens_comes_at_once() -> None:
    tokenizer = TOKENIZERS["tokenizer"]
    ids = tokenizer.encode("😀", add_special_tokens=False)
    assert len(ids) > 1
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push([token]) for token in ids] == [""] * (len(ids) - 1) + ["😀"]


def test_a_character_cut_by_the_prompt_comes_whole() -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode("x😀", add_special_tokens=False)
        decoder = IncrementalDecoder(tokenizer, ids[:-1])
        assert decoder.push(ids[-1:]) + decoder.flush() == "😀"


def test_a_newline_token_is_pending_until_its_run_ends() -> None:
    tokenizer = TOKENIZERS["tokenizer-bytefallback"]
    decoder = IncrementalDecoder(tokenizer, tokenizer.encode("x"))
    assert decoder.push([3 + ord("\n")]) == ""
    assert decoder.pending == "\n"
    assert decoder.push(tokenizer.encode("the", add_special_tokens=False)[:1]).startswith("\n")


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer-bytefallback"])
def test_work_per_token_does_not_grow(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    decoded = 0

    class Counting(IncrementalDecoder):
        def _text(self, ids: Any) -> str:
            nonlocal decoded
            decoded += len(ids)
            return super()._text(ids)

    bad = tokenizer.encode("😀", add_special_tokens=False)[-1]
    text = tokenizer.encode("the 東京 question 👩‍👧", add_special_tokens=False)
    decoder = Counting(tokenizer, text * 100)
    start = time.monotonic()
    for count in (100, 10_000):
        decoded = 0
        for _ in range(count // 10):
            for token in [*text[:5], *[bad] * 5]:
                decoder.push([token])
        assert decoded < 10 * count
    for _ in range(10_000):  # nothing but bytes that are no character
        decoder.push([bad])
    assert decoded < 200_000
    assert time.monotonic() - start < 20


# -- folders ----------------------------------------------------------------------------------


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "tokenizer.json is missing: get it"),
        ({"tokenizer.model": "x"}, "only tokenizer.model; convert it once with transformers"),
        ({"vocab.json": "{}", "merges.txt": ""}, "only vocab.json; convert"),
        ({"tokenizer.json": '{"version": "1.0"'}, "tokenizer.json cannot be read, get it anew"),
        ({"tokenizer.json": "version https://git-lfs"}, "tokenizer.json cannot be read"),
        ({"tokenizer.json": b"\xff\xfe"}, "tokenizer.json cannot be read"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json is no valid JSON"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json must hold a JSON object"),
    ],
)
def test_bad_folders(files: dict[str, str | bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"missing: there is no such folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")


def change_config(folder: Path, **changes: Any) -> Tokenizer:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return Tokenizer.from_folder(folder)


MESSAGES = [{"role": "user", "content": "Hi"}]


def test_named_templates(tmp_path: Path) -> None:
    folder = copied("tokenizer", tmp_path)
    named = [
        {"name": "default", "template": "plain {{ messages[0].content }}"},
        {"name": "tool_use", "template": "tools {{ tools | tojson }}"},
    ]
    tokenizer = change_config(folder, chat_template=named)
    assert tokenizer.apply_chat_template(MESSAGES) == "plain Hi"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{"a": "é<"}]) == 'tools [{"a": "é<"}]'
    tokenizer = change_config(folder, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(TokenizerError, match="no chat template called 'default' but rag"):
        tokenizer.apply_chat_template(MESSAGES)


def test_no_template(tmp_path: Path) -> None:
    tokenizer = change_config(copied("tokenizer", tmp_path), chat_template=None)
    with pytest.raises(TokenizerError, match=r"no chat template: give a plain prompt, or put"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", "is broken at line 2"),
        ("{{ raise_exception('no ' + messages[0].role) }}", "refuses the messages: no user"),
        ("{{ messages[0].nothing.deeper }}", "refuses the messages: .*has no attribute 'nothing'"),
        ("{{ 1 + 'a' }}", "refuses the messages: unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses the messages: .*unsafe|is not safely callable"),
    ],
)
def test_templates_that_fail(template: str, message: str) -> None:
    with pytest.raises((RequestError, TokenizerError), match=message) as caught:
        ChatTemplates({"default": template}, "here").render(MESSAGES, add_generation_prompt=True)
    assert caught.type is (RequestError if "refuses" in message else TokenizerError)


def test_generation_blocks_pass_their_text_on() -> None:
    source = "{% generation %}{{ messages[0].content }}!{% endgeneration %}"
    templates = ChatTemplates({"default": source}, "here")
    assert templates.render(MESSAGES, add_generation_prompt=True) == "Hi!"


def test_tokens_that_only_the_config_knows(tmp_path: Path) -> None:
    folder = copied("tokenizer-jinja", tmp_path)
    more = {"402": {"content": "<|tool|>", "special": True, "normalized": False}}
    tokenizer = change_config(folder, added_tokens_decoder=more)
    assert tokenizer.encode("<|tool|>", add_special_tokens=False) == [402]
    assert tokenizer.decode([402]) == ""
    more["409"] = more.pop("402")
    with pytest.raises(TokenizerError, match=r"the id 409, but tokenizer.json makes it 402"):
        change_config(folder, added_tokens_decoder=more)


GOOD = {"content": "<|tool|>", "special": True}


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([GOOD], "must be an object of ids and tokens, not list"),
        ("<|tool|>", "must be an object of ids and tokens, not str"),
        ({"4o2": GOOD}, "has '4o2' where an id should be"),
        ({"-1": GOOD}, "has '-1' where an id should be"),
        ({"402": "<|tool|>"}, r'\["402"\] must be an object whose "content" is a text'),
        ({"402": None}, r'\["402"\] must be an object whose "content" is a text'),
        ({"402": {"special": True}}, r'\["402"\] must be an object whose "content" is a text'),
        ({"402": {"content": 5}}, r'\["402"\] must be an object whose "content" is a text'),
        ({"402": GOOD, "403": {**GOOD, "special": "yes"}}, r'\["403"\] is no token'),
        ({"402": {"content": "\ud83d"}}, r'\["402"\] is no token'),
    ],
)
def test_corrupt_added_tokens_are_named(listed: Any, message: str, tmp_path: Path) -> None:
    folder = copied("tokenizer-jinja", tmp_path)
    where = r"tokenizer_config.json: added_tokens_decoder ?"
    with pytest.raises(TokenizerError, match=where + message) as caught:
        change_config(folder, added_tokens_decoder=listed)
    assert "get the file anew" in str(caught.value)


def test_special_tokens_named_only_in_the_config_are_skipped(tmp_path: Path) -> None:
    word = TOKENIZERS["tokenizer-jinja"].token_text(344)
    tokenizer = change_config(copied("tokenizer-jinja", tmp_path), eos_token=word)
    assert tokenizer.eos_token_ids == (344,)
    assert tokenizer.decode([344]) == ""
    assert tokenizer.decode([344], skip_special_tokens=False) == word
    assert change_config(tmp_path / "tokenizer-jinja", eos_token="<none>").eos_token_ids == ()


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    folder = copied("tokenizer", tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    raw.save(str(folder / "tokenizer.json"))
    text = "the capital of the question"
    assert Tokenizer.from_folder(folder).encode(text) == TOKENIZERS["tokenizer"].encode(text)


def test_import_is_light() -> None:
    script = "import sys, jaxinfer.tokenizer; print(sorted({'jax', 'jinja2'} & set(sys.modules)))"
    command = [sys.executable, "-c", script]
    root = FIXTURES.parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "templates", [7, [7], [{"name": "default"}], [{"template": "{{ 1 }}"}], {"default": 7}]
)
def test_corrupt_chat_templates_are_named(templates: Any, tmp_path: Path) -> None:
    folder = copied("tokenizer-jinja", tmp_path)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json: chat_template must be"):
        change_config(folder, chat_template=templates)


@pytest.mark.parametrize("ends", ["</s>", [1, "2"], {"id": 1}, 1.5])
def test_ends_that_are_no_ids_are_named(ends: Any, tmp_path: Path) -> None:
    folder = copied("tokenizer-jinja", tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(TokenizerError, match=r"generation_config.json: eos_token_id must be"):
        Tokenizer.from_folder(folder)
