"""The evidence bound by Monte Carlo against its value, worked out mask by mask."""

import itertools

import numpy as np
import pytest
import torch

from support.folders import served_folder
from support.models import packed_row, random_tokens, tiny_canvas_model, tiny_model
from support.training import exercise, write_lines
from unmask.attention import AttentionMetadata
from unmask.diffusion.noise import NoiseConfig
from unmask.errors import UsageError
from unmask.evaluation.likelihood import exact_nll, nll_draws
from unmask.evaluation.perplexity import data_rows, perplexity
from unmask.evaluation.subject import Subject
from unmask.training.corpus import Source

MASK = 63


def coefficient(masked, size, smallest):
    """The mean over t of t^masked (1 - t)^(size - masked) / t, with t uniform but never below ``smallest``.

    Gauss-Legendre with ``size`` nodes is exact: the integrand is a polynomial of a lower degree.
    """

    def integrand(t):
        return t ** (masked - 1) * (1 - t) ** (size - masked)

    nodes, weights = np.polynomial.legendre.leggauss(size + 1)
    t = smallest + (1 - smallest) * (nodes + 1) / 2
    return smallest * integrand(smallest) + (1 - smallest) / 2 * float(weights @ integrand(t))


def nll_of(model, tokens, places, *, block_length):
    """Sum of the negative log-likelihoods at masked ``places`` of the last block, the rest being given."""
    noisy = [MASK if place in places else token for place, token in enumerate(tokens)]
    with torch.no_grad():
        hidden = model.hidden(
            torch.tensor([noisy]), AttentionMetadata.single_row(len(tokens), block_length=block_length)
        )
        log_p = torch.log_softmax(model.logits(hidden[0]).double(), -1)
    return -sum(float(log_p[place, tokens[place]]) for place in places)


def bound_by_enumeration(model, tokens, *, prompt, block_length, smallest=0.0):
    """Every block, every set of masks in it, weighed by how often the noise draws it."""
    total = 0.0
    for start in range(0, len(tokens), block_length):
        stop = min(start + block_length, len(tokens))
        open_places = [place for place in range(start, stop) if place >= prompt]
        for count in range(1, len(open_places) + 1):
            for places in itertools.combinations(open_places, count):
                nll = nll_of(model, tokens[:stop], places, block_length=block_length)
                total += coefficient(count, len(open_places), smallest) * nll
    return total


SMALLEST = {"training": NoiseConfig().smallest, "counted": 0.0}
DRAWS = {"training": 10_000, "counted": 1000}  # rare masks of a small ratio weigh much
ERROR = {"training": 0.03, "counted": 0.012}


@pytest.mark.parametrize("masks", ["training", "counted"])
@pytest.mark.parametrize(("prompt", "block_length"), [(0, 1), (0, 2), (0, 3), (2, 3), (3, 5)])
def test_the_bound_by_blocks_is_its_value_within_the_error_that_it_states(prompt, block_length, masks):
    model, tokens = tiny_model(), random_tokens(5, seed=4)
    settings = {"prompt": prompt, "block_length": block_length}
    exact = bound_by_enumeration(model, tokens, smallest=SMALLEST[masks], **settings)
    rows = packed_row(tokens, length=5, prompt=[prompt])
    draws = nll_draws(
        model, rows, bound="block", block_length=block_length, draws=DRAWS[masks], seed=0, masks=masks
    )[:, 0]
    error = draws.std(ddof=1) / len(draws) ** 0.5
    assert abs(draws.mean() - exact) <= max(3.5 * error, 1e-9)
    assert error < ERROR[masks] * exact


@pytest.mark.parametrize("masks", ["training", "counted"])
@pytest.mark.parametrize("model", [tiny_model(), tiny_canvas_model()], ids=["blocks", "canvas"])
@pytest.mark.parametrize("prompt", [0, 2])
def test_the_bound_over_whole_documents_is_its_value_within_the_error_that_it_states(model, prompt, masks):
    tokens = random_tokens(5, seed=4)
    exact = bound_by_enumeration(model, tokens, prompt=prompt, block_length=5, smallest=SMALLEST[masks])
    rows = packed_row(tokens, length=5, prompt=[prompt])
    draws = nll_draws(model, rows, bound="full", block_length=1, draws=DRAWS[masks], seed=0, masks=masks)[
        :, 0
    ]
    error = draws.std(ddof=1) / len(draws) ** 0.5
    assert abs(draws.mean() - exact) <= 3.5 * error
    assert error < ERROR[masks] * exact


