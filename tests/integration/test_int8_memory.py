"""Loading in int8 takes the memory of int8 weights: the model is never there in float32 as a whole."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.models import TINY
from unmask.models.loading import build, save
from unmask.models.registry import parse_config

# Prints how many bytes a model takes at the most while it is loaded, by a process that has loaded one before.
CHILD = """
import sys
from pathlib import Path
from unmask.models.loading import load

tiny, wide, quantization = sys.argv[1:]
load(Path(tiny), quantization=quantization)
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")  # VmHWM is what there is now

def bytes_of(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) * 1024

before = bytes_of("VmRSS")
model = load(Path(wide), quantization=quantization)
print(bytes_of("VmHWM") - before)
"""
WIDE = TINY | {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_experts": 16,
    "initializer_range": 0.02,
}


def taken_to_load(folder: Path, quantization: str) -> int:
    """Bytes that a process takes for the folder's wide model at its most."""
    command = [sys.executable, "-c", CHILD, str(folder / "tiny"), str(folder / "wide"), quantization]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow  # two processes load a model
def test_a_model_in_int8_is_never_there_in_float32_as_a_whole(
    tmp_path: Path, record_measurement: Callable[[str, float | str], None]
) -> None:
    model = build(parse_config(WIDE))
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 80_000_000
    save(model, tmp_path / "wide")
    del model
    save(build(parse_config(TINY)), tmp_path / "tiny")
    as_it_is, int8 = (taken_to_load(tmp_path, way) for way in ("none", "int8"))
    record_measurement("memory to load in float32, of the weights' size", as_it_is / size)
    record_measurement("memory to load in int8, of the float32 weights' size", int8 / size)
    assert as_it_is > 0.9 * size, "or the other number would show nothing"
    assert int8 < 0.6 * size, "a model in float32 and its copy in int8 take 1.25 of it"
