"""What is said of a checkpoint: the published figures, and what lies on disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType

from support.checkpoints import SMALL_LING, write_checkpoint, write_gguf
from support.folders import add_tokenizer
from support.models import TINY, tiny_model
from unmask.cli.main import cli
from unmask.errors import ModelError
from unmask.models.converting import convert
from unmask.models.inspection import inspect_checkpoint
from unmask.models.loading import build, save
from unmask.models.registry import CONVERSIONS, FAMILIES, parse_config

PUBLISHED = Path(__file__).parents[1] / "support" / "published"


@pytest.mark.parametrize(
    ("name", "total", "active", "cache"),
    [
        ("llada2_mini", 16_255_643_392, 1_432_968_192, 40_960),
        ("llada2_flash", 102_889_705_216, 6_152_269_824, 65_536),
    ],
)
def test_published_configs_have_their_published_figures(name, total, active, cache):
    found = inspect_checkpoint(PUBLISHED / f"{name}.json")
    assert (found.parameters, found.active_parameters) == (total, active)
    assert found.cache_bytes_per_token == cache
    assert found.weight_bytes == {"bfloat16": 2 * total, "float32": 4 * total}
    assert (found.mask_token_id, found.eos_token_id, found.pad_token_id) == (156895, 156892, 156892)
    assert (found.architecture, found.model_type, found.decoding) == (
        "LLaDA2MoeModelLM",
        "llada2_moe",
        "diffusion",
    )
    assert found.weights is None


def test_experts_that_a_token_skips_are_not_active(tmp_path):
    """As published for LLaDA-MoE: 1.72 billion, 1.398 without the embedding."""
    config = {
        "architectures": ["LLaDAMoEModelLM"],
        "vocab_size": 157184,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "expert_intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect_checkpoint(tmp_path / "config.json")
    assert found.parameters == 7_356_880_896
    assert round(found.active_parameters / 1e9, 2) == 1.72
    assert round((found.active_parameters - 157184 * 2048) / 1e9, 3) == 1.398


def test_the_command_says_it_in_lines():
    result = CliRunner().invoke(cli, ["inspect", str(PUBLISHED / "llada2_mini.json")])
    assert result.exit_code == 0
    assert "LLaDA2MoeModelLM (llada2_moe), diffusion" in result.output
    assert "256 in each of 19 layers, 8 per token, 1 shared" in result.output
    assert "16,255,643,392, 1,432,968,192 active per token" in result.output
    assert "32.51 GB in bfloat16, 65.02 GB in float32; 40,960 B of keys and values" in result.output


def test_a_folder_is_described_with_its_files(tmp_path):
    save(tiny_model(dtype=torch.bfloat16), tmp_path / "model", max_shard_bytes=20_000)
    found = inspect_checkpoint(tmp_path / "model").weights
    assert found.layout == "split" and found.checksums == "ok" and found.tokenizer == "absent"
    assert found.dtypes.keys() == {"BF16", "F32"} and found.dtypes["F32"] == 2  # the router and its bias
    on_disk = {file.name: file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors")}
    assert found.files == on_disk and len(on_disk) > 1

    convert(tmp_path / "model", tmp_path / "merged", layout="merged")
    (tmp_path / "merged" / "checksums.json").unlink()
    add_tokenizer(tmp_path / "merged")
    found = inspect_checkpoint(tmp_path / "merged").weights
    assert found.layout == "merged" and found.checksums == "absent"
    assert found.tokenizer == "present" and found.chat_template


def test_an_autoregressive_source_says_what_it_converts_to(tmp_path):
    write_checkpoint(tmp_path / "ling", SMALL_LING, extra=("model.layers.2.eh_proj.weight",))
    result = CliRunner().invoke(cli, ["inspect", str(tmp_path / "ling")])
    assert "BailingMoeV2ForCausalLM (bailing_moe), autoregressive" in result.output
    assert "LLaDA2MoeModelLM (unmask convert --to)" in result.output
    assert "the model takes all but 1" in result.output


def test_a_gguf_file_is_described(tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    data = {"architectures": ["LlamaForCausalLM"], "vocab_size": 300, "eos_token_id": 0} | shape
    model = build(parse_config(data | {"max_position_embeddings": 64}))
    write_gguf(tmp_path / "m.gguf", model, kind="llama", quantised=GGMLQuantizationType.Q8_0)
    found = inspect_checkpoint(tmp_path / "m.gguf")
    assert found.parameters == found.active_parameters == sum(p.numel() for p in model.parameters())
    assert found.weights.layout == "gguf" and found.weights.dtypes == {"Q8_0": 9, "F32": 3}
    assert found.weights.chat_template


def test_all_of_it_is_there_for_machines(tmp_path):
    save(tiny_model(), tmp_path / "model")
    result = CliRunner().invoke(cli, ["inspect", "--json", str(tmp_path / "model")])
    data = json.loads(result.output)
    assert data == inspect_checkpoint(tmp_path / "model").to_json_dict()
    assert data["experts"] == {"total": 8, "per_token": 2, "shared": 1, "layers": 1}
    assert data["weights"]["checksums"] == "ok"


def test_every_family_is_said_to_be_what_its_class_is():
    for architecture, family in FAMILIES.items():
        module = __import__(f"unmask.models.{family.package}.model", fromlist=[architecture])
        assert getattr(module, architecture).causal == (architecture in CONVERSIONS)


def test_a_config_that_describes_no_model_that_exists_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 10**15}))
    with pytest.raises(ModelError, match="describes more than 250000 tensors"):
        inspect_checkpoint(tmp_path / "config.json")


def test_inspecting_needs_no_torch(tmp_path):
    save(tiny_model(), tmp_path / "model")
    for path in (tmp_path / "model", PUBLISHED / "llada2_mini.json"):
        script = (
            "import sys; sys.modules['torch'] = None\n"
            f"from unmask.cli.main import main; main(['inspect', {str(path)!r}])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
