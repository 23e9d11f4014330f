"""Two gloo ranks: both gradients are averaged first and edited once, so all ranks hold the very same edit (U7)."""

import json

import fake
import numpy as np
from ranks import two_ranks


def rank_main(rank, root, questions, output):
    fake.register()
    from burnish.methods.isolate.objective import Isolate
    from burnish.methods.objective import OBJECTIVES
    from burnish.train import loop

    class Recording(Isolate):
        """Writes down what the first step's edit starts from and ends with."""

        def edit_gradients(self, run, batch, grads):
            if run.step:
                return super().edit_gradients(run, batch, grads)
            local = dict(zip(self._backbone, self._sum, strict=True))
            rows = {"raw": {n: grads[n].flatten().tolist() for n in local}}
            rows["local"] = {n: g.flatten().tolist() for n, g in local.items()}
            figures = super().edit_gradients(run, batch, grads)
            rows["edited"] = {n: grads[n].flatten().tolist() for n in local}
            with open(f"{output}.{rank}.json", "w") as file:
                json.dump(rows, file)
            return figures

    OBJECTIVES.register("recording")(Recording)
    plain = fake.FakePolicy.__init__

    def without_dropout(self, seed=0):
        plain(self, seed)
        self.backbone[3].p = 0.0

    fake.FakePolicy.__init__ = without_dropout
    method = f"--objectives=[{{name: recording, method: agem, questions: {questions}, share: 1.0, turns: 1}}]"
    loop.train(fake.recipe(root, output, method, "--train.steps=3"), progress=False)


def test_two_ranks_edit_the_averages(dataset, questions, tmp_path):
    two_ranks(rank_main, dataset, questions, tmp_path / "run")
    one, two = (json.loads((tmp_path / f"run.{rank}.json").read_text()) for rank in range(2))
    assert one["raw"] == two["raw"] and one["edited"] == two["edited"] and one["local"] != two["local"]
    names = sorted(one["raw"])
    raw, first, second, edited = (
        np.concatenate([rows[n] for n in names])
        for rows in (one["raw"], one["local"], two["local"], one["edited"])
    )  # fmt: skip
    protected = (first + second) / 2
    expected = raw - min(raw @ protected, 0) / (protected @ protected) * protected
    np.testing.assert_allclose(edited, expected, atol=1e-6)
    np.testing.assert_allclose(protected, single_process(questions, names), atol=1e-6)


def single_process(questions, names):
    """The same gradient from one batch as large as both ranks' together."""
    from burnish.core.seeding import derive_seed
    from burnish.data.loader import LanguageData

    policy = fake.FakePolicy().eval()
    data = LanguageData(questions, 10, derive_seed(0, "isolate"))
    policy.language(data.finish(data.raw(0), 0)).mean.backward()
    return np.concatenate([dict(policy.named_parameters())[n].grad.flatten().numpy() for n in names])
