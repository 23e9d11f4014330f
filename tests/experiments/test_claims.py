"""Claims of papers: their verdicts follow from result files, and pages are made of them."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.experiments.claims import TABLE, answer_claims, fill_claims, read_claims
from burnish.experiments.pages import update_pages
from burnish.experiments.results import write_result
from burnish.experiments.variants import START, measure_rows

CHECKOUT = Path(__file__).parents[2]
SAID = {
    "endpoint": "success",
    "lower": ["answer_loss"],
    "margin": 0.1,
    "reference": "plain",
    "stopping": 3,
    "gates": [],
}
FACTS = {"recipe": "r", "command": "c", "commit": "0", "date": "d", "seeds": {}, "hardware": "h", "minutes": 1.0}


def trials(rng, rate):
    return {seed: {i: float(rng.random() < rate) for i in range(120)} for seed in range(3)}


@pytest.fixture
def results(tmp_path):
    rng = np.random.default_rng(2)
    rows = measure_rows({name: trials(rng, rate) for name, rate in
                         (("plain", 0.5), ("good", 0.8), ("bad", 0.2), ("twin", 0.52))}, eval="main")  # fmt: skip
    loss = {"base": {START: dict.fromkeys(range(50), 0.5) | {0: 0.6}}}
    loss["plain"] = {seed: {i: 0.9 + 0.01 * rng.random() for i in range(50)} for seed in range(3)}
    rows += measure_rows(loss, shares=False, eval="answer_loss")
    runs = {f"good-{seed}": {"shed": 0.002 + 0.001 * seed} for seed in range(3)}
    write_result(tmp_path / "study.json", rows=rows, declared=SAID, metrics={"runs": runs}, **FACTS)
    gates = [{"name": "headroom", "measure": "success", "check": "plain <= 0.1"}]
    write_result(tmp_path / "gated.json", rows=rows, declared=SAID | {"gates": gates}, **FACTS)
    write_json(tmp_path / "bench_x.json", {"name": "x", "n": 5, "device": "d", "figures": {"ratio": 1.5, "signs": 0.8}})
    return tmp_path


@pytest.mark.parametrize(
    "claim, verdict",
    [
        ({"arm": "good", "against": "plain"}, "holds"),
        ({"arm": "good", "against": "plain", "room": "plain >= 0.4"}, "holds"),
        ({"arm": "good", "against": "plain", "room": "plain >= 0.9"}, "void"),
        ({"arm": "good", "against": "plain", "room": "nobody >= 0.4"}, "void"),
        ({"arm": "good", "against": "plain", "expect": "equivalent", "room": "bad <= 0.1"}, "void"),
        ({"arm": "bad", "against": "plain"}, "does not hold"),
        ({"arm": "bad", "against": "good", "expect": "worse"}, "holds"),
        ({"arm": "twin", "against": "plain", "expect": "better"}, "undecided"),
        ({"arm": "good", "against": "twin", "expect": "equivalent"}, "does not hold"),
        ({"arm": "good", "against": "plain", "expect": "not worse"}, "holds"),
        ({"arm": "bad", "against": "plain", "expect": "not worse"}, "does not hold"),
        ({"arm": "good", "against": "plain", "expect": ">= 0.1"}, "holds"),
        ({"arm": "good", "against": "plain", "expect": ">= 0.9"}, "does not hold"),
        ({"arm": "bad", "expect": "<= 0.5"}, "holds"),
        ({"arm": "plain", "against": "start", "measure": "answer_loss", "expect": "worse"}, "holds"),
        ({"arm": "good", "logged": "shed", "expect": "<= 0.01"}, "holds"),
        ({"arm": "good", "logged": "shed", "expect": "<= 0.003"}, "undecided"),
        ({"arm": "nobody", "against": "plain"}, "not tested"),
        ({"arm": "good", "against": "plain", "result": "gated"}, "void"),
        ({"arm": "good", "against": "plain", "result": "absent"}, "not tested"),
        ({"figure": "ratio", "expect": ">= 1.4", "result": "bench_x"}, "holds"),
        ({"figure": "ratio", "expect": "<= 1.4", "result": "bench_x"}, "does not hold"),
        ({"figure": "signs", "expect": "<= 0.7", "result": "bench_x"}, "does not hold"),
        ({"figure": "signs", "share": True, "expect": "<= 0.7", "result": "bench_x"}, "undecided"),
        ({"figure": "signs", "share": True, "expect": ">= 0.3", "result": "bench_x"}, "holds"),
    ],
)  # fmt: skip
def test_verdicts(results, claim, verdict):
    path = results / "claims.yaml"
    path.write_text(yaml.safe_dump({"claims": [{"claim": "it helps", "result": "study", **claim}]}))
    (answer,) = answer_claims(read_claims(path), results)
    assert answer.verdict == verdict, answer
    assert bool(answer.ours) == (verdict != "not tested")


def test_claims_of_one_study_are_adjusted_together(results):
    path = results / "claims.yaml"
    weak = {"claim": "twins", "result": "study", "arm": "good", "against": "plain"}
    path.write_text(yaml.safe_dump({"claims": [weak] * 3}))
    assert {answer.verdict for answer in answer_claims(read_claims(path), results)} == {"holds"}
    won = {"a": range(60), "b": [*range(60), 63, 72, 81, 90, 99]}
    rows = measure_rows({arm: {seed: {i: float(i in some and i != seed) for i in range(100)} for seed in range(3)}
                         for arm, some in won.items()})  # fmt: skip
    write_result(results / "study.json", rows=rows, declared=SAID | {"reference": "a", "margin": 0.001}, **FACTS)
    claim = {"claim": "b", "result": "study", "arm": "b", "against": "a"}
    for count, verdict in ((1, "holds"), (60, "undecided")):
        path.write_text(yaml.safe_dump({"claims": [claim] * count}))
        assert {answer.verdict for answer in answer_claims(read_claims(path), results)} == {verdict}


@pytest.mark.parametrize("states, verdict", [(20, "undecided"), (120, "holds")])
def test_a_few_states_do_not_show_that_nothing_is_lost(results, states, verdict):
    """One of twenty that differs makes a narrow interval; twenty that never do could have missed a lot."""
    rows = measure_rows({arm: {seed: {i: float(i == seed and arm == "b") for i in range(states)} for seed in range(3)}
                         for arm in "ab"})  # fmt: skip
    write_result(results / "study.json", rows=rows, declared=SAID | {"reference": "a"}, **FACTS)
    claims = [{"claim": "c", "result": "study", "arm": "b", "against": "a", "expect": expect}
              for expect in ("not worse", "equivalent")]  # fmt: skip
    (results / "claims.yaml").write_text(yaml.safe_dump({"claims": claims}))
    assert {one.verdict for one in answer_claims(read_claims(results / "claims.yaml"), results)} == {verdict}


def test_pages_are_written_and_a_headline_is_a_sentence(results):
    root = results / "checkout"
    (root / "docs").mkdir(parents=True)
    (root / "results").symlink_to(results)
    claims = [{"claim": "it helps", "paper": "P", "method": "align", "number": "98 %", "result": "study", "arm": "good",
               "against": "plain", "headline": True, "setting": "a tiny study"},
              {"claim": "more", "result": "none", "needs": "a robot"}]  # fmt: skip
    (root / TABLE).write_text(yaml.safe_dump({"claims": claims}))
    blocks = "".join(f"<!-- claims:{what} -->\n<!-- /claims -->\n" for what in ("all", "summary", "align"))
    (root / "README.md").write_text(blocks)
    assert update_pages(root) == [root / "README.md"] and update_pages(root, check=True) == []
    page = (root / "README.md").read_text()
    assert "| P | it helps | 98 % | +" in page and "| **holds** | `c` |" in page and "needs a robot" in page
    assert "Of 2 claims of the papers: 1 hold, 1 are not tested." in page
    assert page.count("Where a tiny study, good changes success over plain by +") == 2
    assert "the claim holds here (it helps)." in page


@pytest.mark.parametrize(
    "entry, message",
    [({"claim": "x", "result": "y", "arm": "a", "expect": "maybe"}, "expects 'maybe'"), ({"claim": "x"}, "lacks claim"),
     ({"claim": "x", "result": "y", "arm": "a"}, "compared with nothing"), ({"clam": "x"}, "unknown"),
     ({"claim": "x", "result": "y", "arm": "a", "against": "b", "logged": "z"}, "compared with nothing"),
     ({"claim": "x", "result": "y", "arm": "a", "against": "b", "room": "some"}, "has room 'some'"),
     (3, "no list of claims")],
)  # fmt: skip
def test_tables_that_cannot_be_read(tmp_path, entry, message):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"claims": [entry]}))
    with pytest.raises(BurnishError, match=message):
        read_claims(tmp_path / "c.yaml")


def test_the_committed_table_has_the_claims_of_all_papers():
    claims, methods = read_claims(CHECKOUT / TABLE), ["align", "capability", "decode", "isolate", "prefer"]
    assert len(claims) >= 25 and {claim.method for claim in claims} >= {*methods}
    answers = answer_claims(claims, CHECKOUT / "results")
    assert all(answer.verdict != "not tested" or answer.claim.needs for answer in answers)
    heads = [claim.method for claim in claims if claim.headline]
    assert {*heads} >= {*methods} and len({*heads}) == len(heads)
    assert fill_claims("<!-- claims:none -->\n<!-- /claims -->", answers) == "<!-- claims:none -->\n\n<!-- /claims -->"
