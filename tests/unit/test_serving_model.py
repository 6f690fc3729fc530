"""What a served folder may hold, and what is said where it holds something else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.folders import served_folder
from unmask.client.options import DECODERS as CLIENT_DECODERS
from unmask.diffusion.full_sequence import CanvasBatch
from unmask.errors import ModelError
from unmask.models.loading import load
from unmask.models.registry import read_config
from unmask.serving.decoders import DECODERS
from unmask.serving.model import ServedModel
from unmask.v1 import generation_pb2 as pb


def describe(folder: Path, **options: int) -> ServedModel:
    context_length = options.get("context_length")
    return ServedModel.describe(folder, read_config(folder), name=None, rows=2, context_length=context_length)


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_a_model_is_described_without_torch_s_compiler() -> None:
    """To import it takes five seconds, which every server, command and test process would wait."""
    script = (
        "import sys\n"
        "from support.models import tiny_model\n"
        "from unmask.models.loading import build\n"
        "build(tiny_model().config, device='meta')\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


def test_a_folder_describes_itself(tmp_path: Path) -> None:
    model = describe(served_folder(tmp_path / "tiny"))
    assert (model.name, model.architecture, model.vocab_size) == ("tiny", "LLaDA2MoeModelLM", 512)
    assert model.context_length == 4096
    assert describe(served_folder(tmp_path / "tiny"), context_length=100).context_length == 100


def test_without_generation_config_the_published_defaults_hold(tmp_path: Path) -> None:
    folder = served_folder(tmp_path / "tiny")
    (folder / "generation_config.json").unlink()
    defaults = describe(folder).defaults
    assert (defaults.block_length, defaults.threshold) == (32, 0.95)
    assert (defaults.decoder, defaults.edit_threshold, defaults.max_post_edit_steps) == ("threshold", 0.9, 16)
    assert (defaults.eos_token_id, defaults.mask_token_id) == (510, 511)


def test_a_model_that_attends_to_the_whole_canvas_has_a_decoder_of_its_own(tmp_path: Path) -> None:
    folder = served_folder(tmp_path / "tiny", golden="lladamoe_a")
    (folder / "generation_config.json").unlink()
    model = describe(folder)
    assert (model.attends, model.defaults.decoder, model.defaults.threshold) == (
        "canvas",
        "low-confidence",
        1.0,
    )
    assert isinstance(model.batch(load(folder)), CanvasBatch)
    assert [decoder.name for decoder in model.decoders] == ["low-confidence"]


def test_every_decoder_of_the_wire_is_known_by_its_name() -> None:
    assert {decoder.name: decoder.wire for decoder in DECODERS} == CLIENT_DECODERS
    fields = {field.name for field in pb.DiffusionParams.DESCRIPTOR.fields} - {"decoder"}
    assert {name for decoder in DECODERS for name in decoder.parameters} == fields


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"threshold": 1.5}, "threshold: Input should be less than or equal to 1 .got 1.5."),
        ({"block_length": 0}, "block_length: Input should be greater than 0 .got 0."),
        ({"eos_token_id": [1, 2]}, "eos_token_id: Input should be a valid integer"),
        ({"decoder": "magic"}, "decoder: Input should be 'threshold', 'fixed-steps', 'joint-edit', 'hier"),
        (
            {"decoder": "low-confidence"},
            "decoder: got 'low-confidence', LLaDA2MoeModelLM can be decoded with threshold, fixed-steps",
        ),
        ({"steps_per_block": 33}, "steps_per_block: got 33, must be at most the block_length 32"),
        ({"edit_threshold": -0.1}, "edit_threshold: Input should be greater than or equal to 0"),
        ({"low_threshold": 0}, "low_threshold: Input should be greater than 0"),
        ({"credit_weight": 11}, "credit_weight: Input should be less than or equal to 10"),
        ({"credit_decay": 1.5}, "credit_decay: Input should be less than or equal to 1"),
        ({"credit_exponent": -1}, "credit_exponent: Input should be greater than or equal to 0"),
        ({"entropy_bound": -0.5}, "entropy_bound: Input should be greater than or equal to 0"),
        ({"max_post_edit_steps": 1025}, "max_post_edit_steps: Input should be less than or equal to 1024"),
        ({"prediction": "shifted"}, "prediction: Input should be 'same' .got 'shifted'."),
        ({"mask_token_id": 512}, "mask_token_id: got 512, the vocabulary has 512 tokens"),
        ([1], "got a JSON list, expected an object"),
        ("x", "got a JSON str, expected an object"),
    ],
)
def test_wrong_decoding_defaults_are_named(tmp_path: Path, content: object, message: str) -> None:
    folder = served_folder(tmp_path / "tiny")
    write(folder, "generation_config.json", content)
    with pytest.raises(ModelError, match=message) as error:
        describe(folder)
    assert "generation_config.json" in str(error.value)


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    folder = served_folder(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write(folder, "config.json", config | {"vocab_size": 400, "eos_token_id": 1, "mask_token_id": 2})
    with pytest.raises(ModelError, match="ids up to 511, config.json a vocab_size of 400"):
        describe(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = served_folder(tmp_path / "tiny")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: no such file"):
        describe(folder)
