"""What CrossVLA's public result files hold, rewritten as small fixtures, through `burnish compare`.

Facts: fifty trials a suite. SFT solves 36, 31, 41 and 30 of them; DoRA with seed 42 wins 6, 12, 7, 10 trials that SFT
loses and loses 3, 5, 9, 8 that SFT wins. The paper prints 72/56/70/53 % for SFT, which the files do not hold. Two more
"seeds" of DoRA follow: on Object they are the first one again, trial by trial, and on Long half of the tasks are.
"""

import json

import pytest

from burnish.evaluate.compare import compare

SFT = {"spatial": 36, "object": 31, "goal": 41, "long": 30}
WON_AND_LOST = {"spatial": (6, 3), "object": (12, 5), "goal": (7, 9), "long": (10, 8)}
OTHER_SEEDS = {"spatial": (36, 37), "object": (38, 38), "goal": (39, 39), "long": (32, 32)}
TRIALS = 50


def outcomes(suite):
    """SFT and the three runs of DoRA: 50 flags each, trial t belongs to task t // 5."""
    sft = [t < SFT[suite] for t in range(TRIALS)]
    won, lost = WON_AND_LOST[suite]
    first = [flag if t >= lost else False for t, flag in enumerate(sft)]
    for t in range(SFT[suite], SFT[suite] + won):
        first[t] = True
    seeds = [first]
    for shift, count in enumerate(OTHER_SEEDS[suite], 1):
        if suite == "object":
            seeds.append(list(first))
        else:  # as many successes, elsewhere in the second half of the tasks
            kept = first[:25]
            free = count - sum(kept)
            seeds.append(kept + [(t + 3 * shift) % 25 < free for t in range(25)])
    return sft, seeds


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """sft.jsonl and dora_<seed>.jsonl in the shape of the public files."""
    folder = tmp_path_factory.mktemp("crossvla")
    runs = {"sft": [], "dora_42": [], "dora_1337": [], "dora_2026": []}
    for suite in SFT:
        sft, seeds = outcomes(suite)
        for name, flags in zip(runs, [sft, *seeds], strict=True):
            runs[name] += [
                {"task": f"libero_{suite}/{t // 5}", "trial": t % 5, "success": flag, "steps": 80 + t}
                for t, flag in enumerate(flags)
            ]
    for name, rows in runs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_totals_are_those_of_the_files_and_not_of_the_paper(files):
    found = compare(files / "sft.jsonl", [files / f"dora_{seed}.jsonl" for seed in (42, 1337, 2026)])
    sft, dora = found.overall.rate_a, found.overall.rate_b
    assert (sft.successes, sft.n) == (138, 200) and (dora.successes, dora.n) == (439, 600)
    assert 100 * found.overall.difference == pytest.approx(4.17, abs=0.01)  # not 10.4
    assert found.overall.low < 0 < found.overall.high


@pytest.mark.parametrize(("suite", "p"), [("spatial", 0.51), ("object", 0.14), ("goal", 0.80), ("long", 0.82)])
def test_paired_on_one_seed_no_suite_differs(files, suite, p):
    r = compare(files / "sft.jsonl", files / "dora_42.jsonl", task_regex=suite).overall
    assert (r.only_b, r.only_a) == WON_AND_LOST[suite]
    assert r.p == pytest.approx(p, abs=0.006)


def test_seeds_that_are_the_same_trials_again_are_flagged(files):
    doras = [files / f"dora_{seed}.jsonl" for seed in (42, 1337, 2026)]
    warnings = compare(files / "sft.jsonl", doras, task_regex="object").warnings
    assert [w for w in warnings if "trial-for-trial identical; they count as one" in w] == [
        f"runs {i} and {j} of B are trial-for-trial identical; they count as one" for i, j in ((1, 2), (1, 3), (2, 3))
    ]
    tasks = "long/[01]$"
    assert any("runs 1 and 2 of B" in w for w in compare(files / "sft.jsonl", doras, task_regex=tasks).warnings)
    assert not any("count as one" in w for w in compare(files / "sft.jsonl", doras, task_regex="spatial").warnings)
