"""How fast data become tokens, and in how much memory: writes a corpus, encodes it, reads it again.

    python benchmarks/encoding.py --mib 200

The text is that of the licences on the machine, over and over, under a tokenizer of 8,192 tokens that is made
from it. Prints one JSON object; times are of this machine.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import tokenizers

from unmask.models.tokenizer import Tokenizer
from unmask.training.corpus import Library, Source
from unmask.training.stream import DocumentStream


def _tokenizer(folder: Path, texts: list[str]) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8192, special_tokens=["<eos>"], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--mib", type=int, default=200, help="size of the corpus")
    mib = arguments.parse_args().mib
    texts = [
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(Path("/usr/share/common-licenses").iterdir())
        if path.is_file()
    ]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        tokenizer = _tokenizer(folder, texts)
        path = folder / "corpus.jsonl"
        with path.open("w", encoding="utf-8") as stream:
            while stream.tell() < mib << 20:
                for text in texts:
                    for start in range(0, len(text), 4000):
                        stream.write(json.dumps({"text": text[start : start + 4000]}) + "\n")
        found: dict[str, float] = {"mib": path.stat().st_size / 2**20, "peak_mib_before": _peak_mib()}
        for name in ("encode_s", "open_s"):
            library = Library(tokenizer, eos_token_id=0, cache=folder / "cache")
            started = time.perf_counter()
            corpus = library.corpus([Source(path, "text")], length=4096, overlong="Split")
            found[name] = time.perf_counter() - started
            found[f"peak_mib_after_{name.removesuffix('_s')}"] = _peak_mib()
        documents = DocumentStream(corpus, seed=0, stage=0)
        started = time.perf_counter()
        cursor = 0
        for _ in range(50):
            layout = documents.step(cursor, rows=16, length=4096, multiple=32)
            cursor += len(layout.document)
        found["layout_ms_of_65536_tokens"] = (time.perf_counter() - started) / 50 * 1000
        found |= {"documents": len(corpus), "tokens": int(corpus.lengths.sum())}
        found["tokens_per_s"] = found["tokens"] / found["encode_s"]
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


if __name__ == "__main__":
    main()
