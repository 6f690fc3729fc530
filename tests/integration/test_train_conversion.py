"""A dense autoregressive model becomes a diffusion model, and a special token of its tokenizer the mask."""

import json

import pytest

from support.manifests import TINY_CONFIG
from support.training import EOS, MASK, start_training, training_job, write_data, write_job
from unmask.errors import ModelError, UsageError
from unmask.models.conversion import CONVERSIONS
from unmask.models.registry import parse_config, read_config
from unmask.models.tokenizer import Tokenizer
from unmask.training.plan import plan_stages
from unmask_api.train_job import Conversion

KEPT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA = {
    **{
        key: TINY_CONFIG[key] for key in (*KEPT, "num_key_value_heads", "head_dim", "max_position_embeddings")
    },
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}


@pytest.fixture
def job(tmp_path):
    """Two steps of a converted Llama; its tokenizer has a special token ``<mask>`` without a role."""
    write_data(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}', encoding="utf-8")
    stage = {
        "name": "blocks",
        "objective": "bdlm",
        "convertTo": "A2DLlamaLMHeadModel",
        "maskToken": "<mask>",
        "blockSizes": [4],
        "steps": 2,
        "length": 32,
        "rowsPerStep": 2,
        "learningRate": {"peak": "1e-3"},
    }

    def with_stage(**changes):
        changed = {key: value for key, value in (stage | changes).items() if value is not None}
        return training_job(tmp_path, {"spec.model.init.config": LLAMA, "spec.stages": [changed]})

    return with_stage


def plan(job):
    spec = job.spec
    tokenizer = Tokenizer.load(spec.model.tokenizer.uri)
    return plan_stages(spec, parse_config(spec.model.init.config), tokenizer)


def test_the_manifest_names_every_conversion_there_is():
    assert set(Conversion.__args__) == set(CONVERSIONS.values())


def test_the_trained_model_and_its_tokenizer_name_the_mask(job, tmp_path):
    process = start_training(write_job(job(), tmp_path / "job.json"))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    written = tmp_path / "run" / "model"
    config = read_config(written)
    assert (config.architecture, config.mask_token_id) == ("A2DLlamaLMHeadModel", MASK)
    assert Tokenizer.load(written).mask_token_id == MASK
    names = json.loads((written / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert names == {"eos_token": "<eos>", "mask_token": "<mask>"}
    assert json.loads((written / "generation_config.json").read_text())["mask_token_id"] == MASK
    before, after = tmp_path / "tokenizer" / "tokenizer.json", written / "tokenizer.json"
    assert after.read_bytes() == before.read_bytes()


@pytest.mark.parametrize(
    ("token", "reason"),
    [("<eos>", "is the eos_token"), ("w9", "is no special token"), ("<sketch>", "is no special token")],
)
def test_a_token_with_another_use_cannot_be_the_mask(job, token, reason):
    with pytest.raises(
        UsageError, match=rf"spec.stages\[0\].maskToken: '{token}' {reason}.*; unused are <mask>"
    ):
        plan(job(maskToken=token))


def test_an_architecture_without_a_mask_of_its_own_asks_for_one(job):
    with pytest.raises(ModelError, match="mask_token_id"):
        plan(job(maskToken=None))
