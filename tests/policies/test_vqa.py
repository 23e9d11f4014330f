import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import BurnishError
from burnish.policies import vqa
from workshop.tiny import NANO_TEXTS, build_tokenizer

TOKENIZER = build_tokenizer(NANO_TEXTS, 384)
EOS = "<end_of_utterance>"


def learned(encoded, row):
    return TOKENIZER.decode([x for x in encoded.labels[row].tolist() if x != vqa.IGNORE])


def test_one_turn_reads_as_the_template_says():
    encoded = vqa.encode(TOKENIZER, "<image>", 3, ["how many cubes?"], ["12"])
    assert TOKENIZER.decode(encoded.input_ids[0]) == f"{'<image>' * 3}Question: how many cubes?\nAnswer: 12{EOS}"
    assert learned(encoded, 0) == f" 12{EOS}"
    assert encoded.attention_mask.all()


def test_several_turns_learn_every_answer():
    encoded = vqa.encode(TOKENIZER, "<image>", 2, [["is it red?", "how many?"], ["left?"]], [["yes", "3"], ["no"]])
    said = f"<image><image>Question: is it red?\nAnswer: yes{EOS}\nQuestion: how many?\nAnswer: 3{EOS}"
    assert TOKENIZER.decode(encoded.input_ids[0]) == said
    assert learned(encoded, 0) == f" yes{EOS} 3{EOS}"
    padding = encoded.attention_mask[1] == 0
    assert padding.any() and (encoded.input_ids[1][padding] == TOKENIZER.pad_token_id).all()
    assert (encoded.labels[1][padding] == vqa.IGNORE).all()


def test_numbers_are_spelt_digit_by_digit():
    tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER("2048", add_special_tokens=False)["input_ids"])
    assert tokens == ["2", "0", "4", "8"]


@given(st.text(min_size=1), st.text(min_size=1))
def test_prompt_tokens_do_not_depend_on_the_answer(question, answer):
    open_ = vqa.encode(TOKENIZER, -1, 0, [question], None, bos=True).input_ids[0]
    closed = vqa.encode(TOKENIZER, -1, 0, [question], [answer], bos=True)
    assert closed.input_ids[0, : len(open_)].equal(open_) and open_[0] == TOKENIZER.bos_token_id
    assert (closed.labels[0] == vqa.IGNORE).sum() == len(open_)


def test_token_losses_are_log_softmax_of_the_next_token():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 6, 5, generator=g), torch.randn(11, 5, generator=g)
    labels = torch.full((2, 6), vqa.IGNORE)
    labels[0, 3:5], labels[1, 5] = torch.tensor([4, 9]), 2
    loss = vqa.token_losses(hidden, labels, lambda h: h @ weight.T)
    log_p = (hidden @ weight.T).log_softmax(-1)
    expected = torch.zeros(2, 6)
    for b, s in ((0, 3), (0, 4), (1, 5)):
        expected[b, s] = -log_p[b, s - 1, labels[b, s]]
    torch.testing.assert_close(loss.per_token, expected)
    torch.testing.assert_close(loss.mean, expected.sum() / 3)
    assert loss.mask.equal(labels != vqa.IGNORE)


@pytest.mark.parametrize(
    ("questions", "answers", "said"),
    [
        (["a", "b"], ["c"], "2 questions"),
        ([["a", "b"]], None, "several questions"),
        (["what is an <image>?"], ["x"], "image token"),
        ([[]], [[]], "without questions"),
    ],
)
def test_bad_questions(questions, answers, said):
    with pytest.raises(BurnishError, match=said):
        vqa.encode(TOKENIZER, "<image>", 1, questions, answers)


def test_decode_stops_at_eos():
    ids = TOKENIZER(f" red{EOS} blue", add_special_tokens=False)["input_ids"]
    assert vqa.decode(TOKENIZER, ids) == "red"
