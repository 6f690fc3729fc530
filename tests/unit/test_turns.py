"""Several turns of a conversation learnt in one row: each as if the conversation ended with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from support.models import TINY, packed_row, random_tokens, tiny_model
from support.training import EOS, write_data, write_lines
from unmask.attention import CLEAN
from unmask.diffusion import layout
from unmask.diffusion.losses import summed_loss
from unmask.diffusion.noise import Corruption, NoiseConfig, corrupt
from unmask.errors import ModelError
from unmask.models.tokenizer import Tokenizer
from unmask.training.corpus import Library, Source
from unmask.training.encoding import encode
from unmask.training.packing import make_rows
from unmask.training.records import Messages
from unmask.training.stream import DocumentStream

pytestmark = pytest.mark.training

MASK = TINY["mask_token_id"]
BLOCK = 8
SPANS = [(2, 4), (6, 13), (14, 24)]
"""Three answers; the first two share block 0 and the last two block 1."""


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def conversation(tokens, spans=SPANS, **place):
    """A row of one conversation whose turns are learnt."""
    rows = packed_row(tokens, **({"length": len(tokens)} | place))
    turn = np.full(rows.shape, -1, np.int64)
    for number, (start, stop) in enumerate(spans):
        turn[0, start:stop] = number
    return replace(rows, turn=turn, supervised=turn >= 0)


def up_to(tokens, span):
    """The same conversation ending with one turn, which alone is learnt; blocks are filled up."""
    start, stop = span
    width = -(-stop // BLOCK) * BLOCK
    return packed_row([*tokens[:stop], *[EOS] * (width - stop)], length=width, prompt=[start])


def drawn(rows, **config):
    return corrupt(rows, NoiseConfig(**config), seed=4, block_length=BLOCK)


def part_of(noise, rows):
    """The lots that fell on the first tokens, for ``rows`` that hold no more."""
    width = rows.shape[1]
    struck = noise.struck[:, :, :width]
    return Corruption(struck & rows.supervised, noise.ratio[:, :, :width], struck)


def two_copy(rows, noise, **options):
    return layout.two_copy(rows, noise, block_length=BLOCK, mask_token_id=MASK, eos_token_id=EOS, **options)


def loss_of(model, inputs):
    return summed_loss(model.hidden(inputs.ids, inputs.metadata), model.logits, inputs)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("objective", ["blocks", "full"])
def test_turns_together_are_conversations_that_end_with_each(model, objective, flat, views):
    tokens = random_tokens(24)
    rows = conversation(tokens)
    noise = drawn(rows, views=views, complementary=views == 2, weight="flat" if flat else "elbo")

    def run(rows, noise):
        if objective == "full":
            return layout.full_sequence(rows, noise, mask_token_id=MASK, flat=flat)
        return two_copy(rows, noise, flat=flat)

    if objective == "blocks":
        alone = [up_to(tokens, span) for span in SPANS]
    else:
        alone = [packed_row(tokens[:stop], length=stop, prompt=[start]) for start, stop in SPANS]
    separate = [run(one, part_of(noise, one)) for one in alone]
    together = run(rows, noise)
    assert together.normaliser == sum(one.normaliser for one in separate)
    ours = loss_of(model, together)
    theirs = torch.stack([loss_of(model, one) for one in separate]).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for one, other in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        assert torch.allclose(one, other, atol=1e-11)


def logits_of_turn(model, inputs, number, count):
    """Predictions of the tokens of one turn in view 1."""
    meta = inputs.metadata
    own = (meta.view[0] == number + 1).nonzero()[:, 0]
    return model.logits(model.hidden(inputs.ids, inputs.metadata))[0, own], meta.position[0, own], count


@pytest.mark.parametrize("changed", [slice(4, 6), slice(6, 13), slice(13, 14), slice(14, 24)])
def test_no_turn_sees_what_comes_after_it_even_in_its_own_block(model, changed):
    tokens = random_tokens(24)
    noise = drawn(conversation(tokens), low=0.4, high=0.7)
    other = tokens.copy()
    other[changed] = [(token + 7) % 60 for token in tokens[changed]]
    first, second = (two_copy(conversation(ids), noise) for ids in (tokens, other))
    for number, (_, stop) in enumerate(SPANS):
        if stop <= changed.start:
            ours, theirs = (logits_of_turn(model, inputs, number, stop)[0] for inputs in (first, second))
            assert torch.allclose(ours, theirs, atol=1e-12)


def test_no_turn_sees_how_an_earlier_one_is_masked(model):
    tokens = random_tokens(24)
    rows = conversation(tokens)
    noise = drawn(rows, low=0.4, high=0.7)
    struck = noise.struck.copy()
    struck[..., 2:4] = ~struck[..., 2:4]
    first, second = (two_copy(rows, one) for one in (noise, replace(noise, struck=struck)))
    for number in (1, 2):
        ours, theirs = (logits_of_turn(model, inputs, number, 0)[0] for inputs in (first, second))
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_learnt_together_turns_of_one_block_would_see_each_other(model):
    """What the turns are kept apart for: without, the first answer is predicted from the second question."""
    tokens = random_tokens(24)
    rows = replace(conversation(tokens), turn=None)
    noise = drawn(rows, low=0.4, high=0.7)
    other = tokens.copy()
    other[5] = (tokens[5] + 7) % 60
    ours, theirs = (
        logits_of_turn(model, two_copy(replace(rows, ids=np.array([ids])), noise), 0, 0)[0][2:4]
        for ids in (tokens, other)
    )
    assert (ours - theirs).abs().max() > 1e-3


def test_the_clean_copy_is_there_once_and_noisy_ones_hold_the_turns_blocks_alone():
    rows = conversation(random_tokens(24))
    meta = two_copy(rows, drawn(rows)).metadata
    tokens = {view: int((meta.view == view).sum()) for view in meta.view.unique().tolist()}
    assert tokens == {CLEAN: 16, 1: 8, 2: 16, 3: 16}


def test_one_turn_alone_is_an_answer_as_before(model):
    tokens = random_tokens(16)
    turns = conversation(tokens, [(5, 16)])
    plain = packed_row(tokens, length=16, prompt=[5])
    noise = drawn(plain)
    ours, theirs = two_copy(turns, noise), two_copy(plain, noise)
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.weights, theirs.weights)
    assert ours.normaliser == theirs.normaliser


TURNS = [("user", "w9"), ("assistant", "w10 w11"), ("user", "w12"), ("assistant", "w13")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
USER, ASSISTANT = 2, 3


def test_every_turn_of_the_assistant_is_an_answer_and_tokens_are_those_of_the_last_turn_alone(tmp_path):
    write_data(tmp_path, chat=True)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    record = Messages(messages=tuple(MESSAGES), line=1)
    every = encode(record, tokenizer, eos_token_id=EOS, turns=True)
    last = encode(record, tokenizer, eos_token_id=EOS)
    assert every.ids == last.ids == [USER, 9, ASSISTANT, 10, 11, USER, 12, ASSISTANT, 13, EOS]
    assert (every.prompt_length, every.turns) == (3, ((3, 5), (8, 10)))
    assert (last.prompt_length, last.turns) == (8, ())


def test_a_template_that_changes_what_it_wrote_is_refused(tmp_path):
    write_data(tmp_path, chat=True)
    template = "{{ messages | length }}{% for m in messages %} {{ m.content }}{% endfor %}"
    names = f'{{"eos_token": "<eos>", "chat_template": "{template}"}}'
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(names, encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    with pytest.raises(ModelError, match="chat template"):
        encode(Messages(messages=tuple(MESSAGES), line=1), tokenizer, eos_token_id=EOS, turns=True)


def test_rows_say_which_turn_each_token_belongs_to_and_what_fills_the_last_block_to_the_last(tmp_path):
    write_data(tmp_path, chat=True)
    write_lines(tmp_path / "chats.jsonl", [{"messages": MESSAGES}, {"messages": MESSAGES[:2]}])
    library = Library(Tokenizer.load(tmp_path / "tokenizer"), eos_token_id=EOS)
    source = Source(tmp_path / "chats.jsonl", "messages")
    corpus = library.corpus([source], length=32, overlong="Error", turns=True)
    layout = DocumentStream(corpus, seed=0, stage=0).step(0, rows=1, length=32, multiple=8)
    rows = make_rows(layout, corpus, rank=0, world=1, responses_only=True, eos_token_id=EOS, pad_token_id=EOS)
    long = [-1] * 3 + [0, 0] + [-1] * 3 + [1] * 8
    short = [-1] * 3 + [0] * 5
    order = (short + long, long + short)[int(rows.ids[0, 5] == USER)]
    assert rows.turn[0, :24].tolist() == order
    assert np.array_equal(rows.supervised, rows.turn >= 0)
    assert library.digest(source, turns=True) != library.digest(source)
