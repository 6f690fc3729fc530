"""Sources in fixed proportions: exact over windows, the same on any number of ranks; and changed data."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.manifests import changed, train_job
from support.training import EOS, training_job, write_data, write_lines
from unmask.errors import DataError, UsageError
from unmask.models.tokenizer import Tokenizer
from unmask.training.corpus import Library, Source
from unmask.training.identity import identity, refuse_other_job
from unmask.training.mixing import Mix
from unmask.training.packing import make_rows
from unmask.training.plan import plan_stages
from unmask.training.preparation import prepare
from unmask.training.stream import DocumentStream
from unmask_operator.launch.admission import AdmissionError, admit

weights = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


def mix_of(parts):
    return Mix(sizes=(10,) * len(parts), rates=tuple(part / sum(parts) for part in parts))


def one_at_a_time(mix, count):
    """The stream by its definition: of all sources, the one whose next document is due first."""
    given_so_far, found = [0] * len(mix.rates), []
    for _ in range(count):
        due = [(given_so_far[source] + 0.5) / rate for source, rate in enumerate(mix.rates)]
        source = min(range(len(due)), key=lambda one: (due[one], one))
        found.append((source, given_so_far[source]))
        given_so_far[source] += 1
    return found


@given(weights, st.integers(0, 400), st.integers(1, 300))
def test_any_part_of_the_stream_is_that_of_the_whole(parts, first, count):
    mix = mix_of(parts)
    source, number = mix.drawn(first, count)
    expected = one_at_a_time(mix, first + count)[first:]
    assert list(zip(source.tolist(), number.tolist(), strict=True)) == expected


@given(weights, st.integers(0, 10**9), st.integers(1, 400))
def test_proportions_hold_in_every_window(parts, first, count):
    mix = mix_of(parts)
    source, _ = mix.drawn(first, count)
    counts = np.bincount(source, minlength=len(parts))
    rates = np.array(mix.rates)
    assert (np.abs(counts - count * rates) <= 1 + (len(parts) + 1) * rates + 1e-6).all()


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path)
    for name, documents, words in (("books", 40, 6), ("code", 7, 12), ("chat", 19, 3)):
        write_lines(
            tmp_path / f"{name}.jsonl",
            [{"text": " ".join([f"w{8 + n}"] * (words + n % 3))} for n in range(documents)],
        )
    return tmp_path


SHARES = {"books": "0.7", "code": "0.25", "chat": "0.05"}


def corpus_in(folder, shares=SHARES, length=32, overlong="Error"):
    library = Library(Tokenizer.load(folder / "tokenizer"), eos_token_id=EOS)
    sources = [
        Source(folder / f"{name}.jsonl", "text", share=Fraction(share)) for name, share in shares.items()
    ]
    return library.corpus(sources, length=length, overlong=overlong)


def source_of(corpus, documents):
    return np.searchsorted(np.cumsum(corpus.mix.sizes), documents, side="right")


def test_tokens_come_in_the_shares_that_were_asked_for(folder):
    corpus = corpus_in(folder)
    documents = DocumentStream(corpus, seed=3, stage=0).documents(0, 20_000)
    tokens = np.bincount(source_of(corpus, documents), weights=corpus.lengths[documents])
    assert tokens / tokens.sum() == pytest.approx([0.7, 0.25, 0.05], abs=2e-3)


def test_each_source_is_passed_through_whole_and_shuffled_anew(folder):
    corpus = corpus_in(folder)
    documents = DocumentStream(corpus, seed=3, stage=0).documents(0, 5000)
    first = np.cumsum([0, *corpus.mix.sizes])
    for one, size in enumerate(corpus.mix.sizes):
        own = documents[source_of(corpus, documents) == one]
        passes = own[: len(own) // size * size].reshape(-1, size)
        assert (np.sort(passes, axis=1) == np.arange(first[one], first[one] + size)).all()
        assert len(passes) > 1
        assert len({tuple(order) for order in passes}) == len(passes)


def test_the_order_is_a_function_of_seed_stage_and_number_alone(folder):
    corpus = corpus_in(folder)
    whole = DocumentStream(corpus, seed=3, stage=1).documents(0, 500)
    again = DocumentStream(corpus, seed=3, stage=1)
    for cursor, count in [(450, 50), (0, 1), (77, 200), (499, 1), (12, 0)]:
        assert (again.documents(cursor, count) == whole[cursor : cursor + count]).all()
    for seed, stage in ((4, 1), (3, 2)):
        assert (DocumentStream(corpus, seed=seed, stage=stage).documents(0, 500) != whole).any()


def test_ranks_that_come_and_go_see_the_same_documents(folder):
    corpus = corpus_in(folder)

    def ordinals(worlds):
        """Of each step and row, the numbers in the stream of its tokens, and the tokens."""
        cursor, found = 0, []
        for world in worlds:
            layout = DocumentStream(corpus, seed=3, stage=0).step(cursor, rows=8, length=32, multiple=4)
            rows = {}
            for rank in range(world):
                mine = make_rows(
                    layout,
                    corpus,
                    rank=rank,
                    world=world,
                    responses_only=False,
                    eos_token_id=EOS,
                    pad_token_id=EOS,
                )
                for place, row in enumerate(zip(mine.ordinal, mine.ids, strict=True)):
                    rows[rank + place * world] = [part.tolist() for part in row]
            found.append([rows[number] for number in sorted(rows)])
            cursor += len(layout.document)
        return found

    assert ordinals([2, 2, 1, 1, 4, 4]) == ordinals([1] * 6) == ordinals([8] * 6)


def test_documents_that_do_not_fit_are_no_part_of_the_mix(folder):
    corpus = corpus_in(folder, {"books": "1", "chat": "1"}, length=7, overlong="Skip")
    assert corpus.mix.sizes == (14, 19)
    with pytest.raises(
        DataError, match=r"code.jsonl: has a share of the mix, but no document that fits a row"
    ):
        corpus_in(folder, length=8, overlong="Skip")


def test_without_shares_the_order_is_what_it_was(folder):
    library = Library(Tokenizer.load(folder / "tokenizer"), eos_token_id=EOS)
    sources = [Source(folder / "code.jsonl", "text", 2), Source(folder / "chat.jsonl", "text")]
    corpus = library.corpus(sources, length=32, overlong="Error")
    found = DocumentStream(corpus, seed=5, stage=2).documents(30, 8)
    key = 5 | (2 << 96) | (1 << 64)
    expected = [
        np.repeat(np.arange(26), [2] * 7 + [1] * 19)[
            np.argsort(np.random.Philox(key=key, counter=[0, number, 0, 0]).random_raw(33), kind="stable")
        ]
        for number in (0, 1)
    ]
    assert found.tolist() == np.concatenate(expected)[30:38].tolist()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"data.train[0].share": "0.5"}, "either all sources to learn from have a share, or none"),
        ({"data.train[0].share": "0", "data.train[1].share": "1"}, "share must be above 0"),
        ({"data.train[0].share": "1", "data.train[1].share": "1", "data.train[1].weight": 2}, "drop one"),
        ({"data.validation[0].share": "1"}, "drop it from validation"),
    ],
)
def test_shares_that_make_no_sense_are_refused_by_the_manifest(data, words):
    sources = [{"uri": f"/data/{name}.jsonl", "format": "completion"} for name in "ab"]
    manifest = train_job(
        data={"train": sources, "validation": [{"uri": "/data/c.jsonl", "format": "completion"}]}
    )
    admit(json.dumps(manifest))
    with pytest.raises(AdmissionError, match=words):
        admit(json.dumps(changed(manifest, {f"spec.{field}": value for field, value in data.items()})))


def identity_of(job, folder):
    from unmask.models.registry import parse_config

    tokenizer = Tokenizer.load(folder / "tokenizer")
    config = parse_config(job.spec.model.init.config, source="config")
    library = Library(tokenizer, eos_token_id=EOS)
    return json.loads(
        json.dumps(identity(job.spec, config, plan_stages(job.spec, config, tokenizer), library))
    )


def refusal(saved, own):
    with pytest.raises(UsageError) as caught:
        refuse_other_job(saved, own, where="step-3")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_data_that_shrank_are_refused_with_what_changed(folder):
    job = training_job(folder)
    before = identity_of(job, folder)
    path = folder / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-5]))
    tokens = [
        identity["stages"][0]["train"][0]["about"]["tokens"]
        for identity in (identity_of(job, folder), before)
    ]
    assert refusal(before, identity_of(job, folder)) == (
        f"spec.stages[0].train[0].sha256: the job has 45 documents of {tokens[0]} tokens, from files of "
        f"other content, but the checkpoint step-3 was made with 50 documents of {tokens[1]} tokens; "
        "put the files of then back, or give the job another checkpoint.uri"
    )


def test_another_tokenizer_is_refused_as_that(folder):
    job = training_job(folder)
    before = identity_of(job, folder)
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(
        path.read_text().replace('"w58"', '"x"').replace('"w57"', '"w58"').replace('"x"', '"w57"')
    )
    message = refusal(before, identity_of(job, folder))
    assert "tokens, from another tokenizer or chat template, but" in message
    assert "put the tokenizer of then back" in message


def test_files_that_differ_in_nothing_that_is_learnt_are_the_same_data(folder):
    job = training_job(folder)
    before = identity_of(job, folder)
    path = folder / "train.jsonl"
    path.write_text(path.read_text().replace("\n", "\n\n"))
    after = identity_of(job, folder)
    assert after != before
    refuse_other_job(before, after, where="step-3")


def test_a_checkpoint_that_knows_less_about_its_data_is_still_gone_on_from(folder):
    job = training_job(folder)
    own = identity_of(job, folder)
    older = json.loads(json.dumps(own))
    for stage in older["stages"]:
        for source in stage["train"]:
            del source["about"]
    refuse_other_job(older, own, where="step-3")
    older["stages"][1]["train"][0]["sha256"] = "0" * 64
    assert refusal(older, own).startswith("spec.stages[1].train[0].sha256: the job has '")


def one_stage(folder):
    return training_job(folder).to_json_dict()["spec"]["stages"][:1]


def test_another_share_is_another_job(folder):
    sources = [{"uri": str(folder / f"{n}.jsonl"), "format": "text", "share": s} for n, s in SHARES.items()]
    text = {
        "spec.data.train": sources,
        "spec.stages": [training_job(folder).to_json_dict()["spec"]["stages"][0]],
    }
    before = identity_of(training_job(folder, text), folder)
    other = training_job(folder, text | {"spec.data.train[2].share": "0.1"})
    assert "spec.stages[0].train[2].share: the job has '1/10'" in refusal(before, identity_of(other, folder))


def test_a_job_of_shares_is_prepared(folder):
    import torch

    from unmask.training.distributed import World

    sources = [{"uri": str(folder / f"{n}.jsonl"), "format": "text", "share": s} for n, s in SHARES.items()]
    text = {
        "spec.data.train": sources,
        "spec.stages": [training_job(folder).to_json_dict()["spec"]["stages"][0]],
    }
    job = training_job(folder, text)
    prepared = prepare(job.spec, World(rank=0, size=1, device=torch.device("cpu")))
    assert prepared.stages[0].stream.corpus.mix.sizes == (40, 7, 19)
    assert (folder / "run" / "data").is_dir()
