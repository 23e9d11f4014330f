"""Questions and answers as token sequences: the one template that training and measuring share.

A sequence is the image tokens, then one or more turns:

    Question: what colour is the cube?\nAnswer: red<eos>
    \nQuestion: how many cubes?\nAnswer: 2<eos>

Only answers, each with its closing <eos>, are learned. Prompts and answers are tokenised apart, so the tokens of a
prompt are the same whether an answer follows or is to be generated.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.errors import BurnishError
from burnish.core.types import LanguageLoss

PROMPT = "Question: {question}\nAnswer:"
ANSWER = " {answer}"
NEXT_TURN = "\n"
IGNORE = -100
"""Label of a token that is not learned, as in transformers."""


class Encoded(NamedTuple):
    """Right-padded sequences.

    Args:
        input_ids: [B, S] int64.
        attention_mask: [B, S] int64, 1 on real tokens.
        labels: [B, S] int64, equal to input_ids on answers and IGNORE elsewhere (not shifted, as transformers wants).
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def encode(tokenizer: Any, image_token: str | int, num_image_tokens: int,
           questions: Sequence[str] | Sequence[Sequence[str]],
           answers: Sequence[str] | Sequence[Sequence[str]] | None, *, bos: bool = False) -> Encoded:  # fmt: skip
    """Turn questions and answers into one right-padded sequence for each image.

    Args:
        tokenizer: a fast transformers tokenizer with an eos token.
        image_token: placeholder of the image, as a token or an id.
        num_image_tokens: how many of them lead the sequence (0 where image embeddings are joined by hand).
        questions: B questions, or B lists of questions for several turns about one image.
        answers: as `questions`; None leaves the prompt open for generation (one turn only).
        bos: put the tokenizer's bos token after the image, as PaliGemma was trained.
    """
    turns = [[q] if isinstance(q, str) else list(q) for q in questions]
    replies = None if answers is None else [[a] if isinstance(a, str) else list(a) for a in answers]
    _check_turns(turns, replies, tokenizer)
    prompts = [(NEXT_TURN if i else "") + PROMPT.format(question=q) for turn in turns for i, q in enumerate(turn)]
    prompt_ids = _tokenise(tokenizer, prompts)
    answer_ids = None
    if replies is not None:
        answer_ids = _tokenise(tokenizer, [ANSWER.format(answer=a) for reply in replies for a in reply])
    image_id = tokenizer.convert_tokens_to_ids(image_token) if isinstance(image_token, str) else image_token
    if any(image_id in ids for ids in prompt_ids + (answer_ids or [])):
        raise BurnishError(f"a question or answer holds the image token {image_token!r}", "plain text")
    lead = [image_id] * num_image_tokens + ([tokenizer.bos_token_id] if bos else [])
    sequences, labels = _join(lead, [len(turn) for turn in turns], prompt_ids, answer_ids, tokenizer.eos_token_id)
    return _pad(sequences, labels, tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def token_losses(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], at: Tensor | None = None
) -> LanguageLoss:
    """Next-token losses of the answers; the head runs on answer tokens only, as vocabularies are wide.

    Args:
        hidden: [B, S, D] last hidden states (after the final norm).
        labels: [B, S] with IGNORE off the answers.
        head: maps [N, D] to [N, vocabulary] logits.
        at: long [N, 2], row and column of the answers' tokens, in order; to look for them, a GPU's host would wait.
    """
    mask = labels != IGNORE
    rows, columns = (mask.nonzero() if at is None else at).unbind(1)
    losses = F.cross_entropy(head(hidden[rows, columns - 1]).float(), labels[rows, columns], reduction="none")
    per_token = torch.zeros(labels.shape, dtype=losses.dtype, device=losses.device)
    return LanguageLoss(per_token.index_put((rows, columns), losses), mask)


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The answer in generated tokens: everything before the first eos, without surrounding blanks."""
    ids = list(tokens)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def _check_turns(turns: list[list[str]], replies: list[list[str]] | None, tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise BurnishError("the tokenizer has no eos token", "one, to end an answer with")
    if replies is None:
        if any(len(turn) != 1 for turn in turns):
            raise BurnishError("several questions without answers", "one open question for each image")
    elif [len(turn) for turn in turns] != [len(reply) for reply in replies]:
        raise BurnishError(f"{sum(map(len, turns))} questions on {len(turns)} images and "
                           f"{sum(map(len, replies))} answers on {len(replies)} images",
                           "as many answers as questions")  # fmt: skip
    if not turns or not all(turns):
        raise BurnishError("an image without questions", "at least one question for each image")


def _tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, padding=False, return_attention_mask=False)["input_ids"]


def _join(lead: list[int], counts: list[int], prompts: list[list[int]], answers: list[list[int]] | None,
          eos: int) -> tuple[list[list[int]], list[list[int]]]:  # fmt: skip
    """Sequences and labels of `counts` turns each, from prompts and answers laid end to end."""
    sequences, labels, start = [], [], 0
    for count in counts:
        sequence, label = list(lead), [IGNORE] * len(lead)
        for turn in range(start, start + count):
            sequence += prompts[turn]
            label += [IGNORE] * len(prompts[turn])
            if answers is not None:
                sequence += [*answers[turn], eos]
                label += [*answers[turn], eos]
        sequences.append(sequence)
        labels.append(label)
        start += count
    return sequences, labels


def _pad(sequences: list[list[int]], labels: list[list[int]], pad: int) -> Encoded:
    width = max(map(len, sequences))
    return Encoded(torch.tensor([sequence + [pad] * (width - len(sequence)) for sequence in sequences]),
                   torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences]),
                   torch.tensor([label + [IGNORE] * (width - len(label)) for label in labels]))  # fmt: skip
