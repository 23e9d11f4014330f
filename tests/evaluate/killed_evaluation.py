"""Run by test_kill.py in a process of its own: python killed_evaluation.py OUTPUT.

Its simulators read this file again: what only the evaluation needs is imported below.
"""

import sys

import evaluation_fakes as fakes

if __name__ == "__main__":
    from burnish.evaluate.rollout import evaluate

    fakes.register()
    policy = fakes.make_policy(slow=0.01)
    evaluate(
        policy, "line", episodes=20, output=sys.argv[1], workers=2, batch_size=4, progress=False, make=fakes.make_env
    )
