"""The begin-of-sequence token of GGUF files: real files, loaded by Transformers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import transformers

from attnhook.analysis import probes
from attnhook.backends.transformers import bos, runner
from attnhook.errors import OptionError
from attnhook.probing.targets import LocalTarget
from attnhook.record.answer import SINK
from tests.backends.tiny_gguf import BOS, write

PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
ASK = [{"role": "user", "content": "the cat"}]


def load(path: Path, **metadata: object) -> runner.Loaded:
    return runner.load(str(write(path / "tiny.gguf", **metadata)), "float32", "cpu")


def test_a_text_begins_with_it_where_the_file_says_so(tmp_path):
    loaded = load(tmp_path, add_bos_token=True)
    own = loaded.tokenizer("the cat")["input_ids"]
    learned = own[0] == BOS  # as in 5.24; it is still once
    assert not learned or transformers.__version__ != "5.19.0"
    own = own[learned:]
    assert BOS not in own
    assert loaded.encode_text("the cat") == [BOS, *own]
    assert runner.encode(loaded, "the cat", chat=True, max_new_tokens=1) == [BOS, *own]
    assert loaded.encode_text("<bos>the cat") == [BOS, *own]  # who writes it out gets no second one
    with pytest.raises(OptionError, match="the prompt is empty"):
        runner.encode(loaded, " ", chat=True, max_new_tokens=1)


def test_the_records_begin_with_it(tmp_path):
    loaded = load(tmp_path, add_bos_token=True)
    ids = loaded.encode_text("the cat sat")
    answer = runner.answer(loaded, ids, max_new_tokens=2, layers="all", prompt=True)
    assert answer.tokens[0] == "<bos>" and answer.prompt_length == len(ids)
    assert sorted(record.query_position for record in answer.records) == list(range(len(ids) + 1))


def test_not_where_the_file_says_no_and_by_llama_cpps_default_where_it_says_nothing(tmp_path):
    no, silent = tmp_path / "no", tmp_path / "silent"
    no.mkdir(), silent.mkdir()
    assert load(no, add_bos_token=False).encode_text("the cat")[0] != BOS
    assert load(silent).encode_text("the cat")[0] == BOS  # SentencePiece


@pytest.mark.parametrize("template", ["{{ bos_token }}" + PLAIN, "{{ bos_token }}{{ bos_token }}" + PLAIN, PLAIN])
def test_a_chat_begins_with_it_once_whatever_its_template_writes(tmp_path, template):
    loaded = load(tmp_path, add_bos_token=True, chat_template=template)
    ids = loaded.encode_chat(ASK)
    assert ids == runner.encode(loaded, "the cat", chat=True, max_new_tokens=1)
    assert ids[0] == BOS and ids.count(BOS) == 1
    assert loaded.tokenizer.decode(ids[1:]) == "user: the cat\n"


def test_a_template_that_writes_it_is_left_alone_where_the_file_says_no(tmp_path):
    ids = load(tmp_path, add_bos_token=False, chat_template="{{ bos_token }}" + PLAIN).encode_chat(ASK)
    assert ids[0] == BOS and ids.count(BOS) == 1


def test_probes_begin_with_it_and_have_their_distances(tmp_path):
    target = LocalTarget(str(write(tmp_path / "tiny.gguf", add_bos_token=True)), "float32", "cpu")
    assert target.identity["bos"] == BOS
    (probe,) = probes.select(["grammar"], 1)
    prompt = probes.build(probe, target.count)
    outcome = target.run(prompt, 2, {"layers": (0, 1), "top_k": 4, "prompt": True})
    assert prompt.tokens == len(outcome.records) - 1
    names = outcome.records[0].span_names
    assert np.allclose(outcome.records[0].span_mass[:, names.index(SINK)], 1)  # position 0 sees itself only


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"tokenizer.ggml.model": "llama"}, True),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": False}, False),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}, False),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.add_bos_token": True}, True),
        ({}, False),
    ],
)
def test_what_llama_cpp_would_do(metadata, expected):
    assert bos.wanted(metadata) is expected


def test_the_header_is_what_ggufs_own_reader_reads(tmp_path):
    path = write(tmp_path / "tiny.gguf", add_bos_token=True, chat_template=PLAIN)
    fields = gguf.GGUFReader(path).fields
    header = bos.read_header(path)
    arrays = {name for name, field in fields.items() if field.types[0] is gguf.GGUFValueType.ARRAY}
    assert header.keys() == {name for name in fields if not name.startswith("GGUF.")} - arrays
    assert all(header[name] == fields[name].contents() for name in header)


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "missing"])
def test_a_damaged_header_is_refused(tmp_path, damage):
    path = tmp_path / "tiny.gguf"
    data = write(path, add_bos_token=True).read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:900], "empty": b"", "other": b"GGML" + data[4:]}[damage])
    with pytest.raises(OptionError, match=r"tiny\.gguf'?.* cannot be read .*fetch the file again"):
        bos.read_header(path)
