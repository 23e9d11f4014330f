from burnish.core.verbs import make_callable

make_callable(__name__, "burnish.evaluate.rollout", "evaluate")
