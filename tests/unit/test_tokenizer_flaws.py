"""A tokenizer whose parts contradict each other."""

import json

import pytest

from support.checkpoints import ling_tokenizer
from unmask.errors import ModelError
from unmask.models.tokenizer import Tokenizer


def test_a_text_that_meets_a_flaw_of_the_tokenizer_is_refused_in_a_line(tmp_path):
    ling_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"w1": 0}, "unk_token": "[UNK]"}
    content["added_tokens"] = []
    content["post_processor"] = None
    file.write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(ModelError, match=r"cannot encode a text of 10 characters: .*repair tokenizer\.json"):
        tokenizer.encode("unheard-of")