def test_blocks_of_one_token_give_the_likelihood_itself():
    """No mask but one is ever drawn, and the chain rule adds up."""
    model, tokens = tiny_model(), random_tokens(6, seed=2)
    rows = packed_row(tokens, length=6)
    draws = nll_draws(model, rows, bound="block", block_length=1, draws=2, seed=0, masks="counted")
    chain = sum(nll_of(model, tokens[: place + 1], [place], block_length=1) for place in range(len(tokens)))
    exact = bound_by_enumeration(model, tokens, prompt=0, block_length=1)
    assert exact == pytest.approx(chain, rel=1e-9)
    assert draws[0, 0] == draws[1, 0] == pytest.approx(chain, rel=1e-6)


@pytest.mark.parametrize("masks", ["training", "counted"])
@pytest.mark.parametrize("bound", ["block", "full"])
@pytest.mark.parametrize("positions", [1, 40, 100_000])
def test_neither_packing_nor_the_size_of_a_forward_changes_a_draw(bound, positions, masks):
    model = tiny_model()
    documents = [random_tokens(length, seed=length) for length in (7, 8, 3)]
    together = packed_row(*documents, length=20)
    draws = nll_draws(
        model, together, bound=bound, block_length=4, draws=5, seed=3, masks=masks, positions=positions
    )
    assert draws.shape == (5, 3)
    for number, document in enumerate(documents):
        alone = packed_row(document, length=len(document), first_ordinal=number)
        single = nll_draws(model, alone, bound=bound, block_length=4, draws=5, seed=3, masks=masks)
        assert np.allclose(draws[:, number], single[:, number], rtol=1e-9)


def test_an_autoregressive_model_has_its_likelihood():
    model = tiny_model(architectures=["BailingMoeV2ForCausalLM"])
    documents = [random_tokens(length, seed=length) for length in (7, 1, 4)]
    nll, terms = exact_nll(model, packed_row(*documents, length=12))
    assert terms.tolist() == [6, 0, 3]
    for number, tokens in enumerate(documents):
        with torch.no_grad():
            hidden = model.hidden(
                torch.tensor([tokens]), AttentionMetadata.single_row(len(tokens), block_length=1)
            )
            log_p = torch.log_softmax(model.logits(hidden[0]).double(), -1)
        by_hand = -sum(float(log_p[place, token]) for place, token in enumerate(tokens[1:]))
        assert nll[number] == pytest.approx(by_hand, abs=1e-6)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject.load(served_folder(tmp_path_factory.mktemp("model") / "golden", block_length=4))


@pytest.fixture
def source(tmp_path):
    write_lines(tmp_path / "data.jsonl", [exercise(number) for number in range(6)])
    return Source(tmp_path / "data.jsonl", "completion")


def test_the_perplexity_of_a_data_set_is_that_of_its_documents(subject, source):
    found = perplexity(subject, [source], draws=16, responses_only=True)
    rows, tokens, _ = data_rows(
        subject, [source], length=64, multiple=4, overlong="Error", responses_only=True
    )
    draws = nll_draws(subject.model, rows, bound="block", block_length=4, draws=16, seed=0)
    assert (found.bound, found.block_length, found.documents, found.draws) == ("block", 4, 6, 16)
    assert (
        found.tokens == tokens == sum(len(exercise(number)["completion"].split()) + 1 for number in range(6))
    )
    per_token = draws.sum(1) / tokens
    assert found.nll_per_token == pytest.approx(per_token.mean())
    assert found.nll_standard_error == pytest.approx(per_token.std(ddof=1) / 4)
    assert found.perplexity == pytest.approx(np.exp(per_token.mean()))
    assert found.perplexity_standard_error == pytest.approx(found.perplexity * found.nll_standard_error)
    assert found.bits_per_token == pytest.approx(np.log2(found.perplexity))
    assert perplexity(subject, [source], draws=16, responses_only=True) == found
    assert perplexity(subject, [source], draws=16, responses_only=True, seed=1) != found


def test_more_draws_have_a_smaller_error_and_agree(subject, source):
    few, many = (perplexity(subject, [source], draws=draws, seed=5) for draws in (20, 320))
    assert many.nll_standard_error < 0.5 * few.nll_standard_error
    error = (few.nll_standard_error**2 + many.nll_standard_error**2) ** 0.5
    assert abs(few.nll_per_token - many.nll_per_token) < 4 * error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"draws": 1}, "draws: got 1, expected at least 2"),
        ({"block_length": 10_000}, "block length: got 10000, expected 1 to"),
    ],
)
def test_what_cannot_be_measured_is_refused(subject, source, options, says):
    with pytest.raises(UsageError, match=says):
        perplexity(subject, [source], **options)
