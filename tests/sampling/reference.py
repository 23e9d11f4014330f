"""Decoders written once more, as plainly as the specification puts them: one sample, lists, no cache.

Every pass computes the whole sequence anew with a mask built entry by entry.
"""

import torch

from burnish.sampling.token_model import Prompt


def mask_of(model, valid):
    """bool [P + L, P + L] from the rule blk(row) >= blk(slot), the prompt being block 0."""
    size, length = len(valid), model.length
    block = [0] * size + [1 + i // model.block for i in range(length)]
    rows = [
        [block[q] >= block[s] and (s >= size or bool(valid[s])) for s in range(size + length)]
        for q in range(size + length)
    ]
    return torch.tensor(rows)


def logits_of(model, prompt, ids, mask):
    """Logits that tell positions 0 .. R - 1, shifted where the model is."""
    size = prompt.valid.shape[1]
    cache = model.empty(prompt)
    rows = len(ids)
    visible = mask[None, size : size + rows, : size + rows]
    logits = model.whole(prompt, torch.tensor(ids)[None], visible, cache)[0]
    if model.shift:
        logits = torch.cat((cache.prompt_logits, logits[:-1]))
    return logits


def pipelined(model, prompt, block, add, act, conf, share, rule):
    """Ids, commit passes and number of passes of one sample; `rule` is floor, ceil or one."""
    assert len(prompt.states) == 1
    prompt = Prompt(prompt.states, prompt.valid)
    mask = mask_of(model, prompt.valid[0])
    num, length, masked = model.length // block, model.length, model.mask_id
    ids, committed, opened, full = [masked] * length, [0] * length, 1, [True] + [False] * (num - 1)
    passes = 0

    def ratio(i):
        return sum(token != masked for token in ids[i * block : (i + 1) * block]) / block

    while masked in ids:
        assert passes < 500, "stall"
        if passes and opened < num and ratio(opened - 1) >= add:
            opened += 1
        for i in range(1, opened):
            if ratio(i - 1) >= act:
                full[i] = True
        logits = logits_of(model, prompt, ids[: opened * block], mask)
        passes += 1
        sure, told = logits.softmax(-1).max(-1)
        sure, told = sure.tolist(), told.tolist()
        for i in range(opened):
            left = [p for p in range(i * block, (i + 1) * block) if ids[p] == masked]
            if not left:
                continue
            bar = conf
            if full[i]:
                count = {"floor": max(1, len(left) // share), "ceil": -(-len(left) // share), "one": 1}[rule]
                bar = min(bar, sorted((sure[p] for p in left), reverse=True)[count - 1])
            for p in left:
                if sure[p] >= bar:
                    ids[p], committed[p] = told[p], passes
    return ids, committed, passes
