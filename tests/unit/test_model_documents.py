"""The documents about models: what they quote is so, and what they tell to type works."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from support.checkpoints import SMALL_LING, ling_tokenizer, write_gguf
from support.folders import add_tokenizer
from support.models import tiny_model
from unmask.cli.main import _exit_code
from unmask.client.options import request_of
from unmask.models.loading import build, load, save
from unmask.models.registry import CONVERSIONS, parse_config
from unmask.models.tokenizer import Tokenizer
from unmask.serving.requests import _turn
from unmask.training.records import read_records

ROOT = Path(__file__).parents[2]
CONVERT = (ROOT / "docs/how-to/convert-a-checkpoint.md").read_text()
TALK = (ROOT / "docs/how-to/hold-a-conversation.md").read_text()
FAMILY = (ROOT / "docs/how-to/add-a-model-family.md").read_text()

QUOTES = re.findall(r"^```python\n# (\S+)\n(.*?)^```", FAMILY, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("path", "quoted"), QUOTES, ids=[path for path, _ in QUOTES])
def test_code_in_the_walk_through_is_that_of_the_file(path, quoted):
    assert quoted in (ROOT / path).read_text()


def test_the_conversation_reaches_the_template_alike_by_file_and_by_request(tmp_path):
    [example] = re.findall(r"^```json\n(.*?)^```", TALK, re.DOTALL | re.MULTILINE)
    chat = json.loads(example)
    asked = request_of(None, messages=chat["messages"], tools=chat["tools"]).chat
    answered = {**chat, "messages": [*chat["messages"], {"role": "assistant", "content": "4"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(answered))
    [record] = read_records(tmp_path / "chats.jsonl", "messages")
    assert [json.loads(text) for text in asked.tools] == list(record.tools) == chat["tools"]
    turns = [_turn(message, "") for message in asked.messages]
    assert turns == list(record.messages[:-1])

    save(tiny_model(), tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    template = ROOT / "workers/src/unmask/models/llada2_moe/chat_template.jinja"
    (tmp_path / "model" / "chat_template.jinja").write_bytes(template.read_bytes())
    text = Tokenizer.load(tmp_path / "model").render_chat(turns, True, tools=record.tools)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in text
    assert "<tool_response>\n4 degrees\n</tool_response>" in text
    assert '"description": "The weather now."' in text


def test_the_table_of_conversions_is_complete():
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\| `(\w+)` \|", CONVERT, re.MULTILINE))
    assert rows == CONVERSIONS


SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
}


def lay_out_sources():
    """Small models under the names that the document uses."""
    ling = build(parse_config(SMALL_LING), dtype=torch.bfloat16)
    save(ling, Path("Ling-mini-base-2.0"))
    ling_tokenizer(Path("Ling-mini-base-2.0"))
    qwen = SHAPE | {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936}
    save(build(parse_config(qwen)), Path("Qwen3-0.6B-Base"))
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "mask_token_id": 50279, "eos_token_id": 50278}
    olmoe = SHAPE | experts | {"architectures": ["OlmoeForCausalLM"], "vocab_size": 50304}
    save(build(parse_config(olmoe)), Path("OLMoE-1B-7B"))
    add_tokenizer(Path("OLMoE-1B-7B"))
    llama = build(parse_config(SHAPE | {"architectures": ["LlamaForCausalLM"], "vocab_size": 300}))
    smollm2 = Path("SmolLM2-135M-Instruct.Q4_1.gguf")
    write_gguf(smollm2, llama, kind="llama", quantised=GGMLQuantizationType.Q4_1)


def test_the_commands_of_the_document_do_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lay_out_sources()
    blocks = re.findall(r"^```sh\n(.*?)^```", CONVERT, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    for line in lines:
        assert _exit_code(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
    assert len(lines) > 8
    masks = {"llada2-untrained": 156895, "sdar-untrained": 151669, "olmoe-untrained": 50279}
    assert {name: load(tmp_path / name).mask_token_id for name in masks} == masks
    assert load(tmp_path / "halves").head.weight.dtype == torch.float16
    merged = json.loads((tmp_path / "for-dfactory" / "config.json").read_text())
    assert merged["model_type"] == "llada2_moe_veomni"


def test_the_printed_example_is_that_of_the_published_shapes(tmp_path, capsys):
    config = json.loads((ROOT / "tests/support/published/llada2_mini.json").read_text())
    ling = config | {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe"}
    (tmp_path / "config.json").write_text(json.dumps(ling))
    assert _exit_code(["inspect", str(tmp_path / "config.json")]) == 0
    printed = re.search(r"^```text\n(.*?)^```", CONVERT, re.DOTALL | re.MULTILINE)[1]
    assert capsys.readouterr().out == printed
