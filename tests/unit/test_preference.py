"""Preferences: the loss at the reference, its gradient, the noise that is shared, and the data."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from support.models import packed_row, random_tokens, tiny_model
from support.training import preferences, training_job, write_data, write_lines
from unmask.diffusion import layout
from unmask.diffusion.noise import NoiseConfig, corrupt
from unmask.diffusion.preference import paired
from unmask.errors import DataError
from unmask.models.tokenizer import Tokenizer
from unmask.training.corpus import Library, Source
from unmask.training.distributed import World
from unmask.training.encoding import encode, encode_pair
from unmask.training.learner import Learner
from unmask.training.packing import make_rows
from unmask.training.preparation import prepare
from unmask.training.records import Completion, Messages, read_records
from unmask.training.records import Preference as Record
from unmask.training.steps import Preference, gradient_step, micro_batches, model_inputs, preference_sums
from unmask.training.stream import Purpose, philox_key

pytestmark = pytest.mark.training

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
BAND = NoiseConfig(low=0.3, high=0.8, scope="document", weight="elbo")
DPO = {"name": "prefer", "objective": "dpo", "blockSizes": [4], "steps": 4}
SHARED = {"length": 32, "rowsPerStep": 4, "learningRate": {"peak": "1e-2"}}


def pair_rows(*pairs, length=64):
    """A row of pairs, each (tokens of the prompt, of it with the chosen, and with the rejected answer)."""
    documents, prompts, ordinals = [], [], []
    for number, (prompt, chosen, rejected) in enumerate(pairs):
        asked = random_tokens(prompt, seed=number)
        for side, count in enumerate((chosen, rejected)):
            documents.append(asked + random_tokens(count - prompt, seed=100 + 2 * number + side))
            prompts.append(prompt)
            ordinals.append(number)
    rows = packed_row(*documents, length=length, prompt=prompts)
    for document, ordinal in enumerate(ordinals):
        rows.ordinal[rows.document == document] = ordinal
    return rows


def inputs_of(rows, config=BAND, *, seed=5):
    corruption = corrupt(rows, config, seed=seed, block_length=4)
    return paired(layout.two_copy(rows, corruption, block_length=4, mask_token_id=63), rows), corruption


def preference(reference, *, beta=0.1, views=1):
    return Preference(beta=beta, views=views, reference=lambda: nullcontext(reference))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("views", [1, 2])
def test_the_loss_at_the_reference_is_ln_2_exactly(dtype, views):
    model, reference = (tiny_model(dtype=dtype) for _ in range(2))
    band = NoiseConfig(low=0.3, high=0.8, scope="document", weight="elbo", views=views)
    inputs, _ = inputs_of(pair_rows((5, 16, 12), (3, 8, 20)), band)
    sums = preference_sums(model.train(), inputs, preference(reference, beta=0.37, views=views))
    exact = torch.tensor(0.0, dtype=sums.dtype)
    assert sums[0] == 2 * torch.nn.functional.softplus(exact) == pytest.approx(2 * math.log(2))
    assert sums[1:].tolist() == [0, 0]


def bound(model, ids, masked, ratio, prompt):
    """B of one answer, token by token, from one forward on the blocks before and the noisy block."""
    total = torch.zeros((), dtype=torch.float64)
    noisy = np.where(masked, 63, ids)
    for block in range(len(ids) // 4):
        span = slice(4 * block, 4 * block + 4)
        if not masked[span].any():
            continue
        tokens = torch.tensor([*ids[: 4 * block], *noisy[span]])[None]
        metadata = layout.AttentionMetadata.single_row(len(tokens[0]), block_length=4)
        hidden = model.hidden(tokens, metadata)[0, -4:]
        log_p = torch.log_softmax(model.logits(hidden), -1)
        for place in range(4):
            if masked[4 * block + place]:
                assert 4 * block + place >= prompt
                total = total + log_p[place, int(ids[4 * block + place])] * float(
                    1 / ratio[4 * block + place]
                )
    return total


@pytest.mark.parametrize("views", [1, 2])
def test_loss_and_gradient_are_those_of_bounds_computed_one_by_one(views):
    beta = 0.1
    model, reference = tiny_model(seed=0), tiny_model(seed=1)
    rows = pair_rows((5, 16, 12), (3, 8, 20))
    band = NoiseConfig(low=0.3, high=0.8, scope="document", weight="elbo", views=views)
    inputs, corruption = inputs_of(rows, band)
    sums = preference_sums(model, inputs, preference(reference, beta=beta, views=views))
    sums[0].backward()
    fast = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    losses, margins = [], []
    for pair in range(2):
        gains = []
        for side in range(2):
            place = rows.document[0] == 2 * pair + side
            prompt = int((~rows.supervised[0][place]).sum())
            ids = rows.ids[0][place]
            ours, theirs = (
                sum(
                    bound(
                        one, ids, corruption.masked[view, 0][place], corruption.ratio[view, 0][place], prompt
                    )
                    for view in range(views)
                )
                / views
                for one in (model, reference)
            )
            gains.append(ours - theirs.detach())
        margins.append(gains[0] - gains[1])
        losses.append(-torch.log(torch.sigmoid(beta * margins[-1])))
    slow = sum(losses)
    slow.backward()
    torch.testing.assert_close(sums[0], slow, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums[1], sum(margins).detach(), rtol=1e-11, atol=1e-11)
    assert sums[2] == sum(margin > 0 for margin in margins)
    for ours, parameter in zip(fast, model.parameters(), strict=True):
        wanted = torch.zeros_like(ours) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-13)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_bound():
    model, reference = tiny_model(seed=0), tiny_model(seed=0)
    inputs, _ = inputs_of(pair_rows((4, 20, 20), (4, 16, 8)))
    before = preference_sums(model, inputs, preference(reference))
    before[0].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    after = preference_sums(model, inputs, preference(reference))
    assert after[0] < before[0]
    assert after[1] > 0
    assert after[2] == 2


@pytest.mark.parametrize("scope", ["document", "block"])
@pytest.mark.parametrize("answers", [(16, 16), (16, 11), (9, 20)])
def test_both_answers_are_masked_by_the_same_numbers_as_far_as_both_reach(scope, answers):
    band = NoiseConfig(low=0.3, high=0.8, scope=scope, weight="elbo")
    same_blocks = -(-answers[0] // 4) == -(-answers[1] // 4)
    agreed = 0
    for seed in range(20):
        rows = pair_rows((5, *answers))
        corruption = corrupt(rows, band, seed=seed, block_length=4)
        chosen, rejected = (rows.document[0] == side for side in (0, 1))
        both = min(answers)
        masked = [corruption.masked[0, 0][side][:both] for side in (chosen, rejected)]
        ratio = [corruption.ratio[0, 0][side][:both] for side in (chosen, rejected)]
        agreed += np.array_equal(ratio[0], ratio[1]) and np.array_equal(masked[0], masked[1])
    assert agreed == 20 if scope == "document" or same_blocks else agreed < 20


@pytest.fixture(scope="module")
def preparation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    write_data(folder)
    return prepare(dpo_job(folder).spec, ALONE)


def dpo_job(folder, **values):
    pairs = {"format": "preference", "weight": 1}
    write_lines(folder / "pairs.jsonl", preferences(range(40)))
    data = {
        "train": [pairs | {"uri": str(folder / "pairs.jsonl")}],
        "validation": [pairs | {"uri": str(folder / "pairs.jsonl")}],
    }
    changes = {
        "spec.stages": [DPO | SHARED | values],
        "spec.data": {"seed": 7, **data},
        "spec.evaluation.generation": None,
        "spec.model.init.config.architectures": ["LLaDA2MoeModelLM"],
    }
    return training_job(folder, changes)


def step_of(preparation, *, micro_batch=4, ranks=1, precision="fp32"):
    stage = preparation.stages[0]
    model, reference = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32, seed=1)
    learner = Learner(model, preparation.spec.model_copy(update={"precision": precision}))
    layout_ = stage.stream.step(3, rows=4, length=32, multiple=4)
    loss, pairs, gradient, margin = 0.0, 0.0, 0.0, 0.0
    for rank in range(ranks):
        rows = make_rows(
            layout_,
            stage.stream.corpus,
            rank=rank,
            world=ranks,
            responses_only=True,
            eos_token_id=62,
            pad_token_id=62,
        )
        batches = (
            model_inputs(batch, stage.plan, model, block_length=4, noise_key=philox_key(7, Purpose.NOISE))
            for batch in micro_batches(rows, micro_batch)
        )
        learner.weights.gradient.zero_()
        totals = gradient_step(learner.weights, batches, ALONE, stop=False, preference=preference(reference))
        loss += totals.loss * totals.normaliser
        margin += totals.measures["margin"] * totals.normaliser
        pairs += totals.normaliser
        gradient = gradient + learner.weights.gradient.double()
    assert pairs == len(layout_.document)
    return loss / pairs, margin / pairs, gradient / pairs


@pytest.mark.parametrize(("micro_batch", "ranks"), [(1, 1), (3, 1), (4, 2), (1, 4)])
def test_a_step_is_the_same_however_its_rows_are_split(preparation, micro_batch, ranks):
    loss, margin, gradient = step_of(preparation)
    split = step_of(preparation, micro_batch=micro_batch, ranks=ranks)
    assert split[:2] == pytest.approx((loss, margin), rel=1e-5)
    assert abs(loss - math.log(2)) > 1e-3
    torch.testing.assert_close(split[2], gradient, atol=1e-6, rtol=1e-5)


def test_pairs_lie_side_by_side_in_rows_and_are_passed_through_once(preparation):
    stream = preparation.stages[0].stream
    corpus = stream.corpus
    assert (len(corpus), len(corpus.lengths)) == (40, 80)
    seen, cursor = [], 0
    while cursor < 40:
        found = stream.step(cursor, rows=4, length=32, multiple=4)
        rows = make_rows(
            found, corpus, rank=0, world=1, responses_only=True, eos_token_id=62, pad_token_id=62
        )
        seen += found.document.tolist()
        cursor += len(found.document)
        for place in range(len(found.document)):
            row = rows.document[found.row[place]]
            first = row[found.start[place]]
            assert first % 2 == 0
            both = [row == first + side for side in (0, 1)]
            for side, document in enumerate(both):
                number = 2 * found.document[place] + side
                used = corpus.lengths[number]
                start = corpus.starts[number]
                ids = rows.ids[found.row[place]][document]
                assert np.array_equal(ids[:used], corpus.ids[start : start + used])
                assert (ids[used:] == 62).all()
                given = ~rows.supervised[found.row[place]][document]
                assert given.sum() == corpus.prompt_lengths[number]
            ordinals = rows.ordinal[found.row[place]][both[0] | both[1]]
            assert len(set(ordinals.tolist())) == 1
    assert sorted(seen[:40]) == list(range(40))


def test_measurements_tell_the_margin(preparation):
    evaluator = preparation.stages[0].evaluator
    model, reference = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32, seed=1)
    at_reference = evaluator.measure(reference, stage_step=0, preference=preference(reference))
    assert at_reference == {"loss": pytest.approx(math.log(2), rel=1e-6), "margin": 0.0, "preferred": 0.0}
    measured = evaluator.measure(model, stage_step=0, preference=preference(reference))
    assert measured["margin"] != 0
    assert 0 < measured["preferred"] < 1


# The data


def read_pair(tmp_path, entry):
    write_lines(tmp_path / "pairs.jsonl", [entry])
    return read_records(tmp_path / "pairs.jsonl", "preference")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, '"rejected" must be a string'),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, '"chosen" is empty'),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same answer"),
        ({"chosen": "b", "rejected": "c"}, '"prompt" must be a string'),
        ({"prompt": "a", "messages": [], "chosen": "b", "rejected": "c"}, "both there"),
        ({"messages": [], "chosen": "b", "rejected": "c"}, "at least one turn"),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "chosen": "b", "rejected": "c"},
            "the last turn is an answer already",
        ),
    ],
)
def test_a_preference_that_is_none_is_refused_with_file_and_line(tmp_path, entry, says):
    with pytest.raises(DataError, match=rf"pairs.jsonl:1: .*{says}"):
        read_pair(tmp_path, entry)


def test_answers_are_encoded_as_completions_and_last_turns_are(tmp_path):
    write_data(tmp_path, chat=True)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    plain = Record(prompt="w8 w9", chosen="w10", rejected="w11 w12", line=1)
    turns = ({"role": "user", "content": "w8 w9"},)
    talk = Record(prompt=turns, chosen="w10", rejected="w11 w12", line=1)
    for answer, ours, said in zip(
        ("w10", "w11 w12"),
        encode_pair(plain, tokenizer, eos_token_id=62),
        encode_pair(talk, tokenizer, eos_token_id=62),
        strict=True,
    ):
        completion = Completion(prompt="w8 w9", completion=answer, accepted=(answer,), line=1)
        assert ours == encode(completion, tokenizer, eos_token_id=62)
        messages = (*turns, {"role": "assistant", "content": answer})
        assert said == encode(Messages(messages=messages, line=1), tokenizer, eos_token_id=62)


def test_a_pair_that_no_row_holds_is_refused_or_left_out(tmp_path):
    write_data(tmp_path)
    words = " ".join(f"w{number}" for number in range(8, 20))
    entries = preferences(range(3)) + [{"prompt": words, "chosen": words, "rejected": "w8"}]
    write_lines(tmp_path / "pairs.jsonl", entries)
    library = Library(Tokenizer.load(tmp_path / "tokenizer"), eos_token_id=62)
    source = [Source(tmp_path / "pairs.jsonl", "preference", 2)]
    options = {"length": 40, "multiples": (1, 4)}
    with pytest.raises(DataError, match=r"pairs.jsonl:4: 44 tokens with both answers in whole blocks"):
        library.corpus(source, overlong="Error", **options)
    with pytest.raises(DataError, match="set data.overlong to Skip"):
        library.corpus(source, overlong="Split", **options)
    corpus = library.corpus(source, overlong="Skip", **options)
    assert (len(corpus), corpus.skipped, len(corpus.once_through)) == (3, 1, 6)
